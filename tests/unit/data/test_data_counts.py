import numpy as np
import pytest
from PIL import Image

from fieldmark.data.counts import class_counts, save_pie
from fieldmark.data.labelled import Split
from fieldmark.data.source import open_source


def split_of(labels):
    return Split("x", None, np.asarray(labels, dtype=np.int64))


def test_rows_count_each_class_in_each_split():
    splits = {"train": split_of([0, 2, 2]), "test": split_of([1])}
    assert class_counts(splits, ["a", "b", "c"]) == [
        {"class_name": "a", "train": 1, "test": 0},
        {"class_name": "b", "train": 0, "test": 1},
        {"class_name": "c", "train": 2, "test": 0},
    ]


def test_digits_are_counted():
    source = open_source("digits")
    rows = class_counts(source.splits, source.class_names)
    assert [row["all"] for row in rows] == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


@pytest.fixture
def drawn(monkeypatch):
    """Return a list of (title, slice sizes, legend) per pie, filled as pies are drawn."""
    from matplotlib.axes import Axes

    seen = []
    pie, legend, title = Axes.pie, Axes.legend, Axes.set_title

    def watch_pie(self, sizes, **settings):
        seen.append({"sizes": list(sizes)})
        return pie(self, sizes, **settings)

    def watch_legend(self, handles, labels, **settings):
        seen[-1]["legend"] = list(labels)
        return legend(self, handles, labels, **settings)

    def watch_title(self, text):
        seen[-1]["title"] = text
        return title(self, text)

    monkeypatch.setattr(Axes, "pie", watch_pie)
    monkeypatch.setattr(Axes, "legend", watch_legend)
    monkeypatch.setattr(Axes, "set_title", watch_title)
    return seen


def test_a_pie_per_split_with_a_slice_per_class(tmp_path, drawn):
    splits = {"train": split_of([0] * 30 + [1] * 10), "test": split_of([0, 1, 1, 1])}
    save_pie(tmp_path / "pie.png", class_counts(splits, ["cat", "dog"]), title="pets")
    assert drawn == [
        {
            "sizes": [30, 10],
            "legend": ["cat: 30 (75.0 %)", "dog: 10 (25.0 %)"],
            "title": "train: 40 images, 2 classes",
        },
        {
            "sizes": [1, 3],
            "legend": ["cat: 1 (25.0 %)", "dog: 3 (75.0 %)"],
            "title": "test: 4 images, 2 classes",
        },
    ]
    image = np.asarray(Image.open(tmp_path / "pie.png").convert("RGB"))
    assert image.shape[1] > 800
    assert len(np.unique(image.reshape(-1, 3), axis=0)) > 10
    assert (image[[0, -1]] == 255).all()  # nothing is cut off at the edges
    assert (image[:, [0, -1]] == 255).all()


def test_many_classes_are_grouped(tmp_path, drawn):
    labels = np.concatenate([np.arange(1000), np.repeat([7, 900], [50, 90])])
    names = [f"class {index}" for index in range(1000)]
    save_pie(tmp_path / "pie.png", class_counts({"train": split_of(labels)}, names))
    legend = drawn[0]["legend"]
    assert len(legend) == 12
    assert "class 7: 51 (4.5 %)" in legend
    assert "class 900: 91 (8.0 %)" in legend
    assert legend[-1] == "other (989 classes): 989 (86.8 %)"
    assert sum(drawn[0]["sizes"]) == 1140


def test_names_are_text_and_not_formulas(tmp_path, drawn):
    names = ["$x^$", "_hidden", "a very long name of a class of things"]
    counts = class_counts({"all": split_of([0, 1, 2])}, names)
    save_pie(tmp_path / "pie.png", counts, title="folder:$1^$")
    assert [text.partition(":")[0] for text in drawn[0]["legend"]] == [
        "$x^$",
        "_hidden",
        "a very long name of a…",
    ]


def test_an_empty_split_has_no_pie(tmp_path, drawn):
    counts = class_counts({"all": split_of([]), "test": split_of([0, 1])}, ["a", "b"])
    save_pie(tmp_path / "pie.png", counts)
    assert [pie["sizes"] for pie in drawn] == [[1, 1]]

"""How many images each class has in each split: as rows, and as pies."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fieldmark.data.labelled import Labels, Split
from fieldmark.errors import require
from fieldmark.runtime.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ClassCount = dict[str, str | int]

MAX_SLICES = 12
_MAX_LABEL = 22  # characters
_MIN_WRITTEN = 4.0  # percent: a thinner slice has no room for its number


def class_counts(splits: Mapping[str, Split], class_names: Sequence[str]) -> list[ClassCount]:
    """Return a row per class: {"class_name": its name, and per split its number of images}."""
    counts = {
        name: np.bincount(split.labels, minlength=len(class_names))
        for name, split in splits.items()
    }
    return [
        {"class_name": class_name, **{name: int(of[index]) for name, of in counts.items()}}
        for index, class_name in enumerate(class_names)
    ]


def save_pie(path: Path, counts: Sequence[ClassCount], *, title: str = "") -> None:
    """Write a PNG with a pie for each split of `class_counts` that has images.

    The largest classes have a slice each, in one colour in all pies; the others share one.
    """
    require("matplotlib", "train", "drawing the classes")
    from matplotlib.figure import Figure

    class_names = [str(row["class_name"]) for row in counts]
    columns = {
        name: np.array([row[name] for row in counts], dtype=np.int64)
        for name in counts[0]
        if name != "class_name"
    }
    by_split = {name: of for name, of in columns.items() if of.any()}
    shown = _shown(next(iter(by_split.values())))
    figure = Figure(figsize=(6.8 * len(by_split), 5), dpi=110)
    if title:
        figure.suptitle(title, y=1.0, parse_math=False)  # a name may hold a dollar sign
    all_axes = figure.subplots(1, len(by_split), squeeze=False)[0]
    for axes, (split, of) in zip(all_axes, by_split.items(), strict=True):
        _draw(axes, of, shown, class_names)
        axes.set_title(f"{split}: {int(of.sum()):,} images, {len(class_names):,} classes")
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight", pad_inches=0.2)
    write_atomic(path, file.getvalue())


def _shown(counts: Labels) -> list[int]:
    """The classes with a slice of their own, in the order of their index."""
    if len(counts) <= MAX_SLICES:
        return list(range(len(counts)))
    largest = np.argsort(-counts, kind="stable")[: MAX_SLICES - 1]
    return sorted(int(index) for index in largest)


def _draw(axes: "Axes", counts: Labels, shown: list[int], class_names: Sequence[str]) -> None:
    from matplotlib import colormaps

    # tab20 has ten hues, each dark and light: dark ones first, so that neighbours differ.
    palette = [colormaps["tab20"](index % 20) for index in [*range(0, 20, 2), *range(1, 20, 2)]]
    slices = [(class_names[index], int(counts[index])) for index in shown]
    colors = palette[: len(slices)]
    num_others = len(class_names) - len(shown)
    if num_others:
        slices.append((f"other ({num_others:,} classes)", int(counts.sum()) - _sum(slices)))
        colors.append((0.8, 0.8, 0.8, 1.0))
    total = max(1, int(counts.sum()))
    wedges, *_ = axes.pie(
        [count for _, count in slices],
        colors=colors,
        startangle=90,
        counterclock=False,
        autopct=lambda percent: f"{percent:.1f} %" if percent >= _MIN_WRITTEN else "",
        pctdistance=0.78,
        textprops={"fontsize": 8},
        wedgeprops={"linewidth": 0.8, "edgecolor": "white"},
    )
    # Names stand in a legend: beside thin slices they would lie on top of each other.
    legend = axes.legend(
        wedges,
        [f"{_short(name)}: {count:,} ({100 * count / total:.1f} %)" for name, count in slices],
        loc="upper center",
        bbox_to_anchor=(0.5, 0.02),
        ncols=2,
        fontsize=8,
        frameon=False,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _sum(slices: Sequence[tuple[str, int]]) -> int:
    return sum(count for _, count in slices)


def _short(name: str) -> str:
    return name if len(name) <= _MAX_LABEL else f"{name[: _MAX_LABEL - 1]}…"

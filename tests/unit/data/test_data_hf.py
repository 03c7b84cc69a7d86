import io
import pickle

import datasets
import numpy as np
import pytest
from PIL import Image

from fieldmark.data.source import open_source
from fieldmark.data.source_hf import ColumnImages
from fieldmark.errors import DataError, ImageError, UnknownName
from shared_data import shared_path

NAMES = ["red", "green", "blue"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("hf-cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)


def jpeg(index: int) -> bytes:
    rng = np.random.default_rng(index)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def columns(labels, *, image="image", label="label", kind=None):
    kind = kind or datasets.ClassLabel(names=NAMES)
    features = {image: datasets.Image(), label: kind}
    rows = [{"bytes": jpeg(index), "path": None} for index in range(len(labels))]
    return {image: rows, label: labels}, features


@pytest.fixture
def write(tmp_path):
    """Return a function: split -> (columns, features), as parquet files in a folder."""

    def write(**splits):
        folder = tmp_path / "parquet"
        folder.mkdir(exist_ok=True)
        for name, (content, features) in splits.items():
            table = datasets.Dataset.from_dict(content, features=datasets.Features(features))
            table.to_parquet(folder / f"{name}-00000-of-00001.parquet")
        return f"hf:{folder}"

    return write


def test_columns_are_found_by_type_and_bytes_stay_as_they_are(write, capfd):
    spec = write(
        train=columns([0, 1, 2, 1], image="picture", label="colour"),
        validation=columns([2], image="picture", label="colour"),
        test=columns([1, 0], image="picture", label="colour"),
    )
    capfd.readouterr()
    source = open_source(spec)
    assert {name: len(split) for name, split in source.splits.items()} == {
        "train": 4,
        "val": 1,
        "test": 2,
    }
    assert source.class_names == tuple(NAMES)
    train = source.splits["train"]
    assert list(train.labels) == [0, 1, 2, 1]
    assert train.labels.dtype == np.int64
    assert train.images.encoded(3) == jpeg(3)
    assert train.images.image(3).size == (10, 12)
    assert train.images.name(3) == "train[3]"
    assert capfd.readouterr() == ("", "")  # no progress bars
    assert not datasets.are_progress_bars_disabled()  # but those of others are left alone


def test_a_single_part_is_all_there_is(write):
    assert list(open_source(write(train=columns([0, 1]))).splits) == ["all"]
    assert list(open_source(write(test=columns([0, 1, 2]))).splits) == ["train", "test"]


def test_two_label_columns_need_a_choice(write):
    content, features = columns([0, 1, 2], label="fine")
    content["coarse"], features["coarse"] = [1, 0, 1], datasets.ClassLabel(names=["warm", "cold"])
    spec = write(train=(content, features))
    with pytest.raises(DataError, match=r"'fine' and 'coarse'. Choose by data.label_column=NAME"):
        open_source(spec)
    chosen = open_source(spec, label_column="coarse")
    assert chosen.class_names == ("warm", "cold")
    assert list(chosen.splits["all"].labels) == [1, 0, 1]
    with pytest.raises(UnknownName, match=r"data.label_column 'coars' .* Did you mean 'coarse'"):
        open_source(spec, label_column="coars")


def test_two_image_columns_need_a_choice(write):
    content, features = columns([0, 1])
    content["mask"] = [{"bytes": jpeg(9), "path": None}] * 2
    features["mask"] = datasets.Image()
    spec = write(train=(content, features))
    with pytest.raises(DataError, match=r"'image' and 'mask'. Choose by data.image_column=NAME"):
        open_source(spec)
    assert open_source(spec, image_column="mask").splits["all"].images.encoded(0) == jpeg(9)
    with pytest.raises(DataError, match="column 'label' .* must hold images"):
        open_source(spec, image_column="label")


def test_a_chosen_column_of_plain_bytes_holds_images(write):
    content = {"data": [jpeg(0), jpeg(1)], "label": [0, 1]}
    features = {"data": datasets.Value("binary"), "label": datasets.Value("int64")}
    spec = write(train=(content, features))
    with pytest.raises(DataError, match="one image column. Got none among data, label"):
        open_source(spec)
    images = open_source(spec, image_column="data").splits["all"].images
    assert images.encoded(1) == jpeg(1)


@pytest.mark.parametrize(
    ("values", "kind", "names", "labels"),
    [
        (["b", "a10", "a9", "b"], "string", ("a10", "a9", "b"), [2, 0, 1, 2]),
        ([7, 30, 7, 100], "int64", ("7", "30", "100"), [0, 1, 0, 2]),
    ],
)
def test_plain_labels_become_class_names(write, values, kind, names, labels):
    source = open_source(write(train=columns(values, kind=datasets.Value(kind))))
    assert source.class_names == names
    assert list(source.splits["all"].labels) == labels


def test_a_plain_label_column_counts_only_without_a_class_label(write):
    content, features = columns([2, 1], label="colour")
    content["label"], features["label"] = [5, 6], datasets.Value("int64")
    assert open_source(write(train=(content, features))).class_names == tuple(NAMES)


def test_hidden_labels_are_no_split(write, monkeypatch):
    said = []
    monkeypatch.setattr("fieldmark.data.source_hf.warn", said.append)
    plain = datasets.Value("int64")
    spec = write(train=columns([0, 1], kind=plain), test=columns([-1, -1], kind=plain))
    source = open_source(spec)
    assert list(source.splits) == ["train"]
    assert source.class_names == ("0", "1")  # -1 is no class
    assert "split test is ignored" in said[0]


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        ([0, -1, 1], None, r"from 0 to 2. Got -1 in all\[1\]"),
        ([0, None, 1], None, r"1 without one, the first all\[1\]"),
        ([[0], [1, 2], []], datasets.Sequence(datasets.Value("int64")), "several labels"),
        ([0.5, 1.0, 2.0], datasets.Value("float32"), "whole numbers or text. Got float"),
    ],
)
def test_labels_that_cannot_be_used_are_named(write, labels, kind, message):
    with pytest.raises(DataError, match=message):
        open_source(write(train=columns(labels, kind=kind)))


def test_no_label_column_lists_what_there_is(write):
    spec = write(train=columns([0, 1], label="note", kind=datasets.Value("int64")))
    with pytest.raises(DataError, match="one label column. Got none among image, note"):
        open_source(spec)


def test_a_row_without_an_image_is_an_image_error(write):
    content, features = columns([0, 1])
    content["image"][1] = None
    images = open_source(write(train=(content, features))).splits["all"].images
    with pytest.raises(ImageError, match="must not be empty"):
        images.image(1)


def test_a_folder_of_image_files_is_read_from_its_files(make_folder):
    root = make_folder({"train/cat": 2, "train/dog": 1, "test/dog": 1})
    source = open_source(f"hf:{root}")
    assert source.class_names == ("cat", "dog")
    stored = (root / "train" / "dog" / "000.jpg").read_bytes()
    assert source.splits["train"].images.encoded(2) == stored


def test_the_fingerprint_is_of_the_content(write):
    first = open_source(write(train=columns([0, 1]), test=columns([2]))).fingerprint
    assert open_source(write(test=columns([2]))).fingerprint == first
    content, features = columns([0, 1])
    content["image"][1] = {"bytes": jpeg(1) + b"x", "path": None}
    changed = open_source(write(train=(content, features))).fingerprint
    content["image"][1] = {"bytes": jpeg(1) + b"y", "path": None}
    again = open_source(write(train=(content, features))).fingerprint
    assert len({first, changed, again}) == 3


def test_a_worker_gets_file_names_and_not_bytes(write):
    images = open_source(write(train=columns([0, 1, 2] * 50))).splits["all"].images
    assert isinstance(images, ColumnImages)
    sent = pickle.dumps(images)
    assert len(sent) < 5_000 < 150 * len(jpeg(0))
    assert pickle.loads(sent).encoded(149) == jpeg(149)


def test_a_local_path_must_exist_and_hold_data(tmp_path):
    with pytest.raises(DataError, match="Got a path that does not"):
        open_source(f"hf:{tmp_path}/nothing")
    with pytest.raises(DataError, match=r"can load \(parquet, arrow, or images\)\. The directory"):
        open_source(f"hf:{tmp_path}")


def test_a_hub_name_without_a_network_is_one_sentence(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as caught:
        open_source("hf:somebody/something")
    assert str(caught.value) == (
        "hf:somebody/something must be a local folder or a data set of the Hugging Face hub. There "
        "is no folder 'somebody/something', and the hub cannot be reached. Connect, or give a path."
    )


@pytest.mark.shared
def test_cifar10_as_parquet():
    source = open_source(f"hf:{shared_path('data', 'cifar10')}")
    assert {name: len(split) for name, split in source.splits.items()} == {
        "train": 50_000,
        "test": 10_000,
    }
    assert source.class_names[:3] == ("airplane", "automobile", "bird")
    for split, count in (("train", 5_000), ("test", 1_000)):
        assert np.array_equal(np.bincount(source.splits[split].labels), [count] * 10)
    assert source.splits["train"].images.image(49_999).size == (32, 32)

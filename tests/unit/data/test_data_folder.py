import os
import shutil

import numpy as np
import pytest

from fieldmark.data.source import open_source
from fieldmark.errors import DataError, ImageError
from fieldmark.preprocess import decode
from shared_data import shared_path


def sizes(source):
    return {name: len(split) for name, split in source.splits.items()}


def test_one_folder_of_class_folders_is_undivided(photo_folder):
    source = open_source(f"folder:{photo_folder}")
    split = source.splits["all"]
    assert sizes(source) == {"all": 30}
    assert source.class_names == ("bird", "cat", "dog")
    assert list(split.labels) == [0] * 10 + [1] * 10 + [2] * 10
    assert split.images.name(10) == "cat/000.jpg"
    stored = (photo_folder / "cat" / "000.jpg").read_bytes()
    assert split.images.encoded(10) == stored
    assert np.array_equal(np.asarray(split.images.image(10)), np.asarray(decode(stored)))


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_split_folders_are_found_under_their_usual_names(val, make_folder):
    root = make_folder({"train/a": 3, "train/b": 2, f"{val}/a": 1, f"{val}/b": 2, "test/b": 1})
    source = open_source(f"folder:{root}")
    assert sizes(source) == {"train": 5, "val": 3, "test": 1}
    assert source.splits["val"].images.name(0) == f"{val}/a/000.jpg"
    assert list(source.splits["test"].labels) == [1]  # by name, though test/ has no folder a


def test_class_names_are_sorted_plainly_and_united(make_folder):
    root = make_folder({"train/b": 1, "train/a10": 1, "train/a9": 1, "train/B": 1, "test/b": 1})
    source = open_source(f"folder:{root}")
    assert source.class_names == ("B", "a10", "a9", "b")


def test_files_are_found_in_depth_by_suffix_and_sorted(make_folder, monkeypatch):
    root = make_folder({"a": 2, "b": 1})
    inner = root / "a" / "more" / "deep"
    inner.mkdir(parents=True)
    for name in ("x.PNG", "w.JPEG", "v.webp", "u.tif", "t.Tiff", "s.bmp", "r.gif", "notes.txt"):
        shutil.copy(root / "b" / "000.jpg", inner / name)
    shutil.copy(root / "b" / "000.jpg", root / "a" / ".hidden.jpg")
    (root / ".git").mkdir()
    shutil.copy(root / "b" / "000.jpg", root / ".git" / "x.jpg")
    said = []
    monkeypatch.setattr("fieldmark.data.source_folder.warn", said.append)
    order = list(os.scandir(root))
    monkeypatch.setattr("os.scandir", _reversed(os.scandir))  # a file system's order is no order
    source = open_source(f"folder:{root}")
    assert len(order) == 3
    names = [source.splits["all"].images.name(index) for index in range(9)]
    assert names == [
        "a/000.jpg",
        "a/001.jpg",
        "a/more/deep/s.bmp",
        "a/more/deep/t.Tiff",
        "a/more/deep/u.tif",
        "a/more/deep/v.webp",
        "a/more/deep/w.JPEG",
        "a/more/deep/x.PNG",
        "b/000.jpg",
    ]
    assert len(said) == 1
    assert "2 other entries were ignored" in said[0]
    assert "a/more/deep/notes.txt" in said[0]


def test_the_whole_path_is_sorted_and_not_folder_by_folder(make_folder):
    root = make_folder({"a": 1, "b": 1})
    (root / "a" / "000").mkdir()
    shutil.copy(root / "a" / "000.jpg", root / "a" / "000" / "x.jpg")
    images = open_source(f"folder:{root}").splits["all"].images
    assert [images.name(0), images.name(1)] == ["a/000.jpg", "a/000/x.jpg"]  # "." < "/"


def _reversed(scandir):
    class Reversed:
        def __init__(self, path):
            self.entries = sorted(scandir(path), key=lambda entry: entry.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *_):
            return None

    return Reversed


def test_a_class_called_train_is_a_class(make_folder):
    root = make_folder({"train": 2, "plane": 2, "car": 2})
    source = open_source(f"folder:{root}")
    assert source.class_names == ("car", "plane", "train")


def test_split_folders_without_class_folders_are_an_error(make_folder):
    root = make_folder({"train": 2, "test": 2})
    with pytest.raises(DataError, match=r"\(train/\) must hold one folder of images per class"):
        open_source(f"folder:{root}")


def test_folders_beside_the_splits_are_named(make_folder, monkeypatch):
    root = make_folder({"train/a": 1, "train/b": 1, "old/a": 1})
    said = []
    monkeypatch.setattr("fieldmark.data.source_folder.warn", said.append)
    assert sizes(open_source(f"folder:{root}")) == {"train": 2}
    assert "old/" in said[0]


def test_two_folders_for_one_split_are_an_error(make_folder):
    root = make_folder({"train/a": 1, "val/a": 1, "valid/a": 1})
    with pytest.raises(DataError, match=r"one val split. Got \['val', 'valid'\]"):
        open_source(f"folder:{root}")


def test_a_class_without_training_images_is_named(make_folder):
    root = make_folder({"train/a": 1, "train/empty": 0, "test/a": 1, "test/late": 1})
    with pytest.raises(DataError, match="none for 2 of 3 classes: 'empty', 'late'"):
        open_source(f"folder:{root}")
    (root / "train").rename(root / "ignored")  # to be evaluated on, a class may be missing
    assert sizes(open_source(f"folder:{root}")) == {"test": 2}


def test_an_empty_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match="must hold one folder of images per class"):
        open_source(f"folder:{tmp_path}")


def test_links_are_followed_but_not_in_circles(make_folder):
    root = make_folder({"a": 2, "b": 1})
    (root / "a" / "up").symlink_to(root)
    (root / "a" / "self").symlink_to(root / "a")
    (root / "a" / "other").symlink_to(root / "b")
    source = open_source(f"folder:{root}")
    assert sizes(source) == {"all": 4}
    assert source.splits["all"].images.name(2) == "a/other/000.jpg"


def test_a_file_that_vanished_is_an_image_error(make_folder):
    root = make_folder({"a": 1, "b": 1})
    images = open_source(f"folder:{root}").splits["all"].images
    (root / "a" / "000.jpg").unlink()
    with pytest.raises(ImageError, match="No such file"):
        images.image(0)


def test_names_need_not_be_ascii_but_classes_must_be_unicode(make_folder):
    root = make_folder({"Vögel": 1, "猫": 1})
    raw = os.fsencode(root / "Vögel") + b"/\xff.jpg"
    shutil.copy(root / "Vögel" / "000.jpg", raw)
    source = open_source(f"folder:{root}")
    assert source.class_names == ("Vögel", "猫")
    images = source.splits["all"].images
    assert [images.name(index) for index in range(2)] == ["Vögel/000.jpg", "Vögel/\ufffd.jpg"]
    assert images.encoded(0) == images.encoded(1)
    os.mkdir(os.fsencode(root) + b"/\xff")
    shutil.copy(raw, os.fsencode(root) + b"/\xff/0.jpg")
    with pytest.raises(DataError, match="valid UTF-8"):
        open_source(f"folder:{root}")


def test_the_fingerprint_is_of_names_labels_and_sizes(make_folder, tmp_path):
    root = make_folder({"a": 2, "b": 2})

    def print_of(folder=root):
        return open_source(f"folder:{folder}").fingerprint

    first = print_of()
    os.utime(root / "a" / "000.jpg", (1, 1))
    shutil.copytree(root, tmp_path / "elsewhere")
    assert print_of() == print_of(tmp_path / "elsewhere") == first
    (root / "a" / "000.jpg").rename(root / "a" / "zzz.jpg")
    renamed = print_of()
    (root / "a" / "zzz.jpg").rename(root / "b" / "zzz.jpg")
    moved = print_of()
    with (root / "b" / "zzz.jpg").open("ab") as file:
        file.write(b"x")
    assert len({first, renamed, moved, print_of()}) == 4


def test_imagenet_shows_its_val_as_test_with_descriptions(make_folder):
    classes = {"n01440764": 2, "n01443537": 1}
    both = {f"{part}/{name}": count for part in ("train", "val") for name, count in classes.items()}
    root = make_folder(both)
    source = open_source(f"imagenet:{root}")
    assert sizes(source) == {"train": 3, "test": 3}
    assert source.class_descriptions == ("tench, Tinca tinca", "goldfish, Carassius auratus")
    assert source.splits["test"].images.name(2) == "val/n01443537/000.jpg"
    (root / "train" / "n01443537").rename(root / "train" / "goldfish")
    (root / "val" / "n01443537").rename(root / "val" / "goldfish")
    assert open_source(f"imagenet:{root}").class_descriptions is None


def test_a_flat_imagenet_val_says_how_to_regroup(make_folder):
    root = make_folder({"train/n01440764": 1, "val": 3})
    with pytest.raises(DataError, match=r"Got 3 images directly in it. Move each into val/<wnid>/"):
        open_source(f"imagenet:{root}")
    with pytest.raises(DataError, match=r"must hold train/ and val/. Got neither"):
        open_source(f"imagenet:{root / 'train'}")


@pytest.mark.shared
def test_real_imagenet_folders_are_described():
    root = shared_path("data", "imagenet-sample", "val")
    source = open_source(f"folder:{root}")
    assert sizes(source) == {"all": 500}
    assert source.class_names[0] == "n01443537"
    assert source.class_descriptions is not None
    assert source.class_descriptions[0] == "goldfish, Carassius auratus"
    assert source.splits["all"].images.name(0) == "n01443537/n01443537_goldfish.JPEG"

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fieldmark.data.images import ArrayImages
from fieldmark.data.labelled import Source, Split
from fieldmark.data.source import open_source
from fieldmark.data.split import check_held_out, make_splits, stratified_counts
from fieldmark.errors import DataError


def fake_source(**class_sizes):
    """Return a source whose splits have so many images of each class; images are numbered."""
    splits, start = {}, 0
    for name, sizes in class_sizes.items():
        labels = np.repeat(np.arange(len(sizes)), sizes)
        labels = np.random.default_rng(start).permutation(labels)
        pixels = np.zeros((len(labels), 1, 1, 3), dtype=np.uint8)
        splits[name] = Split(name, ArrayImages(pixels, name), labels)
        start += len(labels)
    num_classes = max(len(sizes) for sizes in class_sizes.values())
    names = tuple(f"class {index}" for index in range(num_classes))
    return Source("fake", names, None, splits, "fingerprint")


def split_of(source, val_frac=0.1, test_frac=0.1, split_seed=0):
    return make_splits(source, val_frac=val_frac, test_frac=test_frac, split_seed=split_seed)


def names_of(split):
    return [split.images.name(index) for index in range(len(split))]


def test_digits_are_cut_into_disjoint_parts_with_equal_shares():
    source = open_source("digits")
    splits = split_of(source, 0.1, 0.2)
    names = {part: names_of(split) for part, split in splits.parts().items()}
    assert sorted(sum(names.values(), [])) == sorted(names_of(source.splits["all"]))
    assert len(splits.test) == round(0.2 * 1797)
    assert len(splits.val) == round(0.1 * 1797)
    whole = np.bincount(source.splits["all"].labels)
    for part, frac in ((splits.test, 0.2), (splits.val, 0.1)):
        assert np.abs(np.bincount(part.labels) - frac * whole).max() < 1
    for part in splits.parts().values():  # labels stay with their images
        indices = [int(name[4:-1]) for name in names_of(part)]
        assert np.array_equal(part.labels, source.splits["all"].labels[indices])
        assert indices == sorted(indices)
    assert splits.held_out == {"val", "test"}
    assert splits.origin["test"] == "held out of the whole: 20 %, stratified, seed 0"
    assert splits.fingerprint == source.fingerprint


def test_the_same_seed_holds_out_the_same_images_for_ever():
    val = split_of(open_source("digits")).val
    # Pinned: other images here means that old packages are evaluated on images they were
    # trained on.
    assert names_of(val)[:6] == ["all[1]", "all[8]", "all[19]", "all[25]", "all[42]", "all[47]"]
    assert names_of(val) == names_of(split_of(open_source("digits")).val)
    other = split_of(open_source("digits"), split_seed=1).val
    assert len(other) == len(val)
    assert len(set(names_of(other)) & set(names_of(val))) < 40  # 18 by chance


def test_held_out_images_come_from_all_over_a_class():
    splits = split_of(fake_source(train=[1000, 1000]), 0.5)
    positions = np.array([int(name[6:-1]) for name in names_of(splits.val)])
    assert abs(positions.mean() - 1000) < 60


@pytest.mark.parametrize(
    ("sizes", "val_frac", "expected"),
    [
        # source's splits -> (train, val, test) sizes, held out, words in origin of val and test
        (
            {"train": [50, 50], "test": [10, 10]},
            0.1,
            ((90, 10, 20), {"val"}, "held out of train: 10 %", "the source's own"),
        ),
        (
            {"train": [50, 50], "test": [10, 10]},
            0.0,
            ((100, None, 20), set(), "none: data.val_frac is 0", "the source's own"),
        ),
        (
            {"train": [50, 50], "val": [5, 5], "test": [10, 10]},
            0.1,
            ((100, 10, 20), set(), "the source's own", "the source's own"),
        ),
        (
            {"train": [50, 50], "val": [5, 5], "test": [10, 10]},
            0.0,
            ((100, None, 20), set(), "the source's own is not used", "the source's own"),
        ),
        (
            {"train": [50, 50], "val": [5, 5]},
            0.1,
            ((100, 10, None), set(), "the source's own", "optimistic"),
        ),
        (
            {"train": [50, 50], "val": [5, 5]},
            0.0,
            ((100, None, 10), set(), "no checkpoint", "the source's own val, used once"),
        ),
        (
            {"train": [50, 50]},
            0.1,
            ((90, 10, None), {"val"}, "held out of train", "optimistic"),
        ),
        (
            {"train": [50, 50]},
            0.0,
            ((100, None, None), set(), "data.val_frac is 0", "and data.val_frac is 0"),
        ),
        (
            {"all": [50, 50]},
            0.2,
            ((70, 20, 10), {"val", "test"}, "held out of the whole: 20 %", "whole: 10 %"),
        ),
        (
            {"all": [50, 50]},
            0.0,
            ((90, None, 10), {"test"}, "none: data.val_frac is 0", "whole: 10 %"),
        ),
    ],
)
def test_a_sources_own_parts_are_kept(sizes, val_frac, expected):
    counts, held_out, val_words, test_words = expected
    splits = split_of(fake_source(**sizes), val_frac)
    parts = (splits.train, splits.val, splits.test)
    assert tuple(None if part is None else len(part) for part in parts) == counts
    assert splits.held_out == held_out
    assert val_words in splits.origin["val"]
    assert test_words in splits.origin["test"]
    assert [part.name for part in parts if part is not None] == list(splits.parts())


def test_a_rare_class_stays_in_train_and_comes_into_val():
    splits = split_of(fake_source(all=[100, 3, 2, 1]), 0.1, 0.1)
    train, val, test = (
        np.bincount(part.labels, minlength=4) for part in (splits.train, splits.val, splits.test)
    )
    assert list(test) == [10, 1, 1, 0]
    assert list(val) == [10, 1, 0, 0]
    assert list(train) == [80, 1, 1, 1]


@given(
    st.lists(st.integers(0, 400), min_size=2, max_size=60),
    st.floats(0.01, 0.5),
)
def test_counts_are_near_the_share_and_leave_something(sizes, frac):
    sizes = np.array(sizes, dtype=np.int64)
    available = np.maximum(sizes - 1, 0)
    counts = stratified_counts(sizes, frac, available)
    assert (counts <= available).all()
    assert (counts[sizes >= 2] >= 1).all()
    free = (sizes >= 2) & (frac * sizes >= 1)
    assert (np.abs(counts - frac * sizes)[free] <= 1).all()
    forced = int(((sizes >= 2) & (frac * sizes < 1)).sum())
    assert (
        abs(int(counts.sum()) - round(float((frac * sizes).sum()))) <= forced + (sizes == 1).sum()
    )


def test_no_training_images_or_classes_is_an_error():
    with pytest.raises(DataError, match="must have a train split to train on. Got only test"):
        split_of(fake_source(test=[3, 3]))
    with pytest.raises(DataError, match="at least 2 classes"):
        split_of(fake_source(all=[10]))


@pytest.fixture
def broken_folder(make_folder):
    """Return a divided folder with two broken files in train and one too narrow to resize."""
    root = make_folder({"train/a": 20, "train/b": 20, "test/a": 3, "test/b": 3})
    for name in ("a/003.jpg", "b/004.jpg"):
        path = root / "train" / name
        path.write_bytes(path.read_bytes()[:200])
    return root


def test_broken_images_that_we_held_out_are_dropped_and_named(broken_folder, spec):
    splits = split_of(open_source(f"folder:{broken_folder}"), val_frac=0.5)
    for seed in range(20):  # a seed that holds out one of the two
        splits = split_of(open_source(f"folder:{broken_folder}"), val_frac=0.5, split_seed=seed)
        held_out = set(names_of(splits.val)) & {"train/a/003.jpg", "train/b/004.jpg"}
        if len(held_out) == 1:
            break
    checked = check_held_out(splits, spec)
    assert len(checked.val) == len(splits.val) - 1
    assert {name for name, _ in checked.broken} == held_out
    assert "decode completely" in checked.broken[0][1]
    assert set(names_of(checked.val)) == set(names_of(splits.val)) - held_out
    kept = dict(zip(names_of(splits.val), splits.val.labels, strict=True))
    assert [kept[name] for name in names_of(checked.val)] == list(checked.val.labels)
    assert checked.train is splits.train  # training reports its own


def test_broken_images_of_the_sources_own_test_are_an_error(broken_folder, spec):
    (broken_folder / "test" / "b" / "001.jpg").write_bytes(b"not an image")
    splits = split_of(open_source(f"folder:{broken_folder}"), val_frac=0.0)
    with pytest.raises(DataError, match=r"Got 1 of 6 that do not: test/b/001.jpg: image must be"):
        check_held_out(splits, spec)


def test_an_image_that_evaluation_refuses_counts_as_broken(broken_folder, spec):
    from PIL import Image

    Image.new("RGB", (1, 60_000)).save(broken_folder / "test" / "b" / "001.png")  # decodes
    splits = split_of(open_source(f"folder:{broken_folder}"), val_frac=0.0)
    with pytest.raises(DataError, match="after resizing its short side"):
        check_held_out(splits, spec)


def test_nothing_left_is_an_error(make_folder, spec):
    root = make_folder({"a": 4, "b": 4})
    for path in root.rglob("*.jpg"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="some images of val must decode. Got 2 broken of 2"):
        check_held_out(split_of(open_source(f"folder:{root}"), 0.25, 0.0), spec)


def test_arrays_are_not_decoded_to_be_checked(spec, monkeypatch):
    splits = split_of(open_source("digits"))
    monkeypatch.setattr(ArrayImages, "image", None)
    checked = check_held_out(splits, spec)
    assert checked.parts().keys() == splits.parts().keys()

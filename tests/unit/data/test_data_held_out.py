import itertools
import threading

import numpy as np
import pytest

from fieldmark.data.held_out import eval_batches, load_eval
from fieldmark.data.parallel import ordered_map
from fieldmark.data.source import open_source
from fieldmark.errors import DataError


@pytest.fixture
def split(photo_folder):
    return open_source(f"folder:{photo_folder}").splits["all"]


def test_batches_are_in_order_and_prepared_as_in_serving(split, spec):
    batches = list(eval_batches(split, spec, batch_size=8, num_threads=3))
    assert [len(images) for images, _ in batches] == [8, 8, 8, 6]
    images, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    assert (images.dtype, images.shape) == (np.uint8, (30, 32, 32, 3))
    assert np.array_equal(labels, split.labels)
    for index in range(30):
        assert np.array_equal(images[index], spec(split.images.encoded(index)))


@pytest.mark.parametrize("max_bytes", [30 * 32 * 32 * 3, 30 * 32 * 32 * 3 - 1])
def test_reading_again_gives_the_same_from_memory_or_files(split, spec, max_bytes, monkeypatch):
    loaded = load_eval(split, spec, max_bytes)
    assert len(loaded) == 30
    assert (loaded.pixels is not None) == (max_bytes == 30 * 32 * 32 * 3)
    expected = list(eval_batches(split, spec, 7))
    for _ in range(2):
        for (images, labels), (right_images, right_labels) in zip(
            loaded.batches(7), expected, strict=True
        ):
            assert np.array_equal(images, right_images)
            assert np.array_equal(labels, right_labels)
    if loaded.pixels is not None:
        monkeypatch.setattr(type(split.images), "encoded", None)
        assert len(list(loaded.batches(30))) == 1  # decoded once


@pytest.mark.parametrize("max_bytes", [0, 2**20])
def test_a_broken_image_is_never_skipped(make_folder, spec, max_bytes):
    root = make_folder({"a": 5, "b": 5})
    (root / "b" / "003.jpg").write_bytes(b"no image")
    split = open_source(f"folder:{root}").splits["all"]
    with pytest.raises(DataError, match="never skips one. Got b/003.jpg: image must be one of"):
        list(load_eval(split, spec, max_bytes).batches(4))


def test_work_ahead_is_bounded_and_in_order():
    started = []

    def work(item):
        started.append(item)
        return -item

    results = ordered_map(work, itertools.count(), num_threads=2, ahead=3)
    assert [next(results) for _ in range(50)] == [-item for item in range(50)]
    assert len(started) <= 50 + 2 * 3 + 1
    results.close()


def test_an_error_comes_at_its_place_and_threads_end():
    def work(item):
        if item == 3:
            raise ValueError("three")
        return item

    before = threading.active_count()
    results = ordered_map(work, range(100), num_threads=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
    assert threading.active_count() == before

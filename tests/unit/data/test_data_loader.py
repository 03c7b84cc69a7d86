import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections import deque
from itertools import islice

import numpy as np
import pytest
import torch

from fieldmark.config import AugmentConfig
from fieldmark.data.loader import FileBatches
from fieldmark.data.resident import ResidentBatches, load_resident
from fieldmark.data.source import open_source
from fieldmark.errors import ConfigError, DataError
from shared_data import shared_path

FULL = AugmentConfig(
    resized_crop=True, flip="random", color_jitter=0.3, cutout_px=9, mixup_alpha=0.3
)
PADDED = AugmentConfig(crop_pad_px=4, crop_pad_mode="reflect", flip="alternating", cutout_px=9)


@pytest.fixture
def split(photo_folder):
    return open_source(f"folder:{photo_folder}").splits["all"]


def make(split, spec, augment=FULL, **changes):
    settings = {"batch_size": 8, "seed": 3, "num_classes": 3, "num_workers": 0}
    return FileBatches(split, spec, augment, **{**settings, **changes})


def take(batches, count, start=0):
    iterator = batches.batches(start)
    taken = [next(iterator) for _ in range(count)]
    iterator.close()
    return taken


def equal(first, second):
    return all(
        torch.equal(a, b)
        for one, other in zip(first, second, strict=True)
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.usefixtures("global_generators")
@pytest.mark.parametrize("augment", [FULL, PADDED])
def test_the_number_of_workers_changes_nothing(split, spec, augment):
    alone, one, two = (
        take(make(split, spec, augment, num_workers=workers, accumulation_steps=2), 14)
        for workers in (0, 1, 2)
    )
    assert equal(alone, one)
    assert equal(alone, two)
    images, targets = alone[0]
    assert images.shape == (4, 3, 32, 32)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert targets.dtype == (torch.float32 if augment.mixup_alpha else torch.int64)


@pytest.mark.parametrize("start", [1, 3, 7])
def test_a_late_start_yields_what_an_undisturbed_run_yields(split, spec, start):
    batches = make(split, spec, accumulation_steps=2)
    assert batches.steps_per_epoch == 30 // 8 == 3
    undisturbed = take(batches, 16)
    assert equal(undisturbed[2 * start :], take(batches, 16 - 2 * start, start))
    assert not equal(undisturbed[:2], undisturbed[6:8])  # another epoch, another view


@pytest.mark.parametrize("augment", [AugmentConfig(), AugmentConfig(flip="alternating")])
def test_memory_and_files_give_the_same_batches(split, spec, augment):
    pixels, labels, _ = load_resident(split, spec, 2**20)
    resident = ResidentBatches(
        pixels,
        labels,
        augment,
        mean=spec.mean,
        std=spec.std,
        batch_size=8,
        seed=3,
        num_classes=3,
    )
    assert equal(take(resident, 7), take(make(split, spec, augment), 7))


def test_changes_are_drawn_for_each_image_and_epoch(split, spec):
    same = split.subset(np.zeros(16, dtype=np.int64), "train")  # one image, sixteen times
    for augment in (
        AugmentConfig(resized_crop=True),
        AugmentConfig(color_jitter=0.3),
        AugmentConfig(crop_pad_px=12),
    ):
        views = {
            image.numpy().tobytes()
            for images, _ in take(make(same, spec, augment), 4)
            for image in images.contiguous(memory_format=torch.contiguous_format)
        }
        assert len(views) >= 30  # of 32: two crops may coincide
    holes = torch.cat([x for x, _ in take(make(same, spec, AugmentConfig(cutout_px=8)), 4)]) == 0
    assert (holes.sum(dim=(1, 2, 3)) >= 8 * 8 * 3).all()
    assert len({hole.numpy().tobytes() for hole in holes}) > 25


def test_each_micro_batch_is_mixed_by_its_own_draws(split, spec):
    batches = make(split, spec, AugmentConfig(mixup_alpha=1.0), accumulation_steps=2)
    shares = [targets.amax(1) for _, targets in take(batches, 12)]
    assert len({tuple(each.tolist()) for each in shares}) == 12


@pytest.fixture
def broken_split(make_folder):
    root = make_folder({"a": 10, "b": 10})
    (root / "a" / "002.jpg").write_bytes(b"no image")
    (root / "b" / "007.jpg").unlink()
    (root / "b" / "007.jpg").symlink_to(root / "nowhere")
    return open_source(f"folder:{root}").splits["all"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_files_make_batches_smaller_and_are_reported_once(broken_split, spec, num_workers):
    reported = []
    batches = make(
        broken_split,
        spec,
        AugmentConfig(),
        batch_size=20,
        num_workers=num_workers,
        max_broken_frac=0.1,
        on_broken=lambda name, reason: reported.append((name, reason)),
    )
    taken = take(batches, 3)
    assert [len(images) for images, _ in taken] == [18, 18, 18]
    assert sorted(name for name, _ in reported) == ["a/002.jpg", "b/007.jpg"]
    assert {reason.split(".")[0] for _, reason in reported} == {
        "image must be one of JPEG, PNG, WEBP, BMP, TIFF",
        "image must be readable",
    }
    for _, labels in taken:  # never replaced by another
        assert sorted(labels.tolist()) == [0] * 9 + [1] * 9


def test_too_many_broken_files_are_an_error(broken_split, spec):
    batches = make(broken_split, spec, batch_size=20, max_broken_frac=0.09, on_broken=ignore)
    with pytest.raises(DataError) as caught:
        next(batches.batches(0))
    message = str(caught.value)
    assert "at most 9 % of the training images may be broken" in message
    assert "Got 2 broken of 20 (10.0 %)" in message
    assert "a/002.jpg: image must be one of" in message


def test_a_batch_with_nothing_left_is_an_error(broken_split, spec):
    batches = make(broken_split, spec, batch_size=1, max_broken_frac=0.5, on_broken=ignore)
    with pytest.raises(DataError, match="a batch must have at least one whole image. Got 1 broken"):
        take(batches, 20)


def ignore(name, reason):
    pass


def test_what_cannot_be_is_an_error(split, spec):
    with pytest.raises(ConfigError, match="Got 31 for 30 images"):
        make(split, spec, batch_size=31)
    with pytest.raises(ConfigError, match="cutout_px must be at most the image's 32 px"):
        make(split, spec, AugmentConfig(cutout_px=33))


def test_closing_ends_the_workers(split, spec):
    iterator = make(split, spec, num_workers=2).batches(0)
    next(iterator)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    iterator.close()
    assert multiprocessing.active_children() == []
    assert not any(worker.is_alive() for worker in workers)


def test_an_error_ends_the_workers_too(broken_split, spec):
    batches = make(broken_split, spec, num_workers=2, max_broken_frac=0.0, on_broken=ignore)
    with pytest.raises(DataError):
        take(batches, 5)
    assert multiprocessing.active_children() == []


def test_a_killed_worker_is_one_sentence(split, spec):
    iterator = make(split, spec, num_workers=1).batches(0)
    next(iterator)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    with pytest.raises(DataError, match="must keep running. Got one that was killed"):
        deque(islice(iterator, 10))


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "reset"), EOFError(), RuntimeError("x")]
)
def test_a_broken_pipe_is_the_same_sentence(split, spec, monkeypatch, error):
    class Reader:
        def __next__(self):
            raise error

    monkeypatch.setattr("fieldmark.data.loader.DataLoader.__iter__", lambda _: Reader())
    with pytest.raises(DataError, match="must keep running"):
        next(make(split, spec, num_workers=1).batches(0))
    with pytest.raises(type(error)):  # without workers it is somebody's mistake
        next(make(split, spec, num_workers=0).batches(0))


def test_a_mistake_in_a_worker_keeps_its_name(split, spec):
    wrong = dataclasses.replace(split, labels=split.labels.astype(str).astype(object) + "x")
    with pytest.raises(ValueError, match="in DataLoader worker process"):
        next(make(wrong, spec, num_workers=1).batches(0))


SCRIPT = """
import sys, time, multiprocessing
from fieldmark.config import AugmentConfig
from fieldmark.data.loader import FileBatches
from fieldmark.data.source import open_source
from fieldmark.preprocess import Preprocess

spec = Preprocess(height_px=32, width_px=32, mean=(0, 0, 0), std=(1, 1, 1))
split = open_source("folder:" + sys.argv[1]).splits["all"]
iterator = FileBatches(
    split, spec, AugmentConfig(), batch_size=8, seed=0, num_classes=3, num_workers=2
).batches(0)
next(iterator)
print(*(worker.pid for worker in multiprocessing.active_children()), flush=True)
time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="reads /proc to see processes")
def test_workers_do_not_outlive_a_killed_parent(photo_folder):
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(photo_folder)], stdout=subprocess.PIPE, text=True
    ) as parent:
        workers = parent.stdout.readline().split()
        assert len(workers) == 2
        assert all(is_running(pid) for pid in workers)
        parent.kill()
    deadline = time.monotonic() + 30  # DataLoader's workers look for their parent every 5 s
    while any(is_running(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(is_running(pid) for pid in workers)


def is_running(pid: str) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.shared
def test_workers_read_parquet_and_photos_as_this_process_does(spec, tmp_path, monkeypatch):
    photos = open_source(f"folder:{shared_path('data', 'imagenet-sample', 'calib')}")
    table = open_source(f"hf:{shared_path('data', 'cifar10')}")
    for split in (photos.splits["all"], table.splits["test"]):
        alone, two = (
            take(make(split, spec, num_classes=200, num_workers=workers), 2) for workers in (0, 2)
        )
        assert equal(alone, two)

"""The size of an update: chosen where it is `auto`, explained where a GPU has no room for it."""

import gc
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from fieldmark.config import TrainConfig
from fieldmark.errors import OutOfMemory
from fieldmark.runtime.log import say
from fieldmark.runtime.memory import available_bytes
from fieldmark.training.capacity import Run, advice, measure_memory

_SIZES = tuple(32 * 2**power for power in range(6))  # 32 to 1,024
_MEASURED = 512  # on a CPU nothing gets faster beyond it
_UPDATES_PER_EPOCH = 20  # fewer would leave an epoch too coarse for a schedule and for validation
_NEAR_BEST = 0.95
_MARGIN = 1.1  # between what fitted once and what a whole run needs: other shapes, fragments
_MAX_MEASURING_S = 60.0
_MEASURE_S = 1.0  # of one size, in up to three tries; one try where that takes longer


def settle_batch_size(
    train: TrainConfig,
    rehearse: Run,
    *,
    num_updates: int,
    num_images: int,
    device: torch.device,
    num_ranks: int = 1,
    decide_once: Callable[[str, Callable[[], tuple[int, str]]], int],
) -> TrainConfig:
    """Return the section with a number for `auto`: found in a run's first process, then replayed.

    Args:
        rehearse: makes `num_updates` updates on a copy of the network.
        num_images: of the train split.
        num_ranks: processes that divide an update.
        decide_once: kind, what finds (value, why) -> the value decided the first time.
    """
    if train.batch_size != "auto":
        return train
    parts = train.accumulation_steps * num_ranks

    def find() -> tuple[int, str]:
        if device.type == "cuda":
            most = largest_that_fits(rehearse, max(1, int(_SIZES[-1] * _MARGIN) // parts + 1))
            speed = None
        else:
            most = measure_memory(rehearse).most_images(available_bytes().num_bytes)
            speed = speed_of(rehearse, num_updates)
        return decide_batch_size(
            num_images=num_images, accumulation_steps=parts, most_images=most, images_per_s=speed
        )

    size = decide_once("batch_size", find)  # the reasons are in decisions.jsonl
    say(f"train.batch_size=auto: {size} images per update; optim.lr is used as it is given")
    return train.model_copy(update={"batch_size": size})


def decide_batch_size(
    *,
    num_images: int,
    accumulation_steps: int,
    most_images: int,
    images_per_s: Callable[[int], float] | None,
) -> tuple[int, str]:
    """Return train.batch_size for `auto`, and the reasons in a sentence.

    Args:
        num_images: of the train split.
        most_images: how many fit into memory at a time.
        images_per_s: speed with so many images at a time, measured from small to large while a
            doubling gains 5 %; the smallest size within 5 % of the best is taken. None: the
            largest that fits.

    Raises:
        OutOfMemory: not one image fits.
    """
    if most_images < 1:
        raise OutOfMemory(
            "one image at a time must fit into memory. It does not: choose a smaller network or "
            "model.image_px."
        )
    # Of one image at a time a batch norm learns little, or nothing.
    cap = max(2 * accumulation_steps, num_images // _UPDATES_PER_EPOCH)
    fitting = int(most_images / _MARGIN) * accumulation_steps
    sizes = _candidates(min(cap, fitting, _SIZES[-1]), accumulation_steps)
    limits = f"at most a {_UPDATES_PER_EPOCH}th of {num_images} images, {most_images} at a time fit"
    if images_per_s is None or len(sizes) == 1:
        return sizes[-1], f"the largest possible: {limits}"
    speeds = _measure(sizes, accumulation_steps, images_per_s)
    best = max(speeds.values())
    chosen = next(size for size, speed in speeds.items() if speed >= _NEAR_BEST * best)
    table = ", ".join(f"{size}: {speed:.3g}" for size, speed in speeds.items())
    return chosen, f"the smallest within 5 % of the best images/s ({table}); {limits}"


def speed_of(rehearse: Run, num_updates: int) -> Callable[[int], float]:
    """Return images per second as a function of the number at a time; the first call warms up.

    Args:
        rehearse: makes `num_updates` updates, on a CPU.
    """
    warm = False

    def images_per_s(num_images: int) -> float:
        nonlocal warm
        if not warm:
            rehearse(num_images)
            warm = True
        best, spent = float("inf"), 0.0
        while spent < _MEASURE_S:  # the best of several: something else may run beside the first
            started = time.perf_counter()
            rehearse(num_images)
            seconds = time.perf_counter() - started
            best, spent = min(best, seconds), spent + max(seconds, _MEASURE_S / 3)
        return num_images * num_updates / best

    return images_per_s


def largest_that_fits(run: Run, at_most: int) -> int:
    """Return the largest number of images up to `at_most` with which `run` has memory enough.

    Bisection: each size is tried once, with the cache emptied before. 0: not even one image.
    """
    fits, fails = 0, at_most + 1
    tried = at_most  # the whole first: often it is not this that failed
    while fails - fits > 1:
        if _has_room(run, tried):
            fits = tried
        else:
            fails = tried
        tried = (fits + fails) // 2
    return fits


@contextmanager
def out_of_memory_explained(
    run: Run, *, batch_size: int, accumulation_steps: int, num_ranks: int = 1
) -> Iterator[None]:
    """Name the largest update that fits when the block runs out of a GPU's memory.

    It is measured on the spot with `run` (forward, backward and update of so many images), once
    what the block held is given back. The network may be changed by it: the run has ended.

    Raises:
        OutOfMemory: in the place of torch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        # The frames that failed hold the activations; they must go before anything is measured.
        traceback.clear_frames(error.__traceback__)
        reason = str(error).split(". ")[0]
    else:
        return
    at_a_time = batch_size // (accumulation_steps * num_ranks)
    most = int(largest_that_fits(run, at_a_time) / _MARGIN)
    raise OutOfMemory(
        f"an update of train.batch_size={batch_size} must fit into the GPU's memory. "
        f"Got: {reason}, with {at_a_time} images at a time. "
        + advice(
            most,
            batch_size=batch_size,
            accumulation_steps=accumulation_steps,
            num_ranks=num_ranks,
        )
    )


def _has_room(run: Run, num_images: int) -> bool:
    give_back()
    try:
        run(num_images)
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)
        return False
    return True


def give_back() -> None:
    """Return what no tensor uses any more to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _candidates(most: int, accumulation_steps: int) -> list[int]:
    """The sizes up to `most` that divide into equal parts; below 32, the largest power of two."""
    sizes = [size for size in _SIZES if size <= most and size % accumulation_steps == 0]
    if sizes:
        return sizes
    part = max(1, most // accumulation_steps)
    return [2 ** (part.bit_length() - 1) * accumulation_steps]


def _measure(
    sizes: list[int], accumulation_steps: int, images_per_s: Callable[[int], float]
) -> dict[int, float]:
    speeds: dict[int, float] = {}
    started = time.monotonic()
    for size in sizes:
        if size > _MEASURED and speeds:
            break
        speed = images_per_s(size // accumulation_steps)
        gain = speed / max(speeds.values()) if speeds else float("inf")
        speeds[size] = speed
        if gain < 1 / _NEAR_BEST or time.monotonic() - started > _MAX_MEASURING_S:
            break
    return speeds

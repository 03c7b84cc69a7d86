"""Training batches from files, decoded and changed by worker processes.

All draws for an image come from (seed, epoch, index), so the number of workers changes nothing.
Workers return uint8: a quarter of the bytes of float32 through the pipe, normalised on the device.
"""

import itertools
import signal
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from fieldmark.config import AugmentConfig
from fieldmark.data.augment import (
    Draws,
    alternating_flips,
    apply,
    check_augment,
    draw_mixup,
    generator,
)
from fieldmark.data.labelled import Split
from fieldmark.data.order import check_batch_size, update_indices
from fieldmark.data.photo import train_pixels
from fieldmark.errors import DataError, ImageError
from fieldmark.preprocess import Preprocess
from fieldmark.runtime.log import warn

_PREFETCHED = 3  # micro-batches per worker
_NAMED_FILES = 5

Key = tuple[int, int]  # epoch, position in the split


class _Sample(NamedTuple):
    pixels: Tensor  # uint8 (H, W, 3)
    label: int
    cutout_yx: tuple[int, int]


class _Broken(NamedTuple):
    name: str
    reason: str


class _Batch(NamedTuple):
    images: Tensor  # uint8 (B, H, W, 3)
    labels: Tensor  # int64 (B,)
    cutout_yx: Tensor  # int64 (B, 2)
    broken: list[tuple[str, str]]


def warn_broken(name: str, reason: str) -> None:
    """Print a line about an image that is left out."""
    warn(f"{name} is left out: {reason}")


class FileBatches:
    """Endless batches read from files; their content is a function of update and seed alone.

    A broken file is left out, so that its batch is smaller; it is never replaced by another image.
    """

    def __init__(
        self,
        split: Split,
        preprocess: Preprocess,
        augment: AugmentConfig,
        *,
        batch_size: int,
        accumulation_steps: int = 1,
        seed: int,
        num_classes: int,
        device: torch.device | str = "cpu",
        channels_last: bool = True,
        num_workers: int = 2,
        max_broken_frac: float = 0.05,
        on_broken: Callable[[str, str], None] = warn_broken,
    ) -> None:
        """Prepare; workers start with `batches`.

        Args:
            preprocess: gives the size, interpolation, mean and std.
            batch_size: images per update, a multiple of `accumulation_steps`.
            num_workers: processes that read; 0 reads in this one.
            max_broken_frac: share of the split above which broken files are an error.
            on_broken: called once per broken file with its name and the reason.

        Raises:
            ConfigError: fewer images than one batch, or an augmentation that does not fit.
        """
        check_batch_size(len(split), batch_size)
        check_augment(augment, preprocess.height_px, preprocess.width_px)
        self._split, self._preprocess, self._augment = split, preprocess, augment
        self._batch_size, self._accumulation_steps = batch_size, accumulation_steps
        self._seed, self._num_classes = seed, num_classes
        self._device, self._channels_last = torch.device(device), channels_last
        self._num_workers = num_workers
        self._max_broken_frac, self._on_broken = max_broken_frac, on_broken
        self._broken: dict[str, str] = {}
        self.steps_per_epoch = len(split) // batch_size

    def batches(self, start_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `accumulation_steps` micro-batches per update, from update `start_step` on.

        Images are float32 (b, 3, H, W); targets are int64 (b,), or float32 (b, K) when mixed.
        Closing the iterator ends its workers.

        Raises:
            DataError: too many broken files, a batch with no whole one, or a worker that died.
        """
        reader = iter(self._loader(start_step))
        micros = itertools.count(start_step * self._accumulation_steps)
        try:
            for micro, batch in zip(micros, _read(reader, self._num_workers > 0), strict=False):
                self._account(batch)
                yield self._finish(batch, micro)
        finally:
            # DataLoader offers no other way to end its workers now and not at some collection.
            if hasattr(reader, "_shutdown_workers"):
                reader._shutdown_workers()

    def _loader(self, start_step: int) -> "DataLoader[_Sample | _Broken]":
        keys = _Keys(
            len(self._split),
            self._batch_size,
            self._accumulation_steps,
            self._seed,
            start_step,
        )
        return DataLoader(
            _Photos(self._split, self._preprocess, self._augment, self._seed),
            batch_sampler=keys,
            num_workers=self._num_workers,
            collate_fn=_collate,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=_ignore_stop_signals,
            prefetch_factor=_PREFETCHED if self._num_workers else None,
            # Its own generator: the default would draw from torch's global one, and dropout would
            # then depend on how often an iterator was started.
            generator=torch.Generator(),
        )

    def _account(self, batch: _Batch) -> None:
        for name, reason in batch.broken:
            if name not in self._broken:
                self._broken[name] = reason
                self._on_broken(name, reason)
        count, total = len(self._broken), len(self._split)
        # With accumulation the update's other batches still have images.
        is_empty = not len(batch.labels) and self._accumulation_steps == 1
        if count > self._max_broken_frac * total or is_empty:
            listed = [f"{name}: {reason}" for name, reason in self._broken.items()]
            rule = (
                f"at most {100 * self._max_broken_frac:g} % of the training images may be broken "
                "(data.max_broken_frac)"
                if not is_empty
                else "a batch must have at least one whole image"
            )
            raise DataError(
                f"{rule}. Got {count} broken of {total} ({100 * count / total:.1f} %): "
                f"{'; '.join(listed[:_NAMED_FILES])}. Repair or remove them."
            )

    def _finish(self, batch: _Batch, micro: int) -> tuple[Tensor, Tensor]:
        count = len(batch.labels)
        if not count:
            spec = self._preprocess
            shape = (0, 3, spec.height_px, spec.width_px)
            return torch.empty(shape, device=self._device), batch.labels
        share = partner = None
        if self._augment.mixup_alpha:
            step, part = divmod(micro, self._accumulation_steps)
            rng = generator("mix", self._seed, step // self.steps_per_epoch, step, part)
            share, partner = draw_mixup(self._augment.mixup_alpha, rng, count)
        images, targets = apply(
            self._augment,
            batch.images.to(self._device, non_blocking=True),
            batch.labels.to(self._device, non_blocking=True),
            Draws(
                cutout_yx=batch.cutout_yx.numpy() if self._augment.cutout_px else None,
                mix_share=share,
                mix_partner=partner,
            ),
            mean=self._preprocess.mean,
            std=self._preprocess.std,
            num_classes=self._num_classes,
        )
        return (images if self._channels_last else images.contiguous()), targets


class _Keys(Sampler[list[Key]]):
    """The (epoch, position) pairs of each micro-batch, without end."""

    def __init__(
        self, num_images: int, batch_size: int, accumulation_steps: int, seed: int, start_step: int
    ) -> None:
        self._order = (num_images, batch_size, seed, start_step)
        self._accumulation_steps = accumulation_steps

    def __iter__(self) -> Iterator[list[Key]]:
        for _, epoch, chosen in update_indices(*self._order):
            for part in np.split(chosen, self._accumulation_steps):
                yield [(epoch, int(index)) for index in part]


class _Photos(Dataset[_Sample | _Broken]):
    """The training images, decoded and changed; a function of (epoch, position)."""

    def __init__(
        self, split: Split, preprocess: Preprocess, augment: AugmentConfig, seed: int
    ) -> None:
        self._split, self._preprocess, self._augment = split, preprocess, augment
        self._seed = seed

    def __getitem__(self, key: Key) -> _Sample | _Broken:
        epoch, index = key
        augment, preprocess = self._augment, self._preprocess
        rng = generator("image", self._seed, epoch, index)
        is_flipped = None
        if augment.flip == "alternating":
            is_flipped = bool(alternating_flips(self._seed, np.array([index]), epoch)[0])
        try:
            pixels = train_pixels(
                self._split.images, index, preprocess, augment, rng, is_flipped=is_flipped
            )
        except ImageError as error:
            return _Broken(self._split.images.name(index), str(error))
        cutout = (0, 0)
        if augment.cutout_px:
            cutout = (
                int(rng.integers(0, preprocess.height_px - augment.cutout_px + 1)),
                int(rng.integers(0, preprocess.width_px - augment.cutout_px + 1)),
            )
        return _Sample(torch.from_numpy(pixels), int(self._split.labels[index]), cutout)


def _collate(samples: list[_Sample | _Broken]) -> _Batch:
    whole = [sample for sample in samples if isinstance(sample, _Sample)]
    broken = [(sample.name, sample.reason) for sample in samples if isinstance(sample, _Broken)]
    return _Batch(
        torch.stack([sample.pixels for sample in whole]) if whole else torch.empty(0),
        torch.tensor([sample.label for sample in whole], dtype=torch.int64),
        torch.tensor([sample.cutout_yx for sample in whole], dtype=torch.int64).view(-1, 2),
        broken,
    )


def _ignore_stop_signals(worker: int) -> None:
    # Ctrl-C reaches the whole process group, and a cluster's signals every process of the job. The
    # parent decides: it still needs its batches to finish an update. If it is killed, DataLoader's
    # workers notice within seconds and end.
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGUSR1,
        signal.SIGUSR2,
        signal.SIGHUP,
    ):
        signal.signal(number, signal.SIG_IGN)


def _read(reader: Iterator[_Batch], has_workers: bool) -> Iterator[_Batch]:
    while True:
        try:
            yield next(reader)
        # A worker that is killed breaks the wait for it, or the pipe that its batch came through.
        except (RuntimeError, OSError, EOFError) as error:
            if not has_workers or "in DataLoader worker process" in str(error):
                raise
            detail = str(error) or type(error).__name__
            raise DataError(
                "processes that read images must keep running. Got one that was killed, as for "
                f"want of memory or of shared memory in /dev/shm ({detail}). "
                "Lower data.num_workers or train.batch_size."
            ) from error

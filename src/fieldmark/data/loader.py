"""Training batches from files, decoded and changed by worker processes.

All draws for an image come from (seed, epoch, index, copy), so the number of workers changes
nothing, nor does the division into ranks.
Workers return uint8: a quarter of the bytes of float32 through the pipe, normalised on the device.
"""

import itertools
import signal
import time
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
    generator,
    noise_seed,
)
from fieldmark.data.erase import draw_erase_boxes
from fieldmark.data.labelled import Split
from fieldmark.data.mixing import draw_mix
from fieldmark.data.order import Order, SamplerName, Shares
from fieldmark.data.photo import train_pixels
from fieldmark.data.sizes import Size, scaled_px, size_at
from fieldmark.errors import DataError, ImageError
from fieldmark.preprocess import Preprocess
from fieldmark.runtime.log import warn

PREFETCHED = 3  # micro-batches per worker
_NAMED_FILES = 5
_SIGNAL_WAIT_S = 0.2

NO_BOX = (0, 0, 0, 0)


class Key(NamedTuple):
    """Which image, and all that its random numbers depend on beside the seed."""

    epoch: int
    image: int  # position in the split
    copy: int  # which of the times that the epoch shows the image
    size: Size


class _Sample(NamedTuple):
    pixels: Tensor  # uint8 (H, W, 3)
    label: int
    cutout_yx: tuple[int, int]
    erase_box: tuple[int, int, int, int]


class _Broken(NamedTuple):
    name: str
    reason: str


class _Batch(NamedTuple):
    images: Tensor  # uint8 (B, H, W, 3)
    labels: Tensor  # int64 (B,)
    cutout_yx: Tensor  # int64 (B, 2)
    erase_boxes: Tensor  # int64 (B, 4)
    broken: list[tuple[str, str]]


def prefetched_bytes(num_workers: int, num_images: int, size: Size) -> int:
    """Return what micro-batches that were read ahead hold, in bytes: their images are uint8.

    The worker processes themselves are not in it.
    """
    return num_workers * PREFETCHED * num_images * 3 * size[0] * size[1]


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
        rank: int = 0,
        num_ranks: int = 1,
        seed: int,
        num_classes: int,
        sampler: SamplerName = "shuffle",
        repeats: int = 1,
        image_px: Callable[[int], int] | None = None,
        device: torch.device | str = "cpu",
        channels_last: bool = True,
        num_workers: int = 2,
        max_broken_frac: float = 0.05,
        on_broken: Callable[[str, str], None] = warn_broken,
    ) -> None:
        """Prepare; workers start with `batches`.

        Args:
            preprocess: gives the size, interpolation, mean and std.
            batch_size: images per update, a multiple of `num_ranks * accumulation_steps`.
            rank: of this process, which reads its part of each update and no more.
            sampler, repeats: see Order.
            image_px: update from 0 -> short side of its images in px; default: of `preprocess`.
            num_workers: processes that read; 0 reads in this one.
            max_broken_frac: share of the split above which broken files are an error.
            on_broken: called once per broken file with its name and the reason.

        Raises:
            ConfigError: fewer images than one batch, or an augmentation that does not fit.
        """
        self._order = Order(split.labels, batch_size, seed, sampler=sampler, repeats=repeats)
        self._shares = Shares(batch_size, accumulation_steps, rank, num_ranks)
        check_augment(augment, preprocess.height_px, preprocess.width_px)
        self._split, self._preprocess, self._augment = split, preprocess, augment
        self._seed, self._num_classes, self._image_px = seed, num_classes, image_px
        self._device, self._channels_last = torch.device(device), channels_last
        self._num_workers = num_workers
        self._max_broken_frac, self._on_broken = max_broken_frac, on_broken
        self._broken: dict[str, str] = {}
        self.steps_per_epoch = self._order.steps_per_epoch

    def batches(self, start_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `accumulation_steps` micro-batches per update, from update `start_step` on.

        Images are float32 (b, 3, H, W); targets are int64 (b,), or float32 (b, K) where images are
        mixed. Closing the iterator ends its workers.

        Raises:
            DataError: too many broken files, a batch with no whole one, or a worker that died.
        """
        reader = iter(self._loader(start_step))
        # Not the loader's own iterator of keys, which runs ahead by what the workers prefetch.
        steps = (step for step in itertools.count(start_step) for _ in self._shares.parts)
        parts = itertools.cycle(self._shares.parts)
        try:
            for batch in _read(reader, self._num_workers > 0):
                self._account(batch)
                yield self._finish(batch, next(steps), next(parts))
        finally:
            # DataLoader offers no other way to end its workers now and not at some collection.
            if hasattr(reader, "_shutdown_workers"):
                reader._shutdown_workers()

    def _loader(self, start_step: int) -> "DataLoader[_Sample | _Broken]":
        return DataLoader(
            _Photos(self._split, self._preprocess, self._augment, self._seed),
            batch_sampler=_Keys(self._order, self._shares, start_step, self._size),
            num_workers=self._num_workers,
            collate_fn=_collate,
            pin_memory=self._device.type == "cuda",
            worker_init_fn=_ignore_stop_signals,
            prefetch_factor=PREFETCHED if self._num_workers else None,
            # Its own generator: the default would draw from torch's global one, and dropout would
            # then depend on how often an iterator was started.
            generator=torch.Generator(),
        )

    def _size(self, step: int) -> Size:
        """The (height, width) of an update's images."""
        px = None if self._image_px is None else self._image_px(step)
        return size_at(px, self._preprocess.height_px, self._preprocess.width_px)

    def _account(self, batch: _Batch) -> None:
        for name, reason in batch.broken:
            if name not in self._broken:
                self._broken[name] = reason
                self._on_broken(name, reason)
        count, total = len(self._broken), len(self._split)
        # With accumulation or ranks the update's other batches still have images.
        is_empty = not len(batch.labels) and self._shares.num_parts == 1
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

    def _finish(self, batch: _Batch, step: int, part: int) -> tuple[Tensor, Tensor]:
        count, size = len(batch.labels), self._size(step)
        augment, spec, seed = self._augment, self._preprocess, self._seed
        if not count:
            return torch.empty((0, 3, *size), device=self._device), batch.labels.to(self._device)
        epoch = step // self.steps_per_epoch
        mix = draw_mix(
            augment, generator("mix", seed, epoch, step, part), count, *size, seed=seed, step=step
        )
        images, targets = apply(
            augment,
            batch.images.to(self._device, non_blocking=True),
            batch.labels.to(self._device, non_blocking=True),
            Draws(
                cutout_yx=batch.cutout_yx.numpy() if augment.cutout_px else None,
                erase_boxes=batch.erase_boxes.numpy() if augment.erase_prob else None,
                mix_share=mix.share,
                mix_partner=mix.partner,
                mix_boxes=mix.boxes,
                noise_seed=noise_seed(seed, epoch, step, part),
            ),
            mean=spec.mean,
            std=spec.std,
            num_classes=self._num_classes,
            full=(spec.height_px, spec.width_px),
        )
        return (images if self._channels_last else images.contiguous()), targets


class _Keys(Sampler[list[Key]]):
    """The keys of each micro-batch of this rank, without end."""

    def __init__(
        self, order: Order, shares: Shares, start_step: int, size: Callable[[int], Size]
    ) -> None:
        self._order, self._shares, self._start_step, self._size = order, shares, start_step, size

    def __iter__(self) -> Iterator[list[Key]]:
        for update in self._order.updates(self._start_step):
            size = self._size(update.step)
            for part in self._shares.parts:
                where = self._shares.positions(part)
                chosen = zip(
                    update.indices[where].tolist(), update.copies[where].tolist(), strict=True
                )
                yield [Key(update.epoch, index, copy, size) for index, copy in chosen]


class _Photos(Dataset[_Sample | _Broken]):
    """The training images, decoded and changed; a function of the key."""

    def __init__(
        self, split: Split, preprocess: Preprocess, augment: AugmentConfig, seed: int
    ) -> None:
        self._split, self._preprocess, self._augment = split, preprocess, augment
        self._seed = seed

    def __getitem__(self, key: Key) -> _Sample | _Broken:
        epoch, index, copy, size = key
        augment, preprocess = self._augment, self._preprocess
        rng = generator("image", self._seed, epoch, index, *([copy] if copy else []))
        is_flipped = None
        if augment.flip == "alternating":
            is_flipped = bool(alternating_flips(self._seed, np.array([index]), epoch + copy)[0])
        try:
            pixels = train_pixels(
                self._split.images,
                index,
                preprocess,
                augment,
                rng,
                is_flipped=is_flipped,
                size=size,
            )
        except ImageError as error:
            return _Broken(self._split.images.name(index), str(error))
        cutout, box = (0, 0), NO_BOX
        if augment.cutout_px:
            full = preprocess.height_px, preprocess.width_px
            cutout_px = scaled_px(augment.cutout_px, size, full)
            cutout = (
                int(rng.integers(0, size[0] - cutout_px + 1)),
                int(rng.integers(0, size[1] - cutout_px + 1)),
            )
        if augment.erase_prob:
            top, left, height, width = draw_erase_boxes(rng, 1, augment.erase_prob, *size)[0]
            box = int(top), int(left), int(height), int(width)
        label = int(self._split.labels[index])
        return _Sample(torch.from_numpy(pixels), label, cutout, box)


def _collate(samples: list[_Sample | _Broken]) -> _Batch:
    whole = [sample for sample in samples if isinstance(sample, _Sample)]
    broken = [(sample.name, sample.reason) for sample in samples if isinstance(sample, _Broken)]
    return _Batch(
        torch.stack([sample.pixels for sample in whole]) if whole else torch.empty(0),
        torch.tensor([sample.label for sample in whole], dtype=torch.int64),
        torch.tensor([sample.cutout_yx for sample in whole], dtype=torch.int64).view(-1, 2),
        torch.tensor([sample.erase_box for sample in whole], dtype=torch.int64).view(-1, 4),
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
            # torch tells of the killed process a second time, from a signal handler, at the first
            # call that the program makes then: let that be here.
            try:  # noqa: SIM105  # a context would be made by a call
                time.sleep(_SIGNAL_WAIT_S if has_workers else 0)
            except RuntimeError:
                pass
            if not has_workers or "in DataLoader worker process" in str(error):
                raise
            detail = str(error) or type(error).__name__
            raise DataError(
                "processes that read images must keep running. Got one that was killed, as for "
                f"want of memory or of shared memory in /dev/shm ({detail}). "
                "Lower data.num_workers or train.batch_size."
            ) from error

"""Training batches from decoded images that all lie on the device."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from fieldmark.config import AugmentConfig, DataConfig
from fieldmark.data.augment import apply, check_augment, draw, generator, noise_seed
from fieldmark.data.images import prepare
from fieldmark.data.labelled import Labels, Split
from fieldmark.data.order import Order, SamplerName, Shares, Update
from fieldmark.data.parallel import ordered_map
from fieldmark.data.sizes import size_at
from fieldmark.data.transfer import to_device
from fieldmark.errors import ConfigError, DataError, ImageError
from fieldmark.preprocess import Pixels, Preprocess
from fieldmark.runtime.log import track

MAX_RESIDENT_SIDE_PX = 64
SAMPLED_IMAGES = 64
_BLOCK = 64  # images per task


class ResidentBatches:
    """Endless batches whose content is a function of the update and the seed alone.

    An update's random numbers are drawn for all of its images, then divided into micro-batches,
    so that neither `accumulation_steps` nor the number of ranks changes an image. Mixing is the
    exception, as partners are of the same micro-batch: a rank has no others; and so is the noise
    of erased parts, drawn for each micro-batch. Both depend on the number of micro-batches alone,
    however ranks divide them.
    """

    def __init__(
        self,
        images_NHWC: Pixels,
        labels_N: Labels,
        augment: AugmentConfig,
        *,
        mean: Sequence[float],
        std: Sequence[float],
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
    ) -> None:
        """Move the images to the device.

        Args:
            batch_size: images per update, a multiple of `num_ranks * accumulation_steps`.
            rank: of this process, which makes its part of each update and no more.
            sampler, repeats: see Order.
            image_px: update from 0 -> short side of its images in px; default: as they are.

        Raises:
            ConfigError: fewer images than one batch, or an augmentation that does not fit.
        """
        self._order = Order(labels_N, batch_size, seed, sampler=sampler, repeats=repeats)
        self._shares = Shares(batch_size, accumulation_steps, rank, num_ranks)
        refuse_file_augment(augment)
        _, self._height_px, self._width_px, _ = images_NHWC.shape
        check_augment(augment, self._height_px, self._width_px)
        self._images = torch.from_numpy(images_NHWC).to(device)
        self._labels = torch.from_numpy(labels_N).to(device)
        self._augment, self._mean, self._std = augment, mean, std
        self._seed, self._num_classes, self._channels_last = seed, num_classes, channels_last
        self._image_px = image_px
        self.steps_per_epoch = self._order.steps_per_epoch

    def batches(self, start_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield `accumulation_steps` micro-batches per update, from update `start_step` on.

        Images are float32 (b, 3, H, W); targets are int64 (b,), or float32 (b, K) where images are
        mixed.
        """
        for update in self._order.updates(start_step):
            yield from self._micro_batches(update)

    def _micro_batches(self, update: Update) -> Iterator[tuple[Tensor, Tensor]]:
        px = None if self._image_px is None else self._image_px(update.step)
        size = size_at(px, self._height_px, self._width_px)
        draws = draw(
            self._augment,
            generator("batch", self._seed, update.epoch, update.step),
            update.indices,
            self._height_px,
            self._width_px,
            seed=self._seed,
            epoch=update.epoch,
            step=update.step,
            copies=update.copies,
            size=size,
            num_parts=self._shares.num_parts,
        )
        for part in self._shares.parts:
            where = self._shares.positions(part)
            index = to_device(update.indices[where], self._images.device)
            images, targets = apply(
                self._augment,
                self._images.index_select(0, index),
                self._labels.index_select(0, index),
                draws.part(where, noise_seed(self._seed, update.epoch, update.step, part)),
                mean=self._mean,
                std=self._std,
                num_classes=self._num_classes,
                size=size,
            )
            yield (images if self._channels_last else images.contiguous()), targets


def load_resident(
    split: Split, preprocess: Preprocess, max_bytes: int, *, num_threads: int = 0
) -> tuple[Pixels, Labels, list[tuple[str, str]]]:
    """Return all images as uint8 (N, H, W, 3), their labels, and (name, reason) of broken ones.

    Images are prepared as for evaluation, by threads. Broken ones are left out.

    Raises:
        ConfigError: the decoded images need more than `max_bytes`.
        DataError: no image is whole.
    """
    shape = (len(split), preprocess.height_px, preprocess.width_px, 3)
    needed = int(np.prod(shape, dtype=np.int64))
    if needed > max_bytes:
        raise ConfigError(
            f"decoded images must fit in data.max_resident_mb ({max_bytes // 2**20} MB). Got "
            f"{len(split)} images of {-(-needed // 2**20)} MB. Raise it, or set "
            "data.storage=files."
        )
    pixels = np.empty(shape, dtype=np.uint8)

    def read(start: int) -> list[tuple[int, str]]:
        broken = []
        for index in range(start, min(start + _BLOCK, len(split))):
            try:
                pixels[index] = prepare(split.images, index, preprocess)
            except ImageError as error:
                broken.append((index, str(error)))
        return broken

    starts = range(0, len(split), _BLOCK)
    found = ordered_map(read, starts, num_threads=num_threads)
    reasons = [
        item for block in track(found, f"reading {split.name}", len(starts)) for item in block
    ]
    named = [(split.images.name(index), reason) for index, reason in reasons]
    if not named:
        return pixels, split.labels, []
    if len(named) == len(split):
        raise DataError(
            f"some images of {split.name} must decode. Got {len(named)} broken of {len(split)}, "
            f"the first {named[0][0]}: {named[0][1]} Check the source."
        )
    is_whole = np.ones(len(split), dtype=np.bool_)
    is_whole[[index for index, _ in reasons]] = False
    return pixels[is_whole], split.labels[is_whole], named


def fits_resident(
    split: Split, preprocess: Preprocess, augment: AugmentConfig, data: DataConfig
) -> bool:
    """Return whether training holds decoded images on the device: data.storage, or a rule.

    The rule of "auto": no augmentation that needs the original files, decoded images within
    data.max_resident_mb, and images that are all of one size, at most 64 px a side, as a seeded
    sample of 64 shows.

    Raises:
        ConfigError: data.storage=resident with an augmentation that needs the original files.
    """
    if data.storage == "resident":
        refuse_file_augment(augment)
        return True
    if data.storage == "files" or any(file_augments(augment).values()):
        return False
    num_bytes = len(split) * preprocess.height_px * preprocess.width_px * 3
    if num_bytes > data.max_resident_mb * 2**20:
        return False
    rng = generator("sizes", split.name, len(split))
    sample = rng.choice(len(split), min(SAMPLED_IMAGES, len(split)), replace=False)
    sizes = set()
    for index in sample:
        try:
            sizes.add(split.images.image(int(index)).size)
        except ImageError:
            continue
    return len(sizes) == 1 and max(sizes.pop()) <= MAX_RESIDENT_SIDE_PX


def file_augments(augment: AugmentConfig) -> dict[str, object]:
    """Return the keys that only images read from files can have -> their value, falsy when off.

    A resized crop needs the original's pixels. Chosen operations and colours are Pillow's, one
    image at a time: they belong into worker processes.
    """
    return {
        "augment.resized_crop": augment.resized_crop,
        "augment.ops": augment.ops if augment.ops != "none" else "",
        "augment.color_jitter": augment.color_jitter,
    }


def refuse_file_augment(augment: AugmentConfig) -> None:
    """Raise ConfigError for augmentations that only files can have."""
    for key, value in file_augments(augment).items():
        if value:
            raise ConfigError(
                f"{key} must be off with data.storage=resident. Got {value}. Set "
                "data.storage=files."
            )

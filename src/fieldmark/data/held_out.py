"""Evaluation batches: in order, prepared exactly as in serving, never without an image."""

from collections.abc import Iterator

import numpy as np

from fieldmark.data.images import prepare
from fieldmark.data.labelled import Labels, Split
from fieldmark.data.parallel import ordered_map
from fieldmark.errors import DataError, ImageError
from fieldmark.preprocess import Pixels, Preprocess

Batch = tuple[Pixels, Labels]


def eval_batches(
    split: Split, preprocess: Preprocess, batch_size: int, num_threads: int = 0
) -> Iterator[Batch]:
    """Yield uint8 images (B, H, W, 3) and labels (B,) in order; the last batch may be smaller.

    Threads prepare a few batches ahead.

    Args:
        num_threads: 0 for the cores this process may use.

    Raises:
        DataError: an image is broken; names it.
    """

    def read(start: int) -> Batch:
        end = min(start + batch_size, len(split))
        shape = (end - start, preprocess.height_px, preprocess.width_px, 3)
        images = np.empty(shape, dtype=np.uint8)
        for row, index in enumerate(range(start, end)):
            images[row] = _whole(split, index, preprocess)
        return images, split.labels[start:end]

    starts = range(0, len(split), batch_size)
    return ordered_map(read, starts, num_threads=num_threads, ahead=1)


class EvalImages:
    """A split prepared for evaluation, to be read as often as wanted.

    `pixels` is uint8 (N, H, W, 3) when everything is held in memory, else None.
    """

    def __init__(
        self, split: Split, preprocess: Preprocess, pixels: Pixels | None, num_threads: int
    ) -> None:
        self.split, self.labels, self.pixels = split, split.labels, pixels
        self._preprocess, self._num_threads = preprocess, num_threads

    def __len__(self) -> int:
        return len(self.split)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yield images and labels in order, from memory or by decoding again."""
        if self.pixels is None:
            yield from eval_batches(self.split, self._preprocess, batch_size, self._num_threads)
            return
        for start in range(0, len(self), batch_size):
            chosen = slice(start, start + batch_size)
            yield self.pixels[chosen], self.labels[chosen]


def load_eval(
    split: Split, preprocess: Preprocess, max_bytes: int, *, num_threads: int = 0
) -> EvalImages:
    """Return a split for repeated evaluation: decoded once if it fits in `max_bytes`.

    Raises:
        DataError: an image is broken; names it. Where it does not fit, reading raises it.
    """
    shape = (len(split), preprocess.height_px, preprocess.width_px, 3)
    if int(np.prod(shape, dtype=np.int64)) > max_bytes:
        return EvalImages(split, preprocess, None, num_threads)
    pixels = np.empty(shape, dtype=np.uint8)
    start = 0
    for images, _ in eval_batches(split, preprocess, batch_size=64, num_threads=num_threads):
        pixels[start : start + len(images)] = images
        start += len(images)
    return EvalImages(split, preprocess, pixels, num_threads)


def _whole(split: Split, index: int, preprocess: Preprocess) -> Pixels:
    try:
        return prepare(split.images, index, preprocess)
    except ImageError as error:
        raise DataError(
            f"every image of {split.name} must decode, because evaluation never skips one. Got "
            f"{split.images.name(index)}: {error} Repair or remove it."
        ) from error

"""Indexed images: arrays in memory, files on disk, or a selection of others."""

import io
import os
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from fieldmark.errors import ImageError
from fieldmark.preprocess import Pixels, Preprocess, decode

Indices = npt.NDArray[np.int64]


class Images(Protocol):
    """Images by index. Reading is safe from several threads and processes at once."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """Return what a person finds the image by: a path in the source, or "train[123]"."""
        ...

    def encoded(self, index: int) -> bytes:
        """Return the original file's bytes; for arrays, a PNG of the pixels."""
        ...

    def image(self, index: int) -> Image.Image:
        """Return the upright 8-bit RGB image, or raise ImageError."""
        ...


class ArrayImages:
    """Images held in memory as uint8 (N, H, W, 3)."""

    def __init__(self, pixels: Pixels, split: str) -> None:
        self.pixels, self._split = pixels, split

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, index: int) -> str:
        """Return the split and the position in it."""
        return f"{self._split}[{index}]"

    def encoded(self, index: int) -> bytes:
        """Return the pixels as PNG, which loses nothing."""
        file = io.BytesIO()
        self.image(index).save(file, "PNG")
        return file.getvalue()

    def image(self, index: int) -> Image.Image:
        """Return the pixels as an image."""
        return Image.fromarray(self.pixels[index])


class FileImages:
    """Image files under `root`, read when asked for."""

    def __init__(self, root: Path, relative_paths: list[str]) -> None:
        self._root = root
        # One byte array, not a million str objects: worker processes then share it without
        # copying, because reading it touches no reference count.
        self._paths = np.array([os.fsencode(path) for path in relative_paths], dtype=np.bytes_)

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        """Return the path relative to the root."""
        return bytes(self._paths[index]).decode("utf-8", "replace")

    def encoded(self, index: int) -> bytes:
        """Return the file's bytes."""
        return read_file(self._root / os.fsdecode(bytes(self._paths[index])))

    def image(self, index: int) -> Image.Image:
        """Return the decoded file."""
        return decode(self.encoded(index))


class Selection:
    """Some of other images, in the order of `indices`; names stay those of the others."""

    def __init__(self, base: Images, indices: Indices) -> None:
        self.base: Images = base.base if isinstance(base, Selection) else base
        self.indices: Indices = base.indices[indices] if isinstance(base, Selection) else indices

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        """Return the name among the others."""
        return self.base.name(int(self.indices[index]))

    def encoded(self, index: int) -> bytes:
        """Return the bytes of the selected image."""
        return self.base.encoded(int(self.indices[index]))

    def image(self, index: int) -> Image.Image:
        """Return the selected image."""
        return self.base.image(int(self.indices[index]))


def prepare(images: Images, index: int, preprocess: Preprocess) -> Pixels:
    """Return one image as the model receives it in evaluation, uint8 (H, W, 3).

    Raises:
        ImageError: the image cannot be read or decoded.
    """
    if is_in_memory(images):  # equal to the way through PNG, without encoding and decoding
        return preprocess.to_pixels(images.image(index))
    return preprocess(images.encoded(index))


def upright(images: Images, index: int, preprocess: Preprocess) -> Image.Image:
    """Return one image at its full size, transparency on the background of the specification.

    Raises:
        ImageError: the image cannot be read or decoded.
    """
    if is_in_memory(images):
        return images.image(index)
    return decode(images.encoded(index), background=preprocess.background)


def is_in_memory(images: Images) -> bool:
    """Return whether the images are arrays, which cannot be damaged and need no decoding."""
    base = images.base if isinstance(images, Selection) else images
    return isinstance(base, ArrayImages)


def read_file(path: Path) -> bytes:
    """Return the bytes of an image file; a file that cannot be read is an ImageError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(f"image must be readable. {error.strerror or error}.") from error

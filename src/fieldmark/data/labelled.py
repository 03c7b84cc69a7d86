"""A split is images with labels; a source is what was found on disk: splits and class names."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fieldmark.data.images import Images, Indices, Selection

Labels = npt.NDArray[np.int64]

# What people call the three parts. Compared without regard to case.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels, which index the source's class names."""

    name: str
    images: Images
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, indices: Indices, name: str) -> "Split":
        """Return the images at `indices`, in that order, as a split called `name`."""
        return Split(name, Selection(self.images, indices), self.labels[indices])


@dataclass(frozen=True, eq=False)
class Source:
    """What a source holds before we divide it.

    `splits` has any of "train", "val" and "test" as the source has them, or just "all".
    `fingerprint` changes when class names, splits, labels, or images change: for files their
    names and sizes count, for arrays and tables the content; times of modification never do.
    """

    spec: str
    class_names: tuple[str, ...]
    class_descriptions: tuple[str, ...] | None
    splits: dict[str, Split]
    fingerprint: str


def fingerprint(class_names: Iterable[str], splits: Iterable[tuple[Split, Iterable[bytes]]]) -> str:
    """Return the SHA-256, hex, of class names, split names, labels and each split's content."""
    digest = hashlib.sha256()
    for text in class_names:
        _add(digest, text.encode("utf-8", "surrogateescape"))
    for split, content in splits:
        _add(digest, b"split " + split.name.encode())
        _add(digest, split.labels.astype("<i8").tobytes())
        for block in content:
            _add(digest, block)
    return digest.hexdigest()


def _add(digest: "hashlib._Hash", block: bytes) -> None:
    digest.update(len(block).to_bytes(8, "little"))  # so that "ab","c" differs from "a","bc"
    digest.update(block)

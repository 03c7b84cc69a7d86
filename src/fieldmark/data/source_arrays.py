"""Small public data sets that fit in memory: CIFAR-10, CIFAR-100, and scikit-learn's digits."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fieldmark.data.images import ArrayImages
from fieldmark.data.labelled import Source, Split, fingerprint
from fieldmark.errors import DataError
from fieldmark.preprocess import Pixels
from fieldmark.runtime.log import say


def data_root() -> Path:
    """Return where downloaded data sets live: $FIELDMARK_DATA, or a folder of the user's cache."""
    chosen = os.environ.get("FIELDMARK_DATA")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "fieldmark" / "data"


def open_digits() -> Source:
    """Return scikit-learn's 1,797 handwritten digits as one part that we divide.

    They are 8 x 8 and come enlarged to 32 px, so that networks for small images take them.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey_NHW = np.round(digits.images * (255 / 16)).astype(np.uint8)
    pixels = np.stack([_enlarged(grey) for grey in grey_NHW])
    names = [str(name) for name in digits.target_names]
    return _source("digits", names, {"all": (pixels, digits.target)})


def _enlarged(grey_HW: Pixels) -> Pixels:
    image = Image.fromarray(grey_HW).resize((32, 32), Image.Resampling.BICUBIC)
    return np.asarray(image.convert("RGB"))


def open_cifar(name: str) -> Source:
    """Return "cifar10" or "cifar100" (its 100 fine classes), downloading it where it is absent."""
    import torchvision

    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
    root = data_root()
    parts = {
        split: _load(kind[name], name, root, is_train=split == "train")
        for split in ("train", "test")
    }
    splits = {
        split: (np.ascontiguousarray(part.data), part.targets) for split, part in parts.items()
    }
    return _source(name, parts["train"].classes, splits)


def _load(kind: Any, name: str, root: Path, *, is_train: bool) -> Any:
    try:
        return kind(str(root), train=is_train, download=False)
    except RuntimeError:  # torchvision's word for absent or altered
        say(f"{name} is not in {root}: downloading about 170 MB")
    try:
        root.mkdir(parents=True, exist_ok=True)
        return kind(str(root), train=is_train, download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"data.source={name} must be in {root} or be downloaded, and the download failed "
            f"({error}). Unpack {kind.filename} there, set FIELDMARK_DATA to the folder that "
            f"holds {kind.base_folder}, or use another copy by data.source=hf:PATH."
        ) from error


def _source(name: str, names: Iterable[str], parts: dict[str, tuple[Pixels, Any]]) -> Source:
    splits = {
        split: Split(split, ArrayImages(pixels, split), np.asarray(labels, dtype=np.int64))
        for split, (pixels, labels) in parts.items()
    }
    class_names = tuple(names)
    content = ((splits[split], (pixels.tobytes(),)) for split, (pixels, _) in parts.items())
    return Source(name, class_names, None, splits, fingerprint(class_names, content))

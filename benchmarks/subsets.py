"""Chosen images of a data source as a source of their own, in the user's cache folder."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from fieldmark.data.labelled import Split
from fieldmark.data.source import Source
from fieldmark.errors import DataError
from fieldmark.runtime.log import say


def cache_folder() -> Path:
    """Return where benchmarks keep what they made."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "fieldmark" / "benchmarks"


def split_of(source: Source, name: str) -> Split:
    """Return a split of CIFAR-10.

    Raises:
        DataError: the source has no such split.
    """
    if name not in source.splits:
        raise DataError(
            f"{source.spec} must have a {name} split. Got {', '.join(source.splits)}. "
            "Give CIFAR-10 by --data."
        )
    return source.splits[name]


def written(name: str, splits: Mapping[str, Split], class_names: Sequence[str]) -> Path:
    """Return a folder of parquet files with these splits' images as they are stored.

    It is made once, under its final name only when it is whole: `name` must tell what is in it.
    """
    folder = cache_folder() / name
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        whole = Path(temporary, "whole")
        whole.mkdir()
        for split_name, split in splits.items():
            _write_parquet(split, class_names, whole / f"{split_name}-00000-of-00001.parquet")
        whole.rename(folder)
    sizes = " and ".join(f"{len(split)} {name}" for name, split in splits.items())
    say(f"wrote {folder}: {sizes} images")
    return folder


def _write_parquet(split: Split, class_names: Sequence[str], path: Path) -> None:
    import datasets

    images = [{"bytes": split.images.encoded(i), "path": None} for i in range(len(split))]
    label = datasets.ClassLabel(names=list(class_names))
    features = datasets.Features({"image": datasets.Image(), "label": label})
    content = {"image": images, "label": split.labels.tolist()}
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(content, features=features).to_parquet(str(path))

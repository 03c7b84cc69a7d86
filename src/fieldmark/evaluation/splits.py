"""Which images an evaluation is about: never those that the model was trained on, unasked."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fieldmark.data.labelled import Source, Split
from fieldmark.data.split import make_splits
from fieldmark.errors import DataError, UnknownName

SPLITS = ("train", "val", "test", "all")


def pick_split(
    source: Source,
    wanted: str,
    *,
    training: Mapping[str, Any] | None,
    order: Sequence[str] = ("test", "val", "all"),
) -> Split:
    """Return the split of a source that `wanted` means for a model.

    "auto" is the first of `order` that there is. When the model was trained on this very source,
    val and test are those its training held out, without the images it found broken.

    Args:
        training: what the model's package records of its training; None for foreign weights.

    Raises:
        UnknownName: no such split.
        DataError: the source the model was trained on has changed, and no split was named.
    """
    if wanted not in ("auto", *SPLITS):
        raise UnknownName.among("split", wanted, ["auto", *SPLITS])
    parts = dict(source.splits)
    if training is not None and training.get("fingerprint") == source.fingerprint:
        splits = make_splits(
            source,
            val_frac=float(training["val_frac"]),
            test_frac=float(training["test_frac"]),
            split_seed=int(training["split_seed"]),
        )
        known_broken = {str(name) for name, _ in training.get("broken", ())}
        parts |= splits.parts()
        for name in splits.held_out:
            parts[name] = _without(parts[name], known_broken)
    elif wanted == "auto" and training is not None and training.get("source") == source.spec:
        raise DataError(
            f"{source.spec} must be what the model was trained on, so that its training images are "
            "not evaluated. Its fingerprint changed. Choose a split with --split (all of it: "
            "--split all), or name held-out images."
        )
    elif wanted not in ("auto", *parts) and wanted in SPLITS:
        raise UnknownName(
            f"{source.spec} must have a split {wanted!r}. It has {', '.join(sorted(parts))}. "
            "A model trained on it would know what was held out."
        )
    if wanted == "auto":
        wanted = next((name for name in order if name in parts), next(iter(parts)))
    if wanted not in parts:
        raise UnknownName.among(f"split of {source.spec}", wanted, parts)
    return parts[wanted]


def _without(split: Split, names: set[str]) -> Split:
    """Leave out the images that training found broken, which are known by name."""
    if not names:
        return split
    kept = [i for i in range(len(split)) if split.images.name(i) not in names]
    return split if len(kept) == len(split) else split.subset(np.array(kept), split.name)


def spread_over(split: Split, at_most: int) -> Split:
    """Return at most so many images, evenly spaced over the split, so that all classes come."""
    if len(split) <= at_most:
        return split
    indices = np.linspace(0, len(split) - 1, at_most).round().astype(np.int64)
    return split.subset(indices, split.name)

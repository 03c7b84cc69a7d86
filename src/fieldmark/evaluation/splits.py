"""Which images an evaluation is about: never those that the model was trained on, unasked."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fieldmark.data.labelled import Source, Split
from fieldmark.data.split import check_held_out, make_splits
from fieldmark.errors import UnknownName
from fieldmark.preprocess import Preprocess
from fieldmark.runtime.log import warn

SPLITS = ("train", "val", "test", "all")


def pick_split(
    source: Source,
    wanted: str,
    *,
    training: Mapping[str, Any] | None,
    preprocess: Preprocess,
    order: Sequence[str] = ("test", "val", "all"),
) -> Split:
    """Return the split of a source that `wanted` means for a model.

    "auto" is the first of `order` that there is. When the model was trained on this very source,
    val and test are those its training held out; broken images are left out of these, named.

    Args:
        training: what the model's package records of its training; None for foreign weights.

    Raises:
        UnknownName: no such split.
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
        parts |= splits.parts()
        if wanted in ("val", "test", "auto") and splits.held_out:
            splits = check_held_out(splits, preprocess)
            for name, reason in splits.broken:
                warn(f"left out {name}: {reason}")
            parts |= splits.parts()
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


def spread_over(split: Split, at_most: int) -> Split:
    """Return at most so many images, evenly spaced over the split, so that all classes come."""
    if len(split) <= at_most:
        return split
    indices = np.linspace(0, len(split) - 1, at_most).round().astype(np.int64)
    return split.subset(indices, split.name)

"""Dividing a source into train, val and test: stratified, seeded, and checked before training."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from fieldmark.data.images import Images, is_in_memory, prepare
from fieldmark.data.labelled import Labels, Source, Split
from fieldmark.data.parallel import ordered_map
from fieldmark.errors import DataError, ImageError
from fieldmark.preprocess import Preprocess
from fieldmark.runtime.log import track
from fieldmark.runtime.seed import derive_seed

Counts = npt.NDArray[np.int64]

_BLOCK: Final = 32  # images per task: below a few, handing them to threads costs more than reading


@dataclass(frozen=True, eq=False)
class Splits:
    """What training, the choice of a checkpoint, and the final figures each use.

    `origin` says in one sentence per split where it comes from, or why there is none.
    `held_out` names the splits that we cut from the source, rather than the source itself.
    `broken` lists (image name, reason) of what was dropped from them.
    """

    train: Split
    val: Split | None
    test: Split | None
    class_names: tuple[str, ...]
    class_descriptions: tuple[str, ...] | None
    fingerprint: str
    origin: dict[str, str]
    broken: tuple[tuple[str, str], ...] = ()
    held_out: frozenset[str] = frozenset()

    def parts(self) -> dict[str, Split]:
        """Return the splits that exist, by name."""
        named = {"train": self.train, "val": self.val, "test": self.test}
        return {name: split for name, split in named.items() if split is not None}

    def sizes(self) -> str:
        """Return how many images each split has, as text."""
        listed = ", ".join(f"{len(split)} {name}" for name, split in self.parts().items())
        return f"{listed} images in {len(self.class_names)} classes"


def make_splits(source: Source, *, val_frac: float, test_frac: float, split_seed: int) -> Splits:
    """Return train, val and test of a source.

    A source's own parts are used as they are. What it lacks is held out of its training images:
    the same share of each class, the same images for the same seed. `test_frac` counts only for a
    source that is not divided at all; a source with train and val has no untouched part, so it
    gets no test split, unless `val_frac` is 0 and its val can serve as one.

    Raises:
        DataError: there is nothing to train on, or only one class.
    """
    if len(source.class_names) < 2:
        raise DataError(
            f"{source.spec} must have at least 2 classes to train on. Got {source.class_names}."
        )
    if "all" in source.splits:
        return _divide_all(source, val_frac, test_frac, split_seed)
    if "train" not in source.splits:
        raise DataError(
            f"{source.spec} must have a train split to train on. Got only "
            f"{', '.join(source.splits)}. Add one, or name the folder with the images themselves."
        )
    return _divide_train(source, val_frac, split_seed)


def check_held_out(splits: Splits, preprocess: Preprocess, *, num_threads: int = 0) -> Splits:
    """Return the splits without the broken images of those we held out ourselves.

    Decodes all of val and test once, before training, because evaluation never skips an image.

    Args:
        num_threads: 0 for the cores this process may use.

    Raises:
        DataError: the source's own val or test has broken images, or nothing is left of ours.
    """
    kept: dict[str, Split] = {}
    dropped: list[tuple[str, str]] = []
    for name, split in splits.parts().items():
        if name == "train":
            continue
        broken = find_broken(split, preprocess, num_threads=num_threads)
        if broken and name not in splits.held_out:
            listed = "; ".join(_named(split.images, broken, most=5))
            raise DataError(
                f"every image of {name} must decode, because it is the source's own and "
                f"evaluation never skips an image. Got {len(broken)} of {len(split)} that do not: "
                f"{listed}. Repair or remove them."
            )
        if len(broken) == len(split):
            raise DataError(
                f"some images of {name} must decode. Got {len(broken)} broken of {len(split)}, "
                f"the first {'; '.join(_named(split.images, broken, most=1))}. Check the source."
            )
        dropped += [(split.images.name(index), reason) for index, reason in broken.items()]
        whole = np.setdiff1d(np.arange(len(split)), np.array(list(broken), dtype=np.int64))
        kept[name] = split.subset(whole, name) if broken else split
    return replace(
        splits,
        val=kept.get("val"),
        test=kept.get("test"),
        broken=(*splits.broken, *dropped),
    )


def find_broken(split: Split, preprocess: Preprocess, *, num_threads: int = 0) -> dict[int, str]:
    """Return the index and the reason of each image that cannot become model input."""
    if is_in_memory(split.images):
        return {}

    def read(start: int) -> dict[int, str]:
        reasons = {}
        for index in range(start, min(start + _BLOCK, len(split))):
            try:
                prepare(split.images, index, preprocess)
            except ImageError as error:
                reasons[index] = str(error)
        return reasons

    starts = range(0, len(split), _BLOCK)
    found = ordered_map(read, starts, num_threads=num_threads)
    return {
        index: reason
        for block in track(found, f"checking {split.name}", len(starts))
        for index, reason in block.items()
    }


def stratified_counts(class_sizes: Counts, frac: float, available: Counts) -> Counts:
    """Return how many images to hold out of each class: about `frac`, at least 1 of 2 or more.

    Each class gets its share rounded down, and what is missing to `frac` of the whole goes to the
    largest remainders, so that rounding does not add up over a thousand classes.

    Args:
        available: the most that may be taken of each class.
    """
    if not frac:
        return np.zeros_like(class_sizes)
    share = frac * class_sizes
    counts = np.floor(share).astype(np.int64)
    counts[(counts == 0) & (class_sizes >= 2)] = 1
    missing = round(float(share.sum())) - int(counts.sum())
    if missing > 0:
        remainder = share - counts
        counts[np.argsort(-remainder, kind="stable")[:missing]] += 1
    return np.minimum(counts, available)


def _divide_all(source: Source, val_frac: float, test_frac: float, seed: int) -> Splits:
    whole = source.splits["all"]
    parts = _cut(whole, source, {"test": test_frac, "val": val_frac}, seed)
    val, test = parts.get("val"), parts.get("test")
    return _splits(
        source,
        parts["train"],
        val,
        test,
        origin={
            "train": "what is not held out of the whole",
            "val": _held_out_sentence(val, "the whole", val_frac, seed, "val_frac"),
            "test": _held_out_sentence(test, "the whole", test_frac, seed, "test_frac"),
        },
        held_out=frozenset(parts) - {"train"},
    )


def _divide_train(source: Source, val_frac: float, seed: int) -> Splits:
    train, own_val = source.splits["train"], source.splits.get("val")
    test = source.splits.get("test")
    origin = {"train": "the source's own", "test": "the source's own"}
    held_out: frozenset[str] = frozenset()
    val: Split | None = None
    if own_val is None:
        parts = _cut(train, source, {"val": val_frac}, seed)
        origin["val"] = _held_out_sentence(parts.get("val"), "train", val_frac, seed, "val_frac")
        if "val" in parts:
            train, val, held_out = parts["train"], parts["val"], frozenset({"val"})
            origin["train"] = "the source's own, less what val holds out"
    elif val_frac:
        val, origin["val"] = own_val, "the source's own"
    elif test is None:
        test = Split("test", own_val.images, own_val.labels)
        origin["val"] = "none: data.val_frac is 0, so no checkpoint is chosen by it"
        origin["test"] = "the source's own val, used once, because data.val_frac is 0"
    else:
        origin["val"] = "none: data.val_frac is 0, and the source's own is not used"
    if test is None:
        origin["test"] = "none: the source has none" + (
            ". Figures come from val, which also chooses the checkpoint, and are optimistic"
            if val is not None
            else ", and data.val_frac is 0"
        )
    return _splits(source, train, val, test, origin, held_out)


def _splits(
    source: Source,
    train: Split,
    val: Split | None,
    test: Split | None,
    origin: Mapping[str, str],
    held_out: frozenset[str],
) -> Splits:
    return Splits(
        train=train,
        val=val,
        test=test,
        class_names=source.class_names,
        class_descriptions=source.class_descriptions,
        fingerprint=source.fingerprint,
        origin=dict(origin),
        held_out=held_out,
    )


def _cut(split: Split, source: Source, fracs: Mapping[str, float], seed: int) -> dict[str, Split]:
    """Return "train" and each part whose share is above 0, in the source's order."""
    num_classes = len(source.class_names)
    sizes = np.bincount(split.labels, minlength=num_classes).astype(np.int64)
    left = np.maximum(sizes - 1, 0)  # one image of each class stays in train
    counts = {}
    for name, frac in fracs.items():
        counts[name] = stratified_counts(sizes, frac, left)
        left = left - counts[name]
    chosen: dict[str, list[Labels]] = {name: [] for name in [*fracs, "train"]}
    for label in range(num_classes):
        members = _shuffled(np.flatnonzero(split.labels == label), seed, label)
        start = 0
        for name in fracs:
            end = start + int(counts[name][label])
            chosen[name].append(members[start:end])
            start = end
        chosen["train"].append(members[start:])
    indices = {name: np.sort(np.concatenate(parts)) for name, parts in chosen.items()}
    return {
        name: split.subset(chosen_indices, name)
        for name, chosen_indices in indices.items()
        if len(chosen_indices) or name == "train"
    }


def _shuffled(members: Labels, seed: int, label: int) -> Labels:
    # Raw bits and a stable sort: unlike Generator.permutation, numpy promises that these never
    # change, and an evaluation years later must find the images that training did not see.
    bits = np.random.PCG64(derive_seed("split", seed, label)).random_raw(len(members))
    return members[np.argsort(bits, kind="stable")]


def _held_out_sentence(part: Split | None, of: str, frac: float, seed: int, key: str) -> str:
    if part is not None:
        return f"held out of {of}: {100 * frac:g} %, stratified, seed {seed}"
    return "none: no class has images to spare" if frac else f"none: data.{key} is 0"


def _named(images: Images, broken: Mapping[int, str], most: int) -> list[str]:
    return [f"{images.name(index)}: {reason}" for index, reason in list(broken.items())[:most]]

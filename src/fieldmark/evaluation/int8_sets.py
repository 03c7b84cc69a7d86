"""Three disjoint sets of images for quantization: to calibrate on, select by, and report on."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fieldmark.data.classes import match_classes
from fieldmark.data.held_out import eval_batches
from fieldmark.data.labelled import Source, Split
from fieldmark.data.source import open_source
from fieldmark.errors import DataError, PackageError, UnknownName
from fieldmark.evaluation.splits import pick_split, spread_over
from fieldmark.packaging.entries import ImageSet
from fieldmark.packaging.manifest import Package
from fieldmark.preprocess import Pixels
from fieldmark.runtime.seed import derive_seed

MAX_SELECTION_IMAGES = 1_000
MAX_REPORT_IMAGES = 10_000
_MIN_CALIBRATION_IMAGES = 8
_BATCH_SIZE = 64


@dataclass(frozen=True, slots=True)
class LoadedSet:
    """Images prepared for the model."""

    pixels: Pixels  # uint8 (N, H, W, 3)
    labels: npt.NDArray[np.int64] | None  # (N,), in the model's classes; None: it has other ones
    entry: ImageSet


@dataclass(frozen=True, slots=True)
class Int8Sets:
    """The three sets; images of the report are not opened here."""

    calibration: LoadedSet
    selection: LoadedSet
    report_data: str  # as `verify` takes it: empty for the source that the package records
    report_split: str


def choose_sets(
    package: Package,
    *,
    data: str,
    split: str,
    calib: str,
    columns: Mapping[str, str],
    num_images: int,
    seed: int,
) -> Int8Sets:
    """Return the sets of a quantization.

    The report is on `data` (default: what the package was trained on; its test split, else val).
    Calibration images are drawn from `calib`, default the training images. Selection is by val
    where that is not what the report is on, else by images beside those of the calibration.

    Args:
        columns: image_column and label_column of `data`.
        num_images: of the calibration; at most half of what there is.

    Raises:
        PackageError: the package records no images, and none were named.
        DataError: too few images, or the sets would not be disjoint.
    """
    training = package.manifest.training or {}
    own = str(training.get("source", ""))
    if not own and not (data and calib):
        raise PackageError(
            f"{package.path} records no images to quantize with. Name images to report on with "
            "--data SOURCE, and others to calibrate on with --calib SOURCE."
        )
    if data and data != own:
        report_source = open_source(data, **columns)
    else:
        report_source = _own_source(own, training)
    report = pick_split(report_source, split, training=training or None)
    source = open_source(calib) if calib else _own_source(own, training)
    pool = pick_split(
        source, "auto", training=training or None, order=("train", "all", "val", "test")
    )
    _check_disjoint(source, pool, report_source, report)
    pool = _unbroken(pool, training)
    order = np.random.default_rng(derive_seed(seed, "int8")).permutation(len(pool))
    count = min(num_images, len(pool) // 2)
    if count < _MIN_CALIBRATION_IMAGES:
        raise DataError(
            f"{pool.name} of {source.spec} must have at least {2 * _MIN_CALIBRATION_IMAGES} "
            f"images, half to calibrate on and half to select by. Got {len(pool)}. "
            "Name more with --calib SOURCE."
        )
    held_out = None if calib else _val(source, training)
    same_split = held_out is not None and (source.fingerprint, held_out.name) == (
        report_source.fingerprint,
        report.name,
    )
    if held_out is None or same_split:
        selection = pool.subset(order[count:][:MAX_SELECTION_IMAGES], f"{pool.name} (the rest)")
    else:
        selection = spread_over(held_out, MAX_SELECTION_IMAGES)
    return Int8Sets(
        calibration=_load(package, source, pool.subset(order[:count], pool.name), seed),
        selection=_load(package, source, selection, seed),
        report_data=data,
        report_split=report.name,
    )


def _own_source(own: str, training: Mapping[str, Any]) -> Source:
    columns = {name: str(training.get(name, "")) for name in ("image_column", "label_column")}
    source = open_source(own, **columns)
    if source.fingerprint != training.get("fingerprint"):
        raise DataError(
            f"{own} must be what the model was trained on. Its fingerprint changed. "
            "Name images with --data and --calib."
        )
    return source


def _val(source: Source, training: Mapping[str, Any]) -> Split | None:
    try:
        return pick_split(source, "val", training=training)
    except UnknownName:
        return None


def _check_disjoint(source: Source, pool: Split, report_source: Source, report: Split) -> None:
    same_source = source.fingerprint == report_source.fingerprint
    if same_source and (pool.name == report.name or "all" in (pool.name, report.name)):
        raise DataError(
            f"images to calibrate on must not be those of the report. Got {pool.name} and "
            f"{report.name} of {source.spec}. Name others with --calib or --split."
        )


def _unbroken(split: Split, training: Mapping[str, Any]) -> Split:
    """Leave out the images that training found broken, which are known by name."""
    broken = {str(name) for name, _ in training.get("broken", ())}
    if not broken:
        return split
    kept = [index for index in range(len(split)) if split.images.name(index) not in broken]
    return split.subset(np.array(kept), split.name)


def _load(package: Package, source: Source, split: Split, seed: int) -> LoadedSet:
    batches = [images for images, _ in eval_batches(split, package.preprocess, _BATCH_SIZE)]
    pixels = np.concatenate(batches)
    try:
        to_model = match_classes(
            source.class_names, package.class_names, package.class_descriptions
        )
        labels = to_model[split.labels]
    except DataError:  # calibration needs no labels, and selection has the float32 answers
        labels = None
    entry = ImageSet(
        data=f"{source.spec}, {split.name}",
        num_images=len(split),
        seed=seed,
        sha256=hashlib.sha256(pixels.tobytes()).hexdigest(),
    )
    return LoadedSet(pixels, labels, entry)

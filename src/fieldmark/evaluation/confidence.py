"""The temperature of a package: fitted on images that training held out, and what it mends."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fieldmark.data.labelled import Source, Split
from fieldmark.errors import DataError
from fieldmark.evaluation.parity import open_images, open_source_of
from fieldmark.evaluation.splits import pick_split, spread_over
from fieldmark.measure import fit_temperature, measure_calibration, nll_change
from fieldmark.packaging.entries import CalibrationEntry, Confidence, Measured
from fieldmark.packaging.manifest import WEIGHTS, Package, open_package
from fieldmark.packaging.write import record_confidence
from fieldmark.runtime.log import say, track, warn

Logits = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

# The fitted temperature then scatters by about a tenth; with 30 images by a fifth, and a model
# that was calibrated before comes out worse (simulated, 76 % accuracy).
MIN_IMAGES = 100


def fit_confidence(logits: Logits, labels: Labels, *, data: str, fingerprint: str) -> Confidence:
    """Return the temperature of logits (N, K), with NLL, ECE and bins before and after.

    Args:
        data: which images, in words.
        fingerprint: of the source that they are of.

    Raises:
        DataError: fewer than MIN_IMAGES, or no temperature within the bounds is the best.
    """
    n = len(labels)
    if n < MIN_IMAGES:
        raise DataError(too_few(n, data))
    if not np.isfinite(logits).all():
        raise DataError(
            f"logits must be finite to calibrate confidence. Got NaN or infinity on {data}. "
            "Check the weights."
        )
    fit = fit_temperature(logits, labels)
    found = fit.temperature
    if fit.bound is not None:
        mistakes = int((logits.argmax(axis=1) != labels).sum())
        raise DataError(
            f"images must hold right and wrong answers to calibrate confidence. Got {mistakes} "
            f"mistakes in {n}, so the best temperature lies beyond the bound of {found.value:g} "
            f"({data}). Use more, or harder, images: fieldmark calibrate PACKAGE --data SOURCE."
        )
    change = nll_change(logits, labels, 1.0, found.value)
    return Confidence(
        temperature=found.value,
        low=found.low,
        high=found.high,
        data=data,
        num_images=n,
        fingerprint=fingerprint,
        before=_entry(logits, labels, 1.0),
        after=_entry(logits, labels, found.value),
        nll_change=Measured.model_validate(change.to_json()),
    )


def calibrate_package(
    folder: Path, *, data: str, columns: Mapping[str, str], split: str, max_images: int
) -> tuple[Package, dict[str, Any]]:
    """Fit the temperature of a package's trained model and record it; return what was found.

    Raises:
        DataError: the images cannot be read, are too few, or were the package's test images
            without being asked for.
    """
    package = open_package(folder)
    package.check_files()
    training = package.manifest.training or {}
    source = open_source_of(package, data, columns)
    chosen = spread_over(_choose(package, source, split), max_images)
    notes = _notes(training, source, chosen)
    for note in notes:
        warn(note)
    images = open_images(package, source, chosen)
    if len(chosen) < MIN_IMAGES:
        raise DataError(too_few(len(chosen), images.words))
    say(f"calibrating {package.manifest.name} on {images.words}")
    logits, labels = [], []
    for batch, batch_labels in track(images.batches(), "calibrating", images.num_batches):
        logits.append(images.reference(batch))
        labels.append(batch_labels)
    confidence = fit_confidence(
        np.concatenate(logits),
        np.concatenate(labels),
        data=images.words,
        fingerprint=source.fingerprint,
    )
    weights = package.manifest.files[WEIGHTS].sha256
    changed = record_confidence(folder, confidence, weights_sha256=weights)
    facts = {"package_id": changed.id, "split": chosen.name, "notes": notes}
    return changed, facts | {"confidence": confidence.model_dump(mode="json")}


def too_few(n: int, data: str) -> str:
    """Return the sentence about so few images."""
    return (
        f"images must be at least {MIN_IMAGES} to calibrate confidence. Got {n} ({data}). "
        "Name more: fieldmark calibrate PACKAGE --data SOURCE."
    )


def _choose(package: Package, source: Source, wanted: str) -> Split:
    """The split that is asked for; else val, and of the model's own source nothing but val."""
    training = package.manifest.training
    chosen = pick_split(source, wanted, training=training, order=("val", "test", "all", "train"))
    if wanted == "auto" and _is_own(training, source) and chosen.name != "val":
        raise DataError(
            f"{source.spec} must have held-out validation images, because its test images are "
            "measured once and not fitted on. The model was trained without any (data.val_frac "
            f"is {(training or {}).get('val_frac')}). Name other images with --data, or --split."
        )
    return chosen


def _notes(training: Mapping[str, Any], source: Source, chosen: Split) -> list[str]:
    """What is doubtful about images that were named."""
    if not _is_own(training, source):
        return []
    if chosen.name == "test":
        return ["fitted on the test images: their calibration figures are no test any more."]
    if chosen.name != "val":
        return [
            f"fitted on images that the model was trained on ({chosen.name}), of which it is "
            "surer than of others: expect a temperature that is too low."
        ]
    return []


def _is_own(training: Mapping[str, Any] | None, source: Source) -> bool:
    return training is not None and training.get("fingerprint") == source.fingerprint


def _entry(logits: Logits, labels: Labels, temperature: float) -> CalibrationEntry:
    found = measure_calibration(logits, labels, temperature)
    return CalibrationEntry.model_validate(
        {
            "nll": found.nll.to_json(),
            "ece": found.ece.to_json(),
            "bins": [one.to_json() for one in found.bins],
        }
    )

"""Whether a variant still gives the answers of the eager model: the gate before deployment."""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fieldmark.errors import UnknownName
from fieldmark.measure import (
    Agreement,
    Predict,
    compare_logits,
    ece_increase,
    measure_calibration,
    score,
)
from fieldmark.packaging.entries import GoldenCheck, Parity, Variant
from fieldmark.packaging.golden import check_golden
from fieldmark.packaging.manifest import Package
from fieldmark.packaging.write import record_parity
from fieldmark.runtime.cpu import instruction_set

Batches = Iterable[tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]]
_Compared = tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """What a verification measured now, and what it means together with what was known."""

    package: Package  # with the measurements recorded
    variant: str
    golden: GoldenCheck
    parity: Parity | None  # measured now; None when only golden samples ran
    earlier_parity: Parity | None  # what the package keeps when it was not measured now

    @property
    def passed(self) -> bool:
        """Whether all that was measured now is within its limits."""
        return not self.problems()

    @property
    def deployable(self) -> bool:
        """Whether the variant may be deployed, earlier measurements included."""
        return self.package.manifest.variants[self.variant].deployable

    def problems(self) -> list[str]:
        """Return a sentence for each limit that was missed now."""
        found = self.golden.problems()
        if self.parity is None:
            return found
        return found + self.package.manifest.variants[self.variant].parity_problems(self.parity)

    def notes(self) -> list[str]:
        """Return what a reader of the result should not overlook."""
        if self.parity is not None:
            return []
        if self.earlier_parity is None:
            return ["Parity was not measured: only golden samples ran, and no image was compared."]
        earlier = self.earlier_parity
        found = [
            f"Parity was not measured again: only golden samples ran. The package keeps the "
            f"earlier result on {earlier.top1_agreement.n} images ({earlier.data})."
        ]
        then, now = earlier.temperature or 1.0, self.package.temperature
        if earlier.nll is not None and then != now:
            found.append(
                f"Its calibration error was measured at temperature {then:.3f}, which is "
                f"{now:.3f} now."
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """Return plain values; rates are {"value", "low", "high", "n"}, fractions."""
        entry = self.package.manifest.variants[self.variant]
        return {
            "package": str(self.package.path),
            "package_id": self.package.id,
            "variant": self.variant,
            "file": entry.file,
            "bytes": self.package.num_bytes(entry),
            "passed": self.passed,
            "deployable": self.deployable,
            "golden": self.golden.model_dump(mode="json") | {"passed": self.golden.passed},
            "parity": _dump(self.parity),
            "parity_measured": self.parity is not None,
            "earlier_parity": _dump(self.earlier_parity),
            "problems": self.problems(),
            "obstacles": entry.obstacles(),
            "notes": self.notes(),
        }


def verify_variant(
    package: Package,
    variant_name: str,
    variant: Predict,
    reference: Predict | None = None,
    batches: Batches | None = None,
    data: str = "",
) -> VerifyResult:
    """Run golden samples, then real images where given, and record what was measured.

    Args:
        variant: the variant, opened.
        reference: the eager model; needed with `batches`.
        batches: real images and their labels, prepared by the package's preprocessing.
        data: which images they are, in words, such as "validation split of cifar10".

    Raises:
        PackageError: the package cannot be written, or the variant was changed meanwhile.
        UnknownName: the package has no such variant.
    """
    entry = package.manifest.variants.get(variant_name)
    if entry is None:
        raise UnknownName.among(
            f"variant of {package.path}", variant_name, package.manifest.variants
        )
    # Without images, an int8 variant must come as near as where it was last compared on some.
    recorded = entry.golden if batches is None else None
    golden = check_golden(package, variant, entry.precision, recorded)
    parity = None
    if batches is not None:
        if reference is None:
            raise ValueError("reference must be given with batches: parity compares two models.")
        digest = hashlib.sha256()
        compared = _run_both(reference, variant, _noted(batches, digest))
        if compared is not None:
            agreement = compare_logits(*compared)
            confidence = _confidence(package, *compared)
            about = {"data": data, "images_sha256": digest.hexdigest()}
            parity = _parity(agreement, confidence | about)
    written = package
    if not _is_of_this_processor(entry, golden, parity):
        written = record_parity(
            package.path, variant_name, file=entry.file, golden=golden, parity=parity
        )
    return VerifyResult(
        package=written,
        variant=variant_name,
        golden=golden,
        parity=parity,
        earlier_parity=entry.parity if parity is None else None,
    )


def _is_of_this_processor(entry: Variant, golden: GoldenCheck, parity: Parity | None) -> bool:
    """Whether int8 is farther off here than where it was verified: no fact of the package."""
    known = entry.golden is not None and entry.golden.passed
    return entry.precision != "float32" and parity is None and known and not golden.passed


def _run_both(reference: Predict, variant: Predict, batches: Batches) -> _Compared | None:
    """Return the logits (N, K) of both, and labels (N,), or None when there is no image."""
    references, variants, labels = [], [], []
    for images, batch_labels in batches:
        if len(images):
            references.append(reference(images))
            variants.append(variant(images))
            labels.append(batch_labels)
    if not references:
        return None
    return np.concatenate(references), np.concatenate(variants), np.concatenate(labels)


def _confidence(
    package: Package,
    reference: npt.NDArray[np.float32],
    variant: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64],
) -> dict[str, Any]:
    """Return accuracy, calibration error and NLL of both, at the package's temperature."""
    finite = bool(np.isfinite(reference).all() and np.isfinite(variant).all())
    if not finite:
        return {}
    temperature = package.temperature
    before, after = (
        measure_calibration(logits, labels, temperature) for logits in (reference, variant)
    )
    is_calibrated = package.manifest.confidence is not None
    return {
        "reference_accuracy": score(reference, labels).top1_accuracy.to_json(),
        "accuracy": score(variant, labels).top1_accuracy.to_json(),
        "temperature": temperature if is_calibrated else None,
        "reference_ece": before.ece.to_json(),
        "ece": after.ece.to_json(),
        "ece_increase": ece_increase(reference, variant, labels, temperature).to_json(),
        "reference_nll": before.nll.to_json(),
        "nll": after.nll.to_json(),
    }


def _noted(batches: Batches, digest: "hashlib._Hash") -> Batches:
    """Yield the batches, their pixels added to the digest."""
    for images, labels in batches:
        digest.update(images.tobytes())
        yield images, labels


def _parity(agreement: Agreement, more: dict[str, Any]) -> Parity:
    values = agreement.to_json() | more
    for key in ("max_abs_delta_logit", "mean_abs_delta_logit"):
        if not math.isfinite(values[key]):
            values[key] = None  # JSON has no infinity
    return Parity.model_validate({**values, "instruction_set": instruction_set()})


def _dump(parity: Parity | None) -> dict[str, Any] | None:
    return None if parity is None else parity.model_dump(mode="json")

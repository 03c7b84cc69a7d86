"""Whether a variant still gives the answers of the eager model: the gate before deployment."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fieldmark.errors import UnknownName
from fieldmark.measure import Agreement, Predict, compare_logits
from fieldmark.packaging.entries import GoldenCheck, Parity, Precision
from fieldmark.packaging.golden import check_golden
from fieldmark.packaging.manifest import Package
from fieldmark.packaging.write import record_parity
from fieldmark.runtime.cpu import instruction_set

Batches = Iterable[tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]]


@dataclass(frozen=True, slots=True)
class VerifyResult:
    """What a verification measured now, and what it means together with what was known."""

    package: Package  # with the measurements recorded
    variant: str
    precision: Precision
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
        return found if self.parity is None else found + self.parity.problems(self.precision)

    def notes(self) -> list[str]:
        """Return what a reader of the result should not overlook."""
        if self.parity is not None:
            return []
        if self.earlier_parity is None:
            return ["Parity was not measured: only golden samples ran, and no image was compared."]
        n = self.earlier_parity.top1_agreement.n
        return [
            f"Parity was not measured again: only golden samples ran. "
            f"The package keeps the earlier result on {n} images ({self.earlier_parity.data})."
        ]

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
    golden = check_golden(package, variant, entry.precision)
    parity = None
    if batches is not None:
        if reference is None:
            raise ValueError("reference must be given with batches: parity compares two models.")
        agreement = _compare(reference, variant, batches)
        parity = None if agreement is None else _parity(agreement, data)
    written = record_parity(
        package.path, variant_name, file=entry.file, golden=golden, parity=parity
    )
    return VerifyResult(
        package=written,
        variant=variant_name,
        precision=entry.precision,
        golden=golden,
        parity=parity,
        earlier_parity=entry.parity if parity is None else None,
    )


def _compare(reference: Predict, variant: Predict, batches: Batches) -> Agreement | None:
    """Return the agreement over all batches, or None when there is no image."""
    references, variants, labels = [], [], []
    for images, batch_labels in batches:
        if len(images):
            references.append(reference(images))
            variants.append(variant(images))
            labels.append(batch_labels)
    if not references:
        return None
    return compare_logits(
        np.concatenate(references), np.concatenate(variants), np.concatenate(labels)
    )


def _parity(agreement: Agreement, data: str) -> Parity:
    values = agreement.to_json()
    for key in ("max_abs_delta_logit", "mean_abs_delta_logit"):
        if not math.isfinite(values[key]):
            values[key] = None  # JSON has no infinity
    return Parity.model_validate({**values, "data": data, "instruction_set": instruction_set()})


def _dump(parity: Parity | None) -> dict[str, Any] | None:
    return None if parity is None else parity.model_dump(mode="json")

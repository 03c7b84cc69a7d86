"""How far one model's answers are from another's on the same images."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fieldmark.measure.rates import Rate, paired_difference, wilson


@dataclass(frozen=True, slots=True)
class Agreement:
    """Two models on the same images: the reference, and a variant of it."""

    top1_agreement: Rate
    max_abs_delta_logit: float
    mean_abs_delta_logit: float
    accuracy_drop: tuple[float, float, float] | None  # value, low, high; None without labels

    def to_json(self) -> dict[str, Any]:
        """Return plain values; the drop is reference minus variant, as a fraction."""
        result: dict[str, Any] = {
            "top1_agreement": self.top1_agreement.to_json(),
            "max_abs_delta_logit": self.max_abs_delta_logit,
            "mean_abs_delta_logit": self.mean_abs_delta_logit,
        }
        if self.accuracy_drop is not None:
            value, low, high = self.accuracy_drop
            n = self.top1_agreement.n
            result["accuracy_drop"] = {"value": value, "low": low, "high": high, "n": n}
        return result


def compare_logits(
    reference: npt.NDArray[np.float32],
    variant: npt.NDArray[np.float32],
    labels: npt.NDArray[np.int64] | None = None,
) -> Agreement:
    """Compare logits (N, K) of a variant with those of the reference, row by row.

    A NaN or infinity in the variant counts as a disagreement and an infinite delta.
    """
    if reference.shape != variant.shape or len(reference) == 0:
        raise ValueError(
            f"both must have the same shape (N, K), N > 0. "
            f"Got {reference.shape} and {variant.shape}."
        )
    finite = np.isfinite(variant).all(axis=1)
    same = (reference.argmax(axis=1) == variant.argmax(axis=1)) & finite
    with np.errstate(invalid="ignore"):
        delta = np.abs(reference.astype(np.float64) - variant.astype(np.float64))
    delta = np.where(np.isfinite(delta), delta, np.inf)
    drop = None
    if labels is not None:
        hits_reference = reference.argmax(axis=1) == labels
        hits_variant = (variant.argmax(axis=1) == labels) & finite
        drop = paired_difference(hits_reference, hits_variant)
    return Agreement(
        top1_agreement=wilson(int(same.sum()), len(same)),
        max_abs_delta_logit=float(delta.max()),
        mean_abs_delta_logit=float(delta.mean()),
        accuracy_drop=drop,
    )

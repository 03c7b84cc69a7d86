"""Scores of logits against labels."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fieldmark.measure.rates import Z95, Rate, wilson

Logits = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]


def log_softmax(
    logits: npt.NDArray[np.floating[Any]], temperature: float = 1.0
) -> npt.NDArray[np.float64]:
    """Return log probabilities (N, K), float64, of logits divided by `temperature`."""
    z = logits.astype(np.float64)
    z /= temperature
    z -= z.max(axis=-1, keepdims=True)
    z -= np.log(np.exp(z).sum(axis=-1, keepdims=True))
    return z


def softmax(
    logits: npt.NDArray[np.floating[Any]], temperature: float = 1.0
) -> npt.NDArray[np.float64]:
    """Return probabilities (N, K), float64, rows summing to 1, of logits / `temperature`."""
    return np.exp(log_softmax(logits, temperature))


def largest(logits: npt.NDArray[np.floating[Any]], k: int | None) -> npt.NDArray[np.int64]:
    """Return for each row of finite logits (N, K) the indices of its k largest, (N, k).

    The largest comes first, and of equal ones the first; None: all of them. Only what is shown is
    sorted.
    """
    num_rows, num_classes = logits.shape
    if k == 1 and num_rows:
        return np.asarray(np.argmax(logits, axis=1, keepdims=True))
    if k is None or k >= num_classes or not num_rows:
        return np.argsort(-logits, axis=1, kind="stable")[:, :k]
    found = []
    for row, least in zip(logits, np.partition(logits, -k, axis=1)[:, -k], strict=True):
        candidates = np.flatnonzero(row >= least)
        found.append(candidates[np.argsort(-row[candidates], kind="stable")[:k]])
    return np.stack(found)


def top_k_hits(logits: Logits, labels: Labels, k: int) -> npt.NDArray[np.bool_]:
    """Return for each row whether its label is among the k largest logits, bool (N,).

    Equal logits count as ranked before the label, so a constant output earns nothing by order;
    a NaN at the label is a miss.
    """
    rows = np.arange(len(labels))
    at_label = logits[rows, labels][:, None]
    better_or_equal = (~(logits < at_label)).sum(axis=1) - 1  # itself is never below itself
    return np.asarray((better_or_equal < k) & ~np.isnan(at_label[:, 0]))


@dataclass(frozen=True, slots=True)
class Scores:
    """What an evaluation counted. Arrays index classes in the order of the model's outputs."""

    top1_accuracy: Rate
    top5_accuracy: Rate | None  # None with five classes or fewer: it would always be 1
    loss: float  # mean cross-entropy in nats
    per_class_accuracy: dict[int, Rate]  # recall of each class that has examples
    confusion: npt.NDArray[np.int64]  # (K, K): rows are labels, columns predictions

    @property
    def balanced_accuracy(self) -> Rate:
        """Mean recall over the classes that have examples, with its 95 % interval.

        The classes' variances are added, each taken with two successes and two failures more
        (Agresti and Coull 1998), because a recall of 1 from few examples is not certain.
        """
        rates = list(self.per_class_accuracy.values())
        value = float(np.mean([rate.value for rate in rates]))
        adjusted = [(rate.value * rate.n + 2) / (rate.n + 4) for rate in rates]
        variance = sum(p * (1 - p) / (r.n + 4) for p, r in zip(adjusted, rates, strict=True))
        half = Z95 * math.sqrt(variance) / len(rates)
        n = self.top1_accuracy.n
        return Rate(value, max(0.0, value - half), min(1.0, value + half), n)

    def to_json(self, class_names: list[str]) -> dict[str, Any]:
        """Return plain values for metrics.json; classes by name."""
        result: dict[str, Any] = {"top1_accuracy": self.top1_accuracy.to_json()}
        if self.top5_accuracy is not None:
            result["top5_accuracy"] = self.top5_accuracy.to_json()
        present = sorted(self.per_class_accuracy)
        rows, columns = np.nonzero(self.confusion)
        return result | {
            "loss": self.loss,
            "balanced_accuracy": self.balanced_accuracy.to_json(),
            "num_examples": self.top1_accuracy.n,
            "per_class_accuracy": {
                class_names[k]: self.per_class_accuracy[k].to_json() for k in present
            },
            "confusion": [
                {
                    "label": class_names[i],
                    "predicted": class_names[j],
                    "count": int(self.confusion[i, j]),
                }
                for i, j in zip(rows.tolist(), columns.tolist(), strict=True)
            ],
        }


def score(logits: Logits, labels: Labels) -> Scores:
    """Return the scores of logits (N, K) against labels (N,) in [0, K).

    Predictions are the argmax over all outputs, never masked to the classes present.

    Raises:
        ValueError: shapes that do not fit, a label outside the outputs, or no example.
    """
    if logits.ndim != 2 or labels.shape != (len(logits),) or len(logits) == 0:
        raise ValueError(
            f"logits (N, K) and labels (N,) with N > 0. Got {logits.shape} and {labels.shape}."
        )
    num_classes = logits.shape[1]
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels must be in [0, {num_classes}). Got {labels.min()} to {labels.max()}."
        )
    predicted = logits.argmax(axis=1)
    confusion = np.bincount(
        labels * num_classes + predicted, minlength=num_classes * num_classes
    ).reshape(num_classes, num_classes)
    totals = confusion.sum(axis=1)
    per_class = {
        int(k): wilson(int(confusion[k, k]), int(totals[k])) for k in np.flatnonzero(totals)
    }
    n = len(labels)
    top1 = wilson(int((predicted == labels).sum()), n)
    top5 = wilson(int(top_k_hits(logits, labels, 5).sum()), n) if num_classes > 5 else None
    rows = np.arange(n)
    loss = float(-log_softmax(logits)[rows, labels].mean())
    return Scores(top1, top5, loss, per_class, confusion)

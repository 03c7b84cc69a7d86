"""Whether a probability means what it says: calibration error, and the temperature that mends it.

A temperature T divides all logits before softmax. It changes no answer, only how sure it sounds.
Source: Guo et al. 2017, "On calibration of modern neural networks", arXiv:1706.04599.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fieldmark.measure.rates import Z95, Rate, wilson
from fieldmark.measure.scores import Labels, log_softmax

Floats = npt.NDArray[np.float64]

NUM_BINS = 15  # as in the paper
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
_NUM_RESAMPLES = 1000
_BLOCK = 4096  # rows held in float64 at a time
_MAX_ITERATIONS = 100
_TOLERANCE = 1e-10  # of 1 / T, relative


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % interval and the number of images."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float | int]:
        """Return {"value", "low", "high", "n"}."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


@dataclass(frozen=True, slots=True)
class Bin:
    """The images whose top probability is in (low, high]."""

    low: float
    high: float
    count: int
    mean_confidence: float | None  # None: no images
    accuracy: Rate | None  # None: no images

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "low": self.low,
            "high": self.high,
            "count": self.count,
            "mean_confidence": self.mean_confidence,
            "accuracy": None if self.accuracy is None else self.accuracy.to_json(),
        }


@dataclass(frozen=True, slots=True)
class Calibration:
    """How well probabilities fit what happened."""

    nll: Estimate  # negative log likelihood, mean over images, in nats
    ece: Estimate
    bins: tuple[Bin, ...]


@dataclass(frozen=True, slots=True)
class TemperatureFit:
    """The temperature of the least negative log likelihood."""

    temperature: Estimate
    bound: Literal["lower", "upper"] | None  # hit: the best temperature lies beyond it


def reliability(probs: Floats, labels: Labels, num_bins: int = NUM_BINS) -> tuple[Bin, ...]:
    """Return bins of equal width over the top probability: how sure, and how often right.

    Args:
        probs: (N, K), rows summing to 1.
        labels: (N,) in [0, K).
    """
    sure, right = _top(probs, labels)
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    index = _bin_index(sure, num_bins)
    counts = np.bincount(index, minlength=num_bins)
    sums = np.bincount(index, weights=sure, minlength=num_bins)
    hits = np.bincount(index, weights=right, minlength=num_bins)
    return tuple(
        Bin(
            low=float(edges[b]),
            high=float(edges[b + 1]),
            count=int(counts[b]),
            mean_confidence=float(sums[b] / counts[b]) if counts[b] else None,
            accuracy=wilson(int(hits[b]), int(counts[b])) if counts[b] else None,
        )
        for b in range(num_bins)
    )


def ece(probs: Floats, labels: Labels, num_bins: int = NUM_BINS) -> float:
    """Return the expected calibration error of the top class, 0 to 1.

    It is the mean over images of |accuracy - mean confidence| of their bin. Of a perfectly
    calibrated model it is above 0 too, the more so the fewer images there are.
    """
    sure, right = _top(probs, labels)
    return _ece(_bin_index(sure, num_bins), right - sure, num_bins)


def nll(logits: npt.NDArray[Any], labels: Labels, temperature: float = 1.0) -> Estimate:
    """Return the mean negative log likelihood in nats, with the interval of a mean."""
    rows = np.arange(len(labels))
    found = _mean(-log_softmax(logits, temperature)[rows, labels])
    return Estimate(found.value, max(0.0, found.low), found.high, found.n)


def measure_calibration(
    logits: npt.NDArray[Any], labels: Labels, temperature: float = 1.0
) -> Calibration:
    """Return NLL, ECE and bins of logits (N, K) at a temperature.

    The interval of the ECE is a bootstrap one, reflected, because resampling adds to the error
    what sampling has added once. Its low end is 0 where a perfectly calibrated model would often
    show as much. In simulations of 200 to 4,000 images it held the truth 82 to 98 % of the time.
    """
    probs = np.exp(log_softmax(logits, temperature))
    measured = _measure_ece(probs, labels)
    return Calibration(
        nll(logits, labels, temperature), measured.estimate, reliability(probs, labels)
    )


def ece_increase(
    reference: npt.NDArray[Any],
    variant: npt.NDArray[Any],
    labels: Labels,
    temperature: float = 1.0,
) -> Estimate:
    """Return ECE(variant) - ECE(reference) of logits (N, K) on the same images.

    The interval joins those of both with their correlation over the same resamples.
    Source: Zou 2007, Psychological Methods 12:399 (there of two correlations).
    """
    a, b = (
        _measure_ece(np.exp(log_softmax(logits, temperature)), labels)
        for logits in (reference, variant)
    )
    correlation = 0.0
    if a.resampled.std() > 0 and b.resampled.std() > 0:
        correlation = max(0.0, float(np.corrcoef(a.resampled, b.resampled)[0, 1]))
    first, second = a.estimate, b.estimate
    difference = second.value - first.value
    low = _joined(second.value - second.low, first.high - first.value, correlation)
    high = _joined(second.high - second.value, first.value - first.low, correlation)
    return Estimate(difference, difference - low, difference + high, len(labels))


def nll_change(logits: npt.NDArray[Any], labels: Labels, before: float, after: float) -> Estimate:
    """Return NLL at temperature `after` minus NLL at `before`, with the interval of the pairs."""
    rows = np.arange(len(labels))
    losses = [-log_softmax(logits, t)[rows, labels] for t in (before, after)]
    return _mean(losses[1] - losses[0])


def fit_temperature(logits: npt.NDArray[Any], labels: Labels) -> TemperatureFit:
    """Return the temperature within [0.05, 20] at which logits (N, K) have the least NLL.

    NLL is convex in 1 / T, so that its slope has one zero: Newton steps go to it, and where one
    leaves the bracket, the middle is taken. Without a mistake in the images there is no zero (the
    surer the better), and with answers that are worse than chance the other bound is hit.

    Raises:
        ValueError: no image, shapes that do not fit, or logits that are not finite.
    """
    if logits.ndim != 2 or labels.shape != (len(logits),) or len(logits) == 0:
        raise ValueError(
            f"logits (N, K) and labels (N,) with N > 0. Got {logits.shape} and {labels.shape}."
        )
    if not np.isfinite(logits).all():
        raise ValueError("logits must be finite. Got NaN or infinity.")
    n = len(labels)
    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    at_low, at_high = _slopes(logits, labels, low).mean, _slopes(logits, labels, high).mean
    if at_low >= 0 and at_high <= 0:  # logits say nothing: every temperature is as good
        return TemperatureFit(Estimate(1.0, MIN_TEMPERATURE, MAX_TEMPERATURE, n), None)
    if at_low >= 0:
        return TemperatureFit(_at(MAX_TEMPERATURE, n), "upper")
    if at_high <= 0:
        return TemperatureFit(_at(MIN_TEMPERATURE, n), "lower")
    beta = 1.0
    for _ in range(_MAX_ITERATIONS):
        found = _slopes(logits, labels, beta)
        low, high = (beta, high) if found.mean < 0 else (low, beta)
        newton = beta - found.mean / found.curvature if found.curvature > 0 else low
        following = newton if low < newton < high else (low + high) / 2
        if abs(following - beta) <= _TOLERANCE * beta:
            break
        beta = following
    found = _slopes(logits, labels, beta)
    # The estimate's variance with or without the model being right: sandwich of the likelihood.
    error = Z95 * found.deviation / (n**0.5 * found.curvature * beta)
    spread = float(np.exp(min(error, np.log(MAX_TEMPERATURE / MIN_TEMPERATURE))))
    value = 1 / beta
    ends = max(MIN_TEMPERATURE, value / spread), min(MAX_TEMPERATURE, value * spread)
    return TemperatureFit(Estimate(value, *ends, n), None)


@dataclass(frozen=True, slots=True)
class _Slopes:
    """Derivatives of the NLL by 1 / T."""

    mean: float
    deviation: float  # of the first derivative, over images
    curvature: float


@dataclass(frozen=True, slots=True)
class _MeasuredEce:
    estimate: Estimate
    resampled: Floats  # (_NUM_RESAMPLES,); the same images in each place for the same N


def _slopes(logits: npt.NDArray[Any], labels: Labels, beta: float) -> _Slopes:
    first, curvature = [], 0.0
    for start in range(0, len(labels), _BLOCK):
        z = logits[start : start + _BLOCK].astype(np.float64)
        z -= z.max(axis=1, keepdims=True)
        at_label = z[np.arange(len(z)), labels[start : start + _BLOCK]]
        probs = np.exp(log_softmax(z, 1 / beta))
        mean = (probs * z).sum(axis=1)
        first.append(mean - at_label)
        curvature += float((probs * (z - mean[:, None]) ** 2).sum())
    slopes = np.concatenate(first)
    return _Slopes(float(slopes.mean()), float(slopes.std()), curvature / len(labels))


def _measure_ece(probs: Floats, labels: Labels) -> _MeasuredEce:
    sure, right = _top(probs, labels)
    index, gaps, n = _bin_index(sure, NUM_BINS), right - sure, len(labels)
    value = _ece(index, gaps, NUM_BINS)
    rng = np.random.default_rng(0)
    resampled, by_chance = np.empty(_NUM_RESAMPLES), np.empty(_NUM_RESAMPLES)
    for row in range(_NUM_RESAMPLES):
        times = np.bincount(rng.integers(0, n, n), minlength=n)
        resampled[row] = _ece(index, times * gaps, NUM_BINS)
        by_chance[row] = _ece(index, (rng.random(n) < sure) - sure, NUM_BINS)
    below, above = np.quantile(resampled, (0.025, 0.975))
    low, high = max(0.0, 2 * value - float(above)), min(1.0, 2 * value - float(below))
    if value <= np.quantile(by_chance, 0.975):
        low = 0.0
    return _MeasuredEce(Estimate(value, min(low, value), max(high, value), n), resampled)


def _ece(index: npt.NDArray[np.int64], gaps: Floats, num_bins: int) -> float:
    return float(np.abs(np.bincount(index, weights=gaps, minlength=num_bins)).sum() / len(gaps))


def _top(probs: Floats, labels: Labels) -> tuple[Floats, Floats]:
    """Return each image's top probability, and 1.0 where that class is its label."""
    return probs.max(axis=1), (probs.argmax(axis=1) == labels).astype(np.float64)


def _bin_index(sure: Floats, num_bins: int) -> npt.NDArray[np.int64]:
    edges = np.linspace(0.0, 1.0, num_bins + 1)
    index = np.searchsorted(edges, sure, side="left") - 1  # (low, high]
    return np.asarray(index.clip(0, num_bins - 1), dtype=np.int64)


def _mean(values: Floats) -> Estimate:
    n = len(values)
    value, half = float(values.mean()), Z95 * float(values.std()) / n**0.5
    return Estimate(value, value - half, value + half, n)


def _joined(of_one: float, of_other: float, correlation: float) -> float:
    square = of_one**2 - 2 * correlation * of_one * of_other + of_other**2
    return float(max(0.0, square) ** 0.5)


def _at(bound: float, n: int) -> Estimate:
    return Estimate(bound, bound, bound, n)

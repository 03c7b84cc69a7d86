"""Times of repeated calls: quantiles, and ratios of two that ran side by side. numpy only."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

TAIL = 0.025  # of each side of a 95 % interval
MIN_CALLS_FOR_P99 = 100  # below, the 99th percentile is the slowest call under another name


@dataclass(frozen=True, slots=True)
class Quantile:
    """A quantile with its 95 % interval; an end is None where n is too small to bound it."""

    value: float
    low: float | None
    high: float | None
    n: int

    def to_json(self) -> dict[str, float | int | None]:
        """Return {"value", "low", "high", "n"}."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def quantile(samples: npt.NDArray[np.float64], q: float) -> Quantile:
    """Return the q-quantile, one of the samples, with a 95 % interval without a distribution.

    How many samples lie below the true quantile is binomial, so two of the sorted samples bound
    it. Calls that follow each other are alike, which the binomial does not know: of times measured
    in one go the interval is too narrow, so measure in many turns.

    Source: Conover 1999, "Practical nonparametric statistics", section 3.2.

    Args:
        samples: (n,), n > 0.
        q: above 0 and below 1.
    """
    n = len(samples)
    if n == 0 or not 0 < q < 1:
        raise ValueError(f"samples must not be empty and q be inside 0 to 1. Got {n} and {q}.")
    ordered = np.sort(samples)
    at_most = _binomial_cdf(n, q)  # [k]: P(at most k samples lie below)
    below = int(np.searchsorted(at_most, TAIL, side="right"))  # P(fewer than this) <= TAIL
    above = int(np.searchsorted(at_most, 1 - TAIL)) + 1  # P(this many or more) <= TAIL
    return Quantile(
        value=float(np.quantile(ordered, q, method="inverted_cdf")),
        low=float(ordered[below - 1]) if below >= 1 else None,
        high=float(ordered[above - 1]) if above <= n else None,
        n=n,
    )


def p99(latencies: npt.NDArray[np.float64]) -> Quantile | None:
    """Return the 99th percentile, or None for fewer than MIN_CALLS_FOR_P99 calls."""
    return quantile(latencies, 0.99) if len(latencies) >= MIN_CALLS_FOR_P99 else None


def median_ratio(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> Quantile:
    """Return the median of a / b, round by round, so that what slows both does not count.

    Args:
        a, b: (rounds,), positive; measured in the same rounds.
    """
    if len(a) != len(b):
        raise ValueError(f"both must have the same rounds. Got {len(a)} and {len(b)}.")
    return quantile(a / b, 0.5)


def is_faster(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> bool:
    """Return whether a's rates are above b's beyond their noise.

    That is: the interval of the ratio lies above 1, or, of too few rounds for one, every round.
    """
    ratio = median_ratio(a, b)
    low = ratio.low if ratio.low is not None else float(np.min(a / b))
    return low > 1


def _binomial_cdf(n: int, p: float) -> npt.NDArray[np.float64]:
    """Return P(X <= k) for k = 0 to n of a binomial X; through logarithms, for a large n."""
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    k = np.arange(n + 1)
    log_choices = log_factorial[n] - log_factorial - log_factorial[::-1]
    cdf: npt.NDArray[np.float64] = np.cumsum(
        np.exp(log_choices + k * np.log(p) + (n - k) * np.log1p(-p))
    )
    return cdf

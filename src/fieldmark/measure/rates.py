"""Rates of counted events and their uncertainty."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Z95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution


@dataclass(frozen=True, slots=True)
class Rate:
    """A fraction with its 95 % Wilson interval and the number of trials."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float | int]:
        """Return {"value", "low", "high", "n"}, fractions between 0 and 1."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}

    def __str__(self) -> str:
        return f"{self.value:.2%} (95 % interval {self.low:.2%} to {self.high:.2%}, n={self.n})"


def wilson(hits: int, n: int) -> Rate:
    """Return hits / n with its 95 % score interval.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".

    Raises:
        ValueError: n is not positive, or hits is not between 0 and n.
    """
    if n <= 0 or not 0 <= hits <= n:
        raise ValueError(f"hits and n must satisfy 0 <= hits <= n and n > 0. Got {hits} and {n}.")
    p = hits / n
    denominator = 1 + Z95**2 / n
    centre = (p + Z95**2 / (2 * n)) / denominator
    half = Z95 * math.sqrt(p * (1 - p) / n + Z95**2 / (4 * n * n)) / denominator
    # At 0 and n the formula's ends are exact up to rounding; keep the value inside.
    return Rate(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)), n)


def paired_difference(
    hits_a: npt.NDArray[np.bool_], hits_b: npt.NDArray[np.bool_]
) -> tuple[float, float, float]:
    """Return accuracy(a) - accuracy(b) on the same examples, with its 95 % interval.

    Source: Newcombe 1998, Statistics in Medicine 17:2635, method 10 (square-and-add with the
    correlation of the pairs), which keeps its coverage when few pairs disagree.
    """
    n = len(hits_a)
    if n == 0 or len(hits_b) != n:
        raise ValueError(f"both must have the same positive length. Got {n} and {len(hits_b)}.")
    both = int(np.sum(hits_a & hits_b))
    only_a = int(np.sum(hits_a & ~hits_b))
    only_b = int(np.sum(~hits_a & hits_b))
    neither = n - both - only_a - only_b
    a, b = wilson(both + only_a, n), wilson(both + only_b, n)
    product = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    phi = 0.0
    if product > 0:
        numerator = float(both * neither - only_a * only_b)
        if numerator > 0:
            numerator = max(numerator - n / 2, 0.0)  # continuity correction of method 10
        phi = numerator / math.sqrt(product)
    difference = (only_a - only_b) / n
    down_a, up_a = a.value - a.low, a.high - a.value
    down_b, up_b = b.value - b.low, b.high - b.value
    low = difference - math.sqrt(max(0.0, down_a**2 - 2 * phi * down_a * up_b + up_b**2))
    high = difference + math.sqrt(max(0.0, up_a**2 - 2 * phi * up_a * down_b + down_b**2))
    return difference, max(-1.0, low), min(1.0, high)


def mcnemar_p(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p-value that a and b are equally often right.

    Source: McNemar 1947; the exact binomial form, over the pairs that disagree.

    Args:
        only_a: examples that only a gets right.
        only_b: examples that only b gets right.
    """
    n = only_a + only_b
    if n == 0:
        return 1.0
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1))
    return float(min(1.0, tail / 2 ** (n - 1)))

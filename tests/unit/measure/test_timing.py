"""Quantiles of times and their intervals, against scipy and by simulation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fieldmark.measure import is_faster, median_ratio, p99, quantile


@given(st.integers(1, 3000), st.sampled_from([0.5, 0.9, 0.99]), st.integers(0, 9))
def test_the_interval_is_made_of_the_order_statistics_that_scipy_finds(
    n: int, q: float, seed: int
) -> None:
    samples = np.random.default_rng(seed).permutation(np.arange(1.0, n + 1))  # value = its rank
    found = quantile(samples, q)
    below = np.arange(0, n + 1)
    lows = below[stats.binom.cdf(below - 1, n, q) <= 0.025]  # P(fewer than this many lie below)
    highs = below[stats.binom.sf(below - 1, n, q) <= 0.025]
    assert found.low == (float(lows.max()) if lows.max() >= 1 else None)
    assert found.high == (float(highs.min()) if len(highs) else None)
    assert found.value == np.quantile(samples, q, method="inverted_cdf")
    assert found.n == n
    assert (found.low or -np.inf) <= found.value <= (found.high or np.inf)


@pytest.mark.parametrize(("q", "n"), [(0.5, 9), (0.5, 200), (0.99, 400)])
def test_the_interval_covers_the_true_quantile_as_often_as_it_says(q: float, n: int) -> None:
    rng = np.random.default_rng(0)
    truth = stats.lognorm(0.5).ppf(q)
    found = [quantile(rng.lognormal(0, 0.5, n), q) for _ in range(1500)]
    covered = np.mean([one.low <= truth <= one.high for one in found])  # type: ignore[operator]
    assert 0.94 <= covered <= 0.99


def test_few_samples_bound_nothing() -> None:
    five = quantile(np.arange(5.0), 0.5)
    assert (five.value, five.low, five.high) == (2.0, None, None)
    six = quantile(np.arange(6.0), 0.5)
    assert (six.low, six.high) == (0.0, 5.0)
    assert six.to_json() == {"value": 2.0, "low": 0.0, "high": 5.0, "n": 6}
    for bad in (np.array([]), np.arange(3.0)):
        with pytest.raises(ValueError, match="inside 0 to 1"):
            quantile(bad, 0.5 if not len(bad) else 1.0)


def test_a_99th_percentile_needs_a_hundred_calls() -> None:
    assert p99(np.arange(99.0)) is None
    found = p99(np.arange(100.0))
    assert found is not None
    assert found.value == 98.0
    assert found.high is None  # a slower call may well be among the next ones


def test_a_ratio_of_the_same_rounds_does_not_see_what_slows_both() -> None:
    rng = np.random.default_rng(2)
    drift = np.linspace(1.0, 0.3, 15)
    base = 100 * drift * rng.normal(1, 0.01, 15)
    other = 130 * drift * rng.normal(1, 0.01, 15)
    ratio = median_ratio(other, base)
    assert ratio.low is not None
    assert ratio.high is not None
    assert 1.27 < ratio.low < ratio.value < ratio.high < 1.33
    assert is_faster(other, base)
    assert not is_faster(base, other)
    with pytest.raises(ValueError, match="same rounds. Got 15 and 14"):
        median_ratio(base, other[:14])


@pytest.mark.parametrize("rounds", [1, 3, 9])
def test_faster_means_beyond_the_noise(rounds: int) -> None:
    base = np.full(rounds, 100.0)
    assert is_faster(base * 1.1, base)
    assert not is_faster(base, base)
    if rounds > 1:
        mixed = base.copy()
        mixed[: rounds // 2 + 1] *= 1.5  # most rounds, but far from all
        assert not is_faster(mixed, base)

"""Rates, intervals and paired tests against independent implementations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fieldmark.measure import mcnemar_p, paired_difference, wilson


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_equals_scipy(counts: tuple[int, int]) -> None:
    hits, n = counts
    expected = stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
    rate = wilson(hits, n)
    assert rate.low == pytest.approx(expected.low, abs=1e-9)
    assert rate.high == pytest.approx(expected.high, abs=1e-9)
    assert rate.low <= rate.value <= rate.high


@pytest.mark.parametrize(("hits", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(hits: int, n: int) -> None:
    with pytest.raises(ValueError, match="hits and n"):
        wilson(hits, n)


@given(st.integers(0, 40), st.integers(0, 40))
def test_mcnemar_equals_the_exact_binomial_test(only_a: int, only_b: int) -> None:
    if only_a + only_b == 0:
        assert mcnemar_p(0, 0) == 1.0
        return
    expected = stats.binomtest(only_a, only_a + only_b, 0.5).pvalue
    assert mcnemar_p(only_a, only_b) == pytest.approx(expected)


def test_paired_difference_of_a_small_table() -> None:
    a = np.array([True] * 43 + [True] * 4 + [False] * 3)
    b = np.array([True] * 43 + [False] * 4 + [False] * 3)
    value, low, high = paired_difference(a, b)
    assert value == pytest.approx(0.08)
    assert low < 0.08 < high
    swapped = paired_difference(b, a)
    assert swapped == pytest.approx((-value, -high, -low))


def test_paired_interval_covers_the_truth_nearly_always() -> None:
    rng = np.random.default_rng(0)
    covered, trials, n = 0, 1500, 200
    for _ in range(trials):
        both = rng.random(n)
        a = both < 0.9
        b = np.where(rng.random(n) < 0.05, ~a, a)
        truth = 0.9 - (0.9 * 0.95 + 0.1 * 0.05)
        _, low, high = paired_difference(a, b)
        covered += low <= truth <= high
    assert 0.93 <= covered / trials <= 0.985


def test_paired_interval_is_narrower_than_the_unpaired_one() -> None:
    rng = np.random.default_rng(1)
    a = rng.random(2000) < 0.9
    b = a.copy()
    b[:10] = ~b[:10]
    _, low, high = paired_difference(a, b)
    unpaired = wilson(int(a.sum()), len(a))
    assert high - low < (unpaired.high - unpaired.low) / 2

"""Calibration against torchmetrics, scipy and the formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torchmetrics.functional.classification import multiclass_calibration_error

from fieldmark.measure import (
    ece,
    ece_increase,
    fit_temperature,
    measure_calibration,
    nll,
    nll_change,
    reliability,
    softmax,
)


def draw(
    n: int, num_classes: int = 6, seed: int = 0, scale: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Logits, and labels drawn from the softmax of logits / scale: `scale` is the temperature."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n, num_classes))
    logits[np.arange(n), rng.integers(0, num_classes, n)] += rng.gamma(4, 1, n)
    cumulative = softmax(logits).cumsum(axis=1)
    labels = (cumulative < rng.random((n, 1))).sum(axis=1).clip(0, num_classes - 1)
    return (logits * scale).astype(np.float32), labels


@pytest.mark.parametrize("num_bins", [5, 15, 40])
@pytest.mark.parametrize("scale", [0.6, 1.0, 3.0])
def test_ece_equals_torchmetrics(num_bins: int, scale: float) -> None:
    logits, labels = draw(700, scale=scale)
    probs = softmax(logits)
    expected = multiclass_calibration_error(
        torch.from_numpy(probs), torch.from_numpy(labels), 6, n_bins=num_bins, norm="l1"
    )
    assert ece(probs, labels, num_bins) == pytest.approx(float(expected), abs=1e-6)


def test_ece_and_bins_of_images_counted_by_hand() -> None:
    # Top probabilities 0.75 (right), 0.75 (wrong), 0.9 (right), 1.0 (right), in 4 bins: the edge
    # 0.75 belongs to the bin below it, 1.0 to the last.
    probs = np.array([[0.75, 0.25], [0.25, 0.75], [0.9, 0.1], [0.0, 1.0]])
    labels = np.array([0, 0, 0, 1])
    bins = reliability(probs, labels, 4)
    assert [one.count for one in bins] == [0, 0, 2, 2]
    assert [one.mean_confidence for one in bins] == [None, None, 0.75, pytest.approx(0.95)]
    assert bins[2].accuracy is not None
    assert (bins[2].accuracy.value, bins[2].accuracy.n) == (0.5, 2)
    assert ece(probs, labels, 4) == pytest.approx((2 * 0.25 + 2 * 0.05) / 4)


def test_the_bins_give_the_ece() -> None:
    logits, labels = draw(900, scale=2.0)
    found = measure_calibration(logits, labels)
    gaps = [
        one.count * abs(one.accuracy.value - one.mean_confidence)
        for one in found.bins
        if one.accuracy is not None and one.mean_confidence is not None
    ]
    assert sum(gaps) / 900 == pytest.approx(found.ece.value)
    assert sum(one.count for one in found.bins) == 900


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_nll_is_the_cross_entropy_of_divided_logits(temperature: float) -> None:
    logits, labels = draw(300)
    divided = torch.from_numpy(logits).double() / temperature
    losses = torch.nn.functional.cross_entropy(divided, torch.from_numpy(labels), reduction="none")
    found = nll(logits, labels, temperature)
    assert found.value == pytest.approx(float(losses.mean()))
    half = 1.96 * float(losses.std(correction=0)) / 300**0.5
    assert (found.low, found.high) == pytest.approx((found.value - half, found.value + half), 1e-3)
    change = nll_change(logits, labels, 1.0, temperature)
    assert change.value == pytest.approx(found.value - nll(logits, labels).value)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.08, 12.0), st.integers(40, 400))
def test_the_temperature_is_that_of_scipy(seed: int, scale: float, n: int) -> None:
    logits, labels = draw(n, seed=seed, scale=scale)
    expected = minimize_scalar(
        lambda t: nll(logits, labels, np.exp(t)).value,
        bounds=(np.log(0.05), np.log(20)),
        method="bounded",
        options={"xatol": 1e-9},
    )
    found = fit_temperature(logits, labels)
    assert found.temperature.value == pytest.approx(np.exp(expected.x), rel=1e-4)
    assert nll(logits, labels, found.temperature.value).value <= expected.fun + 1e-12


def test_the_interval_of_the_temperature_holds_the_truth_nearly_always() -> None:
    held = 0
    for seed in range(300):
        found = fit_temperature(*draw(150, seed=seed, scale=1.7)).temperature
        held += found.low <= 1.7 <= found.high
    assert 0.91 <= held / 300 <= 0.985


@pytest.mark.parametrize("gap", [0.1, 3.0, 1e4])
def test_only_right_or_only_wrong_answers_hit_a_bound(gap: float) -> None:
    labels = np.arange(120) % 4
    logits = (gap * np.eye(4)[labels]).astype(np.float32)
    found = fit_temperature(logits, labels)
    assert (found.bound, found.temperature.value) == ("lower", 0.05)
    upper = fit_temperature(-logits, labels)
    assert (upper.bound, upper.temperature.value) == ("upper", 20.0)


def test_logits_that_say_nothing_keep_temperature_1() -> None:
    found = fit_temperature(np.zeros((50, 3), np.float32), np.zeros(50, np.int64))
    assert (found.temperature.value, found.bound) == (1.0, None)


def test_large_logits_are_fitted_without_overflow() -> None:
    logits, labels = draw(400, scale=10.0)
    shifted = logits + np.float32(5e4)  # a shift of all logits means nothing
    with np.errstate(all="raise", under="ignore"):
        found = fit_temperature(shifted, labels).temperature.value
    assert found == pytest.approx(fit_temperature(logits, labels).temperature.value, rel=1e-2)


def test_what_cannot_be_fitted_is_refused() -> None:
    logits, labels = draw(10)
    with pytest.raises(ValueError, match="N > 0"):
        fit_temperature(logits[:0], labels[:0])
    logits[3, 0] = np.nan
    with pytest.raises(ValueError, match="finite"):
        fit_temperature(logits, labels)


def test_the_interval_of_the_ece_knows_that_chance_alone_gives_some() -> None:
    calibrated = measure_calibration(*draw(300)).ece
    assert calibrated.low == 0 < calibrated.value <= calibrated.high
    off = measure_calibration(*draw(2000, scale=3.0)).ece
    assert 0 < off.low < off.value <= off.high
    assert measure_calibration(*draw(2000, scale=3.0)).ece == off  # the draws are seeded


def test_the_increase_of_the_ece_is_paired() -> None:
    logits, labels = draw(1500)
    assert ece_increase(logits, logits, labels).value == 0
    noise = np.random.default_rng(1).normal(0, 0.01, logits.shape)
    near = ece_increase(logits, logits + noise, labels)
    assert near.low <= 0 <= near.high
    sharper = ece_increase(logits, 3 * logits, labels)
    assert sharper.low > 0.02
    # The same logits at the temperature that undoes the scale are as good as they were.
    undone = ece_increase(3 * logits, logits, labels, temperature=1.0)
    assert undone.value == pytest.approx(-sharper.value)

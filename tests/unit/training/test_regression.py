"""The regression of a linear probe against its formula and scikit-learn, its folds, its choice."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from fieldmark.errors import DataError
from fieldmark.training import regression as module
from fieldmark.training.probe import write_head
from fieldmark.training.regression import (
    ALWAYS_TRAINED,
    PenaltyScore,
    best_of,
    count_folds,
    cross_validate,
    fit,
    fold_of_each,
    nearest_neighbours,
    queries_for_neighbours,
    sample_for_folds,
)


def blobs(num_classes: int, each: int = 40, spread: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Return overlapping classes: features (1, N, 12) with means and scales of their own."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(num_classes), each)
    centres = rng.normal(size=(num_classes, 12))
    x = centres[labels] + spread * rng.normal(size=(len(labels), 12))
    x = x * np.logspace(-2, 2, 12) + np.linspace(-5, 5, 12)
    order = rng.permutation(len(labels))
    return x[order].astype(np.float32)[None], labels[order]


@pytest.mark.parametrize("num_classes", [2, 3, 7])
@pytest.mark.parametrize("penalty", [1e-2, 1.0])
def test_the_fit_is_the_minimum_of_the_stated_objective(num_classes: int, penalty: float) -> None:
    x_VND, y = blobs(num_classes)
    found, converged = fit(x_VND, y, num_classes, penalty)
    assert converged
    x = torch.from_numpy((x_VND[0] - found.mean) / found.std)
    weights = torch.tensor(found.weights, requires_grad=True)
    biases = torch.tensor(found.biases, requires_grad=True)
    loss = F.cross_entropy(x @ weights.T + biases, torch.from_numpy(y))
    (loss + penalty / 2 * weights.square().sum()).backward()
    assert weights.grad is not None
    assert biases.grad is not None
    assert weights.grad.abs().max() < 3e-4
    assert biases.grad.abs().max() < 3e-4
    assert weights.detach().abs().max() > 0.05


def test_the_folded_head_is_scikit_learn_s_decision_function() -> None:
    x_VND, y = blobs(5)
    found, _ = fit(x_VND, y, 5, 0.1)
    head = torch.nn.Linear(12, 5)
    write_head(head, found)
    scaled = StandardScaler().fit_transform(x_VND[0].astype(np.float64))
    expected = LogisticRegression(C=1 / (0.1 * len(y)), tol=1e-8, max_iter=5_000).fit(scaled, y)
    with torch.no_grad():
        logits = head(torch.from_numpy(x_VND[0])).numpy()
    assert np.abs(logits - found.logits(x_VND[0])).max() < 1e-4
    assert np.abs(logits - expected.decision_function(scaled)).max() < 0.02
    assert (logits.argmax(1) == expected.predict(scaled)).mean() > 0.99


def test_two_classes_give_two_logits_with_scikit_learn_s_probabilities() -> None:
    x_VND, y = blobs(2)
    found, _ = fit(x_VND, y, 2, 0.1)
    scaled = StandardScaler().fit_transform(x_VND[0].astype(np.float64))
    expected = LogisticRegression(C=2 / (0.1 * len(y)), tol=1e-8).fit(scaled, y)
    probs = torch.from_numpy(found.logits(x_VND[0])).softmax(1).numpy()
    assert probs.shape == (80, 2)
    assert np.abs(probs - expected.predict_proba(scaled)).max() < 5e-3


def test_a_feature_that_hardly_varies_is_not_blown_up() -> None:
    x_VND, y = blobs(3)
    constant = np.full((1, len(y), 1), 7, np.float32)
    spike = np.zeros((1, len(y), 1), np.float32)
    spike[0, 0] = 1e-4  # one image in 120: standard deviation 1e-5
    found, _ = fit(np.concatenate([x_VND, constant, spike], axis=2), y, 3, 0.1)
    weights, _ = found.as_linear()
    assert found.std.min() >= 0.99e-2 * np.median(found.std)
    assert np.isfinite(weights).all()
    assert np.abs(weights[:, 12]).max() < 1e-6


@pytest.mark.parametrize("seed", [0, 1])
def test_folds_are_stratified_and_a_class_is_never_missing_from_training(seed: int) -> None:
    labels = np.random.default_rng(3).permutation(np.repeat(np.arange(5), [50, 23, 7, 5, 1]))
    folds = count_folds(labels, 5)
    fold_of = fold_of_each(labels, folds, seed)
    assert folds == 5
    assert (fold_of[labels == 4] == ALWAYS_TRAINED).all()
    sizes = np.bincount(fold_of[fold_of >= 0], minlength=5)
    assert sizes.max() - sizes.min() <= 1
    for label in range(4):
        held_out = np.bincount(fold_of[labels == label], minlength=5)
        assert held_out.max() - held_out.min() <= 1
        assert held_out.max() < (labels == label).sum()
    assert (fold_of == fold_of_each(labels, folds, seed)).all()
    assert (fold_of != fold_of_each(labels, folds, seed + 1)).any()


def test_small_classes_lower_the_folds() -> None:
    assert count_folds(np.repeat([0, 1], [9, 3]), 5) == 3
    assert count_folds(np.repeat([0, 1], [9, 1]), 5) == 5
    with pytest.raises(DataError, match=r"at least 2 train images\. Got 3 images of 3 classes"):
        count_folds(np.arange(3), 5)


def test_views_of_an_image_are_held_out_together() -> None:
    rng = np.random.default_rng(0)
    one = rng.normal(size=(1, 60, 200)).astype(np.float32)
    labels = np.arange(60) % 3  # no relation to the features: anything above chance is a leak
    fold_of = fold_of_each(labels, 5, 0)
    both = np.concatenate([one, one])
    (score,) = cross_validate(both, labels, 3, penalties=[1e-2], fold_of_N=fold_of, threads=1)
    assert score.accuracy < 0.6


def test_cross_validation_is_what_scikit_learn_measures_fold_by_fold() -> None:
    x_VND, y = blobs(3, spread=3.0)
    fold_of = fold_of_each(y, 4, 0)
    penalties = (10.0, 1e-2, 1.0)
    found = cross_validate(x_VND, y, 3, penalties=penalties, fold_of_N=fold_of, threads=1)
    assert [score.penalty for score in found] == list(penalties)
    for score in found:
        hits = []
        for fold in range(4):
            inside = fold_of != fold
            scaler = StandardScaler().fit(x_VND[0, inside].astype(np.float64))
            c = 1 / (score.penalty * inside.sum())
            reference = LogisticRegression(C=c, tol=1e-6, max_iter=2_000)
            reference.fit(scaler.transform(x_VND[0, inside]), y[inside])
            hits.append(reference.score(scaler.transform(x_VND[0, ~inside]), y[~inside]))
        assert score.accuracy == pytest.approx(np.mean(hits), abs=0.02)
        assert score.accuracy_std == pytest.approx(np.std(hits), abs=0.02)
    again = cross_validate(x_VND, y, 3, penalties=penalties, fold_of_N=fold_of, threads=3)
    assert again == found


def test_ties_go_to_the_smaller_loss_and_then_to_the_stronger_penalty() -> None:
    scores = [
        PenaltyScore(0.1, 0.9, 0, 0.30),
        PenaltyScore(1.0, 0.9, 0, 0.25),
        PenaltyScore(5.0, 0.8, 0, 0.10),
        PenaltyScore(2.0, 0.9, 0, 0.25),
    ]
    assert best_of(scores).penalty == 2.0
    assert best_of(scores[:2]).penalty == 1.0


def test_a_large_problem_is_cross_validated_on_the_same_share_of_each_class(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    labels = np.repeat([0, 1, 2], [600, 300, 3])
    assert (sample_for_folds(labels, 10, 3, 0) == np.arange(903)).all()
    monkeypatch.setattr(module, "MAX_CV_WORK", 10 * 3 * 300)
    chosen = sample_for_folds(labels, 10, 3, 0)
    counts = np.bincount(labels[chosen])
    assert counts.tolist() == [199, 100, 2]
    assert len(np.unique(chosen)) == len(chosen)
    assert (chosen == sample_for_folds(labels, 10, 3, 0)).all()


def test_neighbours_are_scikit_learn_s_with_cosine_distance() -> None:
    x_VND, y = blobs(4, spread=1.0)
    train, queries = x_VND[0, :100], x_VND[0, 100:]
    for k in (1, 15):
        reference = KNeighborsClassifier(k, metric="cosine").fit(train, y[:100])
        votes = reference.predict_proba(queries)
        found = nearest_neighbours(train, y[:100], queries, neighbours=k, num_classes=4)
        rows = np.arange(len(queries))
        assert np.allclose(votes[rows, found], votes.max(axis=1))
        is_clear = np.sort(votes, axis=1)[:, -1] > np.sort(votes, axis=1)[:, -2]
        assert is_clear.sum() > 30
        assert (found == reference.predict(queries))[is_clear].all()
    few = nearest_neighbours(train[:3], y[:3], queries, neighbours=20, num_classes=4)
    assert set(few) <= set(y[:3])


def test_equal_votes_go_to_the_nearer_class() -> None:
    train = np.array([[1, 0.5], [1, 0.1]], np.float32)
    query = np.array([[1, 0]], np.float32)
    found = nearest_neighbours(train, np.array([0, 1]), query, neighbours=2, num_classes=2)
    assert found.tolist() == [1]


def test_an_image_is_not_its_own_neighbour():
    train = np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1]], dtype=np.float32)
    labels = np.array([0, 1, 1, 0])  # the nearest other image is always of the other class
    for k, expected in ((1, [1, 0, 0, 1]), (9, [1, 0, 0, 1])):
        found = nearest_neighbours(
            train, labels, train, neighbours=k, num_classes=2, own_M=np.arange(4)
        )
        assert found.tolist() == expected
    assert nearest_neighbours(train, labels, train, neighbours=1, num_classes=2).tolist() == [
        *labels
    ]


def test_neighbours_of_a_large_split_are_looked_up_for_a_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert queries_for_neighbours(50, 100, 10).tolist() == list(range(50))
    monkeypatch.setattr(module, "MAX_KNN_WORK", 10 * 100 * 10)
    rows = queries_for_neighbours(50, 100, 10)
    assert (len(rows), rows[0], rows[-1]) == (10, 0, 49)

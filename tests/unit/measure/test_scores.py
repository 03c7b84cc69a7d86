"""Scores against torchmetrics, scikit-learn and the formulas."""

import numpy as np
import pytest
import torch
import torchmetrics.functional.classification as metrics
from sklearn.metrics import balanced_accuracy_score, confusion_matrix

from fieldmark.measure import (
    compare_logits,
    largest,
    log_softmax,
    score,
    softmax,
    top_k_hits,
)

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(500, 12)).astype(np.float32)
LABELS = RNG.integers(0, 12, 500)


def test_scores_equal_torchmetrics_and_sklearn() -> None:
    found = score(LOGITS, LABELS)
    logits, labels = torch.from_numpy(LOGITS), torch.from_numpy(LABELS)
    for k, rate in ((1, found.top1_accuracy), (5, found.top5_accuracy)):
        expected = metrics.multiclass_accuracy(logits, labels, 12, average="micro", top_k=k)
        assert rate is not None
        assert rate.value == pytest.approx(float(expected))
    assert found.loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)))
    predicted = LOGITS.argmax(1)
    assert (found.confusion == confusion_matrix(LABELS, predicted)).all()
    assert found.balanced_accuracy.value == pytest.approx(
        balanced_accuracy_score(LABELS, predicted)
    )


def test_top_k_is_the_share_whose_label_is_among_the_k_largest() -> None:
    for k in (1, 3, 5):
        ranked = np.argsort(-LOGITS, axis=1)[:, :k]
        expected = [label in row for label, row in zip(LABELS, ranked, strict=True)]
        assert (top_k_hits(LOGITS, LABELS, k) == expected).all()


def test_a_constant_or_broken_output_earns_nothing() -> None:
    labels = np.array([0, 1, 2])
    assert not top_k_hits(np.zeros((3, 8), np.float32), labels, 5).any()
    broken = np.full((3, 8), np.nan, np.float32)
    assert not top_k_hits(broken, labels, 5).any()


def test_softmax_and_its_logarithm_survive_large_logits() -> None:
    logits = np.array([[1e4, 0.0, -1e4]], np.float32)
    assert softmax(logits).sum() == pytest.approx(1.0)
    assert np.isfinite(log_softmax(logits)).all()


def test_no_top5_with_five_classes_and_absent_classes_do_not_count() -> None:
    logits = np.eye(5, dtype=np.float32)[[0, 1, 1]]
    found = score(logits, np.array([0, 1, 0]))
    assert found.top5_accuracy is None
    assert sorted(found.per_class_accuracy) == [0, 1]
    assert found.balanced_accuracy.value == pytest.approx(0.75)
    assert found.to_json(list("abcde"))["per_class_accuracy"]["a"]["value"] == pytest.approx(0.5)


@pytest.mark.parametrize("labels", [np.array([0, 12]), np.array([-1, 0]), np.array([0])])
def test_labels_outside_the_outputs_are_refused(labels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="labels"):
        score(LOGITS[:2], labels)


def test_agreement_counts_a_nan_as_a_disagreement() -> None:
    variant = LOGITS.copy()
    variant[0] = np.nan
    found = compare_logits(LOGITS, variant, LABELS)
    assert found.top1_agreement.value == pytest.approx(499 / 500)
    assert found.max_abs_delta_logit == float("inf")


def test_agreement_of_shifted_classes_is_low_and_the_drop_is_the_difference() -> None:
    shifted = np.roll(LOGITS, 1, axis=1)
    found = compare_logits(LOGITS, shifted, LABELS)
    assert found.top1_agreement.value == 0.0
    drop = (LOGITS.argmax(1) == LABELS).mean() - (shifted.argmax(1) == LABELS).mean()
    assert found.accuracy_drop is not None
    assert found.accuracy_drop[0] == pytest.approx(drop)


def test_the_largest_are_those_of_a_whole_stable_sort() -> None:
    draw = np.random.default_rng(0)
    for num_classes in (1, 3, 50):
        logits = draw.integers(-4, 4, (200, num_classes)).astype(np.float32)  # with many ties
        whole = np.argsort(-logits, axis=1, kind="stable")
        for k in (1, 2, 5, num_classes, num_classes + 1):
            assert np.array_equal(largest(logits, k), whole[:, :k])
        assert np.array_equal(largest(logits, None), whole)
    assert largest(np.zeros((0, 3), np.float32), 2).shape == (0, 2)

"""Losses: against their formulas, torch, torchvision, timm and scikit-learn."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.utils.class_weight import compute_class_weight
from timm.loss import BinaryCrossEntropy
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from fieldmark.config import LossConfig
from fieldmark.errors import ConfigError
from fieldmark.training.losses import class_weights, log_prior, make_loss

COUNTS = [500, 90, 30, 7, 1]
K = len(COUNTS)

CONFIGS = [
    LossConfig(name=name, label_smoothing=smoothing, class_weights=weights)
    for name in ("cross-entropy", "focal", "bce", "logit-adjusted")
    for smoothing in (0.0, 0.2)
    for weights in ("none", "inverse", "effective", (0.5, 1.0, 0.0, 3.0, 9.0))
    if name != "logit-adjusted" or weights in ("none", (0.5, 1.0, 0.0, 3.0, 9.0))
] + [LossConfig(name="bce", bce_threshold=0.2)]

every_config = pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda c: f"{c.name}-{c.label_smoothing}-{c.class_weights}"
)


def sample(
    count: int = 9, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, K), labels (B,) that hold every class, and mixed targets (B, K)."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, K, generator=generator, dtype=dtype)
    labels = torch.arange(count) % K
    share = torch.rand(count, 1, generator=generator, dtype=dtype)
    one_hot = F.one_hot(labels, K).to(dtype)
    return logits, labels, share * one_hot + (1 - share) * one_hot.roll(1, 0)


def per_example(name: str, logits: Tensor, targets: Tensor, prior: Tensor) -> Tensor:
    """The four losses of soft targets (B, K), written out: (B,)."""
    p = torch.softmax(logits, 1)
    if name == "focal":
        return -(targets * (1 - p) ** 2 * p.log()).sum(1)
    if name == "bce":
        q = torch.sigmoid(logits)
        return -(targets * q.log() + (1 - targets) * (1 - q).log()).mean(1)
    if name == "logit-adjusted":
        p = p * prior / (p * prior).sum(1, keepdim=True)
    return -(targets * p.log()).sum(1)


@every_config
def test_an_example_that_weighs_w_counts_as_w_examples_of_the_formula(config: LossConfig) -> None:
    logits, labels, _ = sample()
    prior = torch.tensor(COUNTS, dtype=torch.float64) / sum(COUNTS)
    uniform = prior if config.name == "logit-adjusted" else torch.full_like(prior, 1 / K)
    one_hot = F.one_hot(labels, K).double()
    targets = one_hot * (1 - config.label_smoothing) + config.label_smoothing * uniform
    weights = class_weights(config, np.array(COUNTS))
    of_example = torch.ones(K) if weights is None else torch.from_numpy(weights)
    wanted = (of_example[labels] * per_example(config.name, logits, targets, prior)).mean()
    found = make_loss(config, class_counts=COUNTS)(logits, labels)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-9)


@every_config
def test_the_loss_of_a_mixed_target_mixes_the_losses(config: LossConfig) -> None:
    if config.name == "bce" and (config.class_weights != "none" or config.bce_threshold):
        return  # the next test
    logits, labels, soft = sample()
    loss = make_loss(config, class_counts=COUNTS)
    one_by_one = []
    for row, target in zip(logits, soft, strict=True):
        each = torch.stack([loss(row[None], torch.tensor([k])) for k in range(K)])
        one_by_one.append((target * each).sum())
    assert loss(logits, soft).item() == pytest.approx(torch.stack(one_by_one).mean().item())
    hard = loss(logits, F.one_hot(labels, K).double())
    assert hard.item() == pytest.approx(loss(logits, labels).item(), rel=1e-12)


def test_a_mixed_example_of_bce_weighs_the_mean_of_its_classes() -> None:
    logits, _, soft = sample()
    weights = [0.5, 1.0, 0.0, 3.0, 9.0]
    loss = make_loss(LossConfig(name="bce", class_weights=tuple(weights)), class_counts=COUNTS)
    each = F.binary_cross_entropy_with_logits(logits, soft, reduction="none").mean(1)
    wanted = ((soft @ torch.tensor(weights).double()) * each).mean()
    assert loss(logits, soft).item() == pytest.approx(wanted.item())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy_is_torch_s(smoothing: float) -> None:
    logits, labels, soft = sample(dtype=torch.float32)
    loss = make_loss(LossConfig(label_smoothing=smoothing), class_counts=COUNTS)
    for targets in (labels, soft):
        wanted = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        assert torch.equal(loss(logits, targets), wanted)


def test_weights_without_smoothing_are_torch_s_but_for_the_division() -> None:
    logits, labels, soft = sample()
    config = LossConfig(class_weights="inverse")
    loss = make_loss(config, class_counts=COUNTS)
    weights = torch.from_numpy(class_weights(config, np.array(COUNTS)))
    for targets in (labels, soft):
        summed = F.cross_entropy(logits, targets, weight=weights, reduction="sum")
        assert loss(logits, targets).item() == pytest.approx(summed.item() / len(logits))
    mean = F.cross_entropy(logits, labels, weight=weights)
    assert loss(logits, labels).item() != pytest.approx(mean.item(), rel=0.01)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_focal_over_two_classes_is_torchvision_s_over_one_logit(gamma: float) -> None:
    z = torch.linspace(-8, 8, 17, dtype=torch.float64)
    labels = torch.arange(17) % 2
    loss = make_loss(LossConfig(name="focal", focal_gamma=gamma), class_counts=[9, 8])
    wanted = sigmoid_focal_loss(z, labels.double(), alpha=-1, gamma=gamma, reduction="mean")
    found = loss(torch.stack([torch.zeros_like(z), z], 1), labels)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-9)


def test_focal_of_gamma_0_is_cross_entropy() -> None:
    logits, _, soft = sample()
    for extra in ({}, {"label_smoothing": 0.1}, {"class_weights": "inverse"}):
        focal = LossConfig(name="focal", focal_gamma=0, **extra)
        plain = LossConfig(**extra)
        a, b = (make_loss(c, class_counts=COUNTS)(logits, soft) for c in (focal, plain))
        assert a.item() == pytest.approx(b.item(), rel=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("threshold", [0.0, 0.2])
def test_bce_is_timm_s(smoothing: float, threshold: float) -> None:
    logits, labels, soft = sample(dtype=torch.float32)
    theirs = BinaryCrossEntropy(smoothing=smoothing, target_threshold=threshold or None)
    if smoothing and threshold:
        with pytest.raises(ValueError, match="undoes loss.label_smoothing"):
            LossConfig(name="bce", label_smoothing=smoothing, bce_threshold=threshold)
        # ... which is what happens there: the smoothing changes nothing.
        assert torch.equal(theirs(logits, labels), BinaryCrossEntropy(smoothing=0)(logits, labels))
        return
    config = LossConfig(name="bce", label_smoothing=smoothing, bce_threshold=threshold)
    ours = make_loss(config, class_counts=COUNTS)
    assert ours(logits, labels).item() == pytest.approx(theirs(logits, labels).item(), rel=1e-6)
    # There, whoever mixes has smoothed before.
    smoothed = (1 - smoothing) * soft + smoothing / K
    assert ours(logits, soft).item() == pytest.approx(theirs(logits, smoothed).item(), rel=1e-6)


def test_inverse_weights_are_scikit_learn_s_balanced_ones() -> None:
    labels = np.repeat(np.arange(K), COUNTS)
    wanted = compute_class_weight("balanced", classes=np.arange(K), y=labels)
    found = class_weights(LossConfig(class_weights="inverse"), np.array(COUNTS))
    assert found == pytest.approx(wanted)


def test_effective_weights_lie_between_none_and_inverse() -> None:
    counts = np.array(COUNTS)

    def effective(beta: float) -> np.ndarray[Any, Any]:
        found = class_weights(LossConfig(class_weights="effective", effective_beta=beta), counts)
        assert found is not None
        return found

    plain = (1 - 0.99) / (1 - 0.99**counts)
    assert effective(0.99) == pytest.approx(plain * counts.sum() / (plain * counts).sum())
    assert effective(1e-9) == pytest.approx(np.ones(K))
    inverse = class_weights(LossConfig(class_weights="inverse"), counts)
    assert effective(1 - 1e-9) == pytest.approx(inverse, rel=1e-5)


@given(
    counts=st.lists(st.integers(0, 10**7), min_size=2, max_size=50).filter(any),
    rule=st.sampled_from(["inverse", "effective"]),
    beta=st.floats(1e-6, 1 - 1e-6),
)
def test_computed_weights_have_a_mean_of_1_over_the_images(
    counts: list[int], rule: str, beta: float
) -> None:
    beta = beta if rule == "effective" else 0.999
    config = LossConfig(class_weights=rule, effective_beta=beta)
    weights = class_weights(config, np.array(counts))
    assert weights is not None
    assert np.average(weights, weights=counts) == pytest.approx(1)
    assert ((weights > 0) == (np.array(counts) > 0)).all()
    order = np.argsort(counts, kind="stable")
    present = weights[order][np.array(counts)[order] > 0]
    assert (np.diff(present) <= 1e-12 * present[:-1]).all()  # the rarer, the heavier


def test_bare_logits_of_the_adjusted_loss_answer_as_if_classes_were_equally_frequent() -> None:
    # Images of four kinds, the classes of each in these numbers: the loss over all of them is
    # least where the logits are log P(kind | class), which knows of no prior.
    joint = np.array([[90, 9, 1], [60, 35, 5], [97, 2, 1], [80, 10, 10]])
    of_class = joint.sum(0)
    best = torch.from_numpy(np.log(joint / of_class)).requires_grad_()
    targets = torch.from_numpy(joint / joint.sum(1, keepdims=True))
    adjusted = make_loss(LossConfig(name="logit-adjusted"), class_counts=of_class.tolist())
    adjusted(best, targets).backward()
    assert best.grad is not None
    assert best.grad.abs().max() < 1e-12
    # Cross-entropy is least at log P(class | kind) instead, which calls each kind the first class.
    plain = torch.log(targets).requires_grad_()
    make_loss(LossConfig(), class_counts=of_class.tolist())(plain, targets).backward()
    assert plain.grad is not None
    assert plain.grad.abs().max() < 1e-12
    assert plain.argmax(1).tolist() == [0, 0, 0, 0]
    assert best.argmax(1).tolist() == [0, 1, 0, 2]


@pytest.mark.parametrize(
    "config",
    [
        LossConfig(label_smoothing=0.2, class_weights="inverse"),
        LossConfig(label_smoothing=0.2, class_weights="effective"),
        LossConfig(label_smoothing=0.2, name="logit-adjusted"),
        LossConfig(label_smoothing=0.2, name="focal", class_weights="inverse"),
        LossConfig(label_smoothing=0.2, name="bce", class_weights="inverse"),
    ],
    ids=lambda c: f"{c.name}-{c.class_weights}",
)
def test_smoothing_never_makes_a_rare_class_the_best_answer(config: LossConfig) -> None:
    counts = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    loss = make_loss(config, class_counts=counts)
    labels = torch.arange(10)

    def fitted(of: Callable[[Tensor], Tensor]) -> Tensor:
        logits = torch.zeros(10, 10, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([logits], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = of(logits)
            value.backward()
            return value

        optimizer.step(closure)
        return logits.detach()

    assert fitted(lambda logits: loss(logits, labels)).argmax(1).tolist() == labels.tolist()
    if config.name == "cross-entropy" and config.class_weights == "inverse":
        # torch weighs the terms of the smoothed target, and so fits the two largest classes best
        # by the answer of the smallest: 0.82 against 0.02 times the ratio of their sizes.
        weight = torch.from_numpy(class_weights(config, np.array(counts)))
        theirs = fitted(
            lambda z: F.cross_entropy(z, labels, weight, label_smoothing=0.2, reduction="sum")
        )
        assert theirs.argmax(1).tolist()[:3] == [9, 9, 2]


@every_config
@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_micro_batches_add_up_to_the_whole(config: LossConfig, data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 12))
    cut = data.draw(st.integers(1, count - 1))
    is_mixed = data.draw(st.booleans())
    logits, labels, soft = sample(count, data.draw(st.integers(0, 99)))
    targets = soft if is_mixed else labels
    loss = make_loss(config, class_counts=COUNTS)
    parts = sum(
        len(part) / count * loss(logits[part], targets[part]).item()
        for part in (torch.arange(cut), torch.arange(cut, count))
    )
    assert parts == pytest.approx(loss(logits, targets).item(), rel=1e-9)


@every_config
def test_gradients_are_those_of_finite_differences(config: LossConfig) -> None:
    logits, labels, soft = sample(5)
    loss = make_loss(config, class_counts=COUNTS)
    for targets in (labels, soft):
        assert torch.autograd.gradcheck(lambda z, t=targets: loss(z, t), logits.requires_grad_())


@every_config
def test_sixteen_bits_in_float32_out_whatever_the_targets(config: LossConfig) -> None:
    logits, labels, soft = sample(dtype=torch.float32)
    loss = make_loss(config, class_counts=COUNTS)
    low = logits.bfloat16()
    for targets in (labels, soft.float(), soft.double()):
        with torch.autocast("cpu", torch.bfloat16):
            found = loss(low, targets)
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(loss(low.float(), targets).item(), rel=1e-6)
    # One that was used in float32 before is as exact in float64 as a new one.
    exact = sample()
    fresh = make_loss(config, class_counts=COUNTS)(exact[0], exact[1])
    assert torch.equal(loss(exact[0], exact[1]), fresh)


@every_config
@pytest.mark.parametrize("size", [30.0, 1e4])
def test_certain_networks_and_empty_classes_leave_everything_finite(
    config: LossConfig, size: float
) -> None:
    loss = make_loss(config, class_counts=[500, 90, 30, 0, 0])
    for label in range(3):
        logits = torch.zeros(2, K)
        logits[0, label], logits[1, 3] = size, size  # right, and wrong
        logits.requires_grad_()
        value = loss(logits, torch.tensor([label, label]))
        value.backward()
        assert logits.grad is not None
        assert torch.isfinite(value)
        assert torch.isfinite(logits.grad).all()
    half = LossConfig(name="focal", focal_gamma=0.5)  # its slope is infinite at a p of 1
    logits = torch.tensor([[size, 0.0]], requires_grad=True)
    make_loss(half, class_counts=[1, 1])(logits, torch.tensor([0])).backward()
    assert torch.isfinite(logits.grad).all()


def test_the_prior_of_an_empty_class_is_that_of_a_single_image() -> None:
    assert np.exp(log_prior(np.array([98, 1, 0]))) == pytest.approx([0.98, 0.01, 0.01])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1.0, 2.0), r"one number for each of the 5 classes\. Got 2"),
        ((), r"one number for each of the 5 classes\. Got 0"),
        ((0.0, 0.0, 0.0, 0.0, 1.0), "above 0 for a class with train images"),
    ],
)
def test_lists_that_do_not_fit_the_classes_are_refused(
    weights: tuple[float, ...], message: str
) -> None:
    config = LossConfig.model_construct(**LossConfig().model_dump() | {"class_weights": weights})
    with pytest.raises(ConfigError, match=message):
        make_loss(config, class_counts=[5, 4, 3, 2, 0])

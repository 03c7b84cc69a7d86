"""What is minimised: a function of logits and targets, averaged over the examples.

Shapes: B examples, K classes. Targets are int64 (B,), or float (B, K) of sum 1 when mixed.

Every loss is the sum over the examples, each counted by its class weight, divided by B. It is not
divided by the sum of the weights in the batch, as torch's `cross_entropy` does: that sum differs
from one micro-batch and one device to the next, and the mean of their means would then not be the
mean of the whole. The computed weights have a mean of 1 over the train images instead, so that
they move no learning rate.

An example that weighs w counts as w examples, smoothing included. torch weighs each class's term
of the smoothed target, and so the rare classes in the smoothing of all others: at a smoothing of
0.2 over 10 classes and weights that differ by 100, the image of a large class would then be
fitted best by the answer of a small one.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from fieldmark.config import LossConfig
from fieldmark.errors import ConfigError

LossFn = Callable[[Tensor, Tensor], Tensor]

PerClass = npt.NDArray[np.float64]


def make_loss(config: LossConfig, *, class_counts: Sequence[int]) -> LossFn:
    """Return the loss: logits (B, K) and targets -> scalar, in nats, float32 (float64 of float64).

    cross-entropy   -sum_k target_k log p_k, with p the softmax of the logits
    focal           -sum_k target_k (1 - p_k)^gamma log p_k (Lin et al. 2017, arXiv:1708.02002,
                    equation 4, over a softmax): what is recognised already counts less
    bce             the mean over the classes of K yes-or-no cross-entropies, with p_k the sigmoid
                    of logit k (Wightman et al. 2021, arXiv:2110.00476, section 3). The mean, not
                    the sum, as timm's BinaryCrossEntropy has it: 1 / K of the sum's gradient
    logit-adjusted  cross-entropy of logits + tau log prior, so that the bare logits, which
                    evaluation and the package use, answer as if all classes were equally frequent
                    (Menon et al. 2021, arXiv:2007.07314, equation 10)

    Smoothing mixes the target with the uniform distribution (Szegedy et al. 2015,
    arXiv:1512.00567, section 7). Of logit-adjusted it is prior^tau, scaled to a sum of 1, which is
    uniform once the adjustment is taken off again; the uniform one divided by the prior could rank
    the rarest class above the true one.

    Args:
        class_counts: images of each class in the train split, K numbers.

    Raises:
        ConfigError: a list of weights whose length is not K, or 0 for all classes with images.
    """
    counts = np.asarray(class_counts, dtype=np.int64)
    weights = class_weights(config, counts)
    smoothing = config.label_smoothing
    if config.name == "bce":
        return _bce(smoothing, config.bce_threshold, weights)
    if config.name == "focal":
        return _focal(config.focal_gamma, _Targets(smoothing, weights))
    if config.name == "logit-adjusted":
        return _logit_adjusted(config.adjust_tau * log_prior(counts), smoothing, weights)
    return _cross_entropy(smoothing, weights)


def class_weights(config: LossConfig, counts: npt.NDArray[np.int64]) -> PerClass | None:
    """Return what an image of each class counts, or None where all count 1.

    Computed weights have a mean of 1 over the train images. A class without images has weight 0.
    Listed ones are taken as they are.

    Source: "effective" is Cui et al. 2019, arXiv:1901.05555, proposition 1.
    """
    rule = config.class_weights
    if rule == "none":
        return None
    if isinstance(rule, tuple):
        return _listed(rule, counts)
    # Of an empty class, any number above 0 avoids dividing by it; its weight is 0 in the end.
    n = np.maximum(counts, 1).astype(np.float64)
    if rule == "inverse":
        weights = 1 / n
    else:
        # (1 - beta) / (1 - beta^n) in logarithms: beta^n may be close to 1, or vanish.
        weights = np.expm1(np.log(config.effective_beta)) / np.expm1(
            n * np.log(config.effective_beta)
        )
    weights = np.where(counts > 0, weights, 0.0)
    return weights * (counts.sum() / (weights * counts).sum())


def log_prior(counts: npt.NDArray[np.int64]) -> PerClass:
    """Return the log of each class's share of the train images.

    A class without images counts as if it had one, so that its logit stays finite.
    """
    n = np.maximum(counts, 1).astype(np.float64)
    return np.log(n / n.sum())


def _listed(weights: Sequence[float], counts: npt.NDArray[np.int64]) -> PerClass:
    if len(weights) != len(counts):
        raise ConfigError(
            f"loss.class_weights must have one number for each of the {len(counts)} classes. "
            f"Got {len(weights)}. Order them as the class names."
        )
    found = np.asarray(weights, dtype=np.float64)
    if not found[counts > 0].any():
        raise ConfigError(
            "loss.class_weights must be above 0 for a class with train images. "
            f"Got {list(weights)}. Raise one."
        )
    return found


class _PerClassTensor:
    """One number for each class, kept on the device and in the dtype it was last asked for."""

    def __init__(self, values: PerClass) -> None:
        self._exact = torch.from_numpy(values)
        self._used = self._exact

    def like(self, logits: Tensor) -> Tensor:
        """Return the numbers, (K,), as `logits` are; only the first call copies to the device."""
        if self._used.device != logits.device or self._used.dtype != logits.dtype:
            self._used = self._exact.to(logits)
        return self._used


class _Targets:
    """Targets as (B, K) whose rows are smoothed and sum to what the example counts."""

    def __init__(
        self, smoothing: float, weights: PerClass | None, towards: PerClass | None = None
    ) -> None:
        """Take what to smooth towards: a distribution over the classes, by default uniform."""
        self._smoothing = smoothing
        self._weights = None if weights is None else _PerClassTensor(weights)
        self._towards = None if towards is None else _PerClassTensor(towards)

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        soft_BK = _dense(logits, targets)
        if self._weights is not None:
            soft_BK = soft_BK * self._weights.like(logits)
        if self._smoothing:
            spread = 1 / logits.shape[1] if self._towards is None else self._towards.like(logits)
            spread_BK = soft_BK.sum(1, keepdim=True) * spread
            soft_BK = (1 - self._smoothing) * soft_BK + self._smoothing * spread_BK
        return soft_BK


def _cross_entropy(smoothing: float, weights: PerClass | None) -> LossFn:
    soften = _Targets(smoothing, weights)

    def plain(logits: Tensor, targets: Tensor) -> Tensor:
        logits = _wide(logits)
        targets = targets.to(logits.dtype) if targets.is_floating_point() else targets
        return F.cross_entropy(logits, targets, label_smoothing=smoothing)

    def weighted(logits: Tensor, targets: Tensor) -> Tensor:
        logits = _wide(logits)
        return F.cross_entropy(logits, soften(logits, targets))

    return plain if weights is None else weighted


def _logit_adjusted(adjustment: PerClass, smoothing: float, weights: PerClass | None) -> LossFn:
    shift = _PerClassTensor(adjustment)
    shares = np.exp(adjustment - adjustment.max())
    soften = _Targets(smoothing, weights, towards=shares / shares.sum())

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        logits = _wide(logits)
        return F.cross_entropy(logits + shift.like(logits), soften(logits, targets))

    return loss


def _focal(gamma: float, soften: _Targets) -> LossFn:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        logits = _wide(logits)
        log_p = F.log_softmax(logits, 1)
        # 1 - p without cancellation, and never 0, where the slope of a power below 1 is infinite.
        missing = (-torch.expm1(log_p)).clamp(min=torch.finfo(log_p.dtype).eps)
        terms = soften(logits, targets) * missing**gamma * log_p
        return -terms.sum() / len(logits)

    return loss


def _bce(smoothing: float, threshold: float, weights: PerClass | None) -> LossFn:
    weigh = None if weights is None else _PerClassTensor(weights)

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        logits = _wide(logits)
        soft_BK = _dense(logits, targets)
        present_BK = (soft_BK > threshold).to(soft_BK) if threshold else soft_BK
        wanted_BK = (1 - smoothing) * present_BK + smoothing / logits.shape[1]
        loss_B = F.binary_cross_entropy_with_logits(logits, wanted_BK, reduction="none").mean(1)
        if weigh is not None:
            # By example (Cui et al. 2019, section 4.2): the weight of a class's column would
            # scale its yes and its no alike and leave the balance between them as it was.
            # Not soft_BK @ weights, which autocast would do in 16 bits.
            loss_B = loss_B * (soft_BK * weigh.like(logits)).sum(1)
        return loss_B.mean()

    return loss


def _wide(logits: Tensor) -> Tensor:
    """Return float32 also under autocast: a sum of exponentials loses too much in 16 bits."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _dense(logits: Tensor, targets: Tensor) -> Tensor:
    """Return targets (B, K) in the dtype of the logits."""
    if targets.is_floating_point():
        return targets.to(logits.dtype)
    return F.one_hot(targets, logits.shape[1]).to(logits.dtype)

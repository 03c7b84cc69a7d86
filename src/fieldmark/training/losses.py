"""What is minimised: a function of logits and targets, averaged over the examples."""

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F

from fieldmark.config import LossConfig

LossFn = Callable[[Tensor, Tensor], Tensor]


def make_loss(config: LossConfig) -> LossFn:
    """Return the loss: logits (B, K) and targets, int64 (B,) or float (B, K) -> scalar, float32.

    Cross-entropy is -sum_k target_k log p_k, in nats, also for soft targets. Smoothing mixes the
    target with the uniform distribution (Szegedy et al. 2015, arXiv:1512.00567, section 7).
    """
    smoothing = config.label_smoothing

    def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
        # float32 also under autocast: the sum of exponentials loses too much in 16 bits.
        return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)

    return cross_entropy

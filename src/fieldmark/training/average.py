"""A moving average of a network's weights."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

WARMUP_POWER = 2 / 3
_HAS_BEGUN = "has_begun"


class MovingAverage:
    """The exponential moving average of a network: parameters and norm statistics alike.

    It moves every `every` updates, and which update moves it by how much is a function of the
    update's number alone, so a resumed run goes on as it would have. The k-th move (from 0) keeps
    `decay` of the average; move 0 copies the network, whose random start would linger otherwise.
    With a warm-up, move k keeps 1 - (1 + k)^(-2/3), at most `decay`: a short run is then not an
    average of its worst weights.

    Source: Polyak and Juditsky 1992; the warm-up as timm's ModelEmaV3, whose values these are for
        every=1.
    """

    def __init__(self, network: nn.Module, decay: float, *, warmup: bool, every: int = 1) -> None:
        self.module = copy.deepcopy(network).eval()
        self._decay, self._warmup, self._every = decay, warmup, every
        self._network = network
        # Whether it has moved at all: the first update, which would copy the network, may have
        # been skipped.
        self._has_begun = torch.zeros((), dtype=torch.bool, device=_device(network))

    def decay_at(self, step: int) -> float:
        """Return which fraction of the average update `step` (1 for the first) keeps."""
        if step % self._every:
            return 1.0
        move = step // self._every - 1
        if move <= 0:
            return 0.0
        warm: float = 1 - (1 + move) ** -WARMUP_POWER
        return min(warm, self._decay) if self._warmup else self._decay

    @torch.no_grad()
    def update(self, step: int, is_finite: Tensor | None = None) -> None:
        """Take in the network as update `step` left it.

        Args:
            is_finite: (), bool, on the network's device. False: the update was skipped, and the
                average stays as it is, bit for bit. It is not read here, which would wait for it.
        """
        decay = self.decay_at(step)
        if decay == 1.0:
            return
        share = torch.where(self._has_begun, 1 - decay, 1.0)
        for average, value in zip(_tensors(self.module), _tensors(self._network), strict=True):
            # A choice, not a product with 0: norm statistics may hold NaN after a bad update.
            taken = value if is_finite is None else torch.where(is_finite, value, average)
            if average.is_floating_point():
                average.lerp_(taken, share.to(average.dtype))
            else:
                average.copy_(taken)
        self._has_begun |= True if is_finite is None else is_finite

    def state_dict(self) -> dict[str, Tensor]:
        """Return what a checkpoint keeps: the averaged network's own state, and if it has moved."""
        return self.module.state_dict() | {_HAS_BEGUN: self._has_begun}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state of a network of the same kind."""
        self.module.load_state_dict(weights_of(state))
        self._has_begun.fill_(bool(state.get(_HAS_BEGUN, True)))


def weights_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the averaged network's own state, out of an average's."""
    return {name: value for name, value in state.items() if name != _HAS_BEGUN}


def _device(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def _tensors(network: nn.Module) -> list[Tensor]:
    return list(network.state_dict().values())

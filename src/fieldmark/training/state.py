"""Everything that training moves: what a checkpoint holds."""

import copy
from typing import Any

import torch
from torch import nn

from fieldmark.training.average import MovingAverage, weights_of
from fieldmark.training.lookahead import Lookahead


class TrainState:
    """Network, optimizer, gradient scaler and averages of a run."""

    def __init__(
        self,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        *,
        average: MovingAverage | None,
        lookahead: Lookahead | None,
    ) -> None:
        self.network, self._optimizer, self._scaler = network, optimizer, scaler
        self.average, self._lookahead = average, lookahead

    def after_update(self, step: int, is_finite: torch.Tensor) -> None:
        """Let the averages follow the weights, after update `step`."""
        if self._lookahead is not None:
            self._lookahead.update(step, is_finite)
        if self.average is not None:
            self.average.update(step, is_finite)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values: references, not copies."""
        return {
            "network": self.network.state_dict(),
            "ema": None if self.average is None else self.average.state_dict(),
            "lookahead": None if self._lookahead is None else self._lookahead.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }

    def copied(self) -> dict[str, Any]:
        """Return a copy of the state, which later updates do not touch."""
        return copy.deepcopy(self.state_dict())

    def load(self, state: dict[str, Any]) -> None:
        """Take the state of a checkpoint."""
        self.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            self.average.load_state_dict(state["ema"])
        if self._lookahead is not None:
            self._lookahead.load_state_dict(state["lookahead"])

    def averaged(self) -> nn.Module:
        """Return the network to evaluate, in eval mode: the average where there is one."""
        network = self.network if self.average is None else self.average.module
        return network.eval()

    def load_averaged(self, state: dict[str, Any]) -> nn.Module:
        """Return a copy of the network to evaluate with the weights of a checkpoint."""
        chosen = copy.deepcopy(self.averaged())
        weights = state["network"] if self.average is None else weights_of(state["ema"])
        chosen.load_state_dict(weights)
        return chosen.eval()

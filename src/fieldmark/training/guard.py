"""An update with a non-finite loss or gradient changes nothing."""

from collections.abc import Iterator

import torch
from timm.optim import RMSpropTF
from torch import Tensor, nn


class Guard:
    """Takes an update back when its loss or gradient is not finite.

    On a CPU the flag is read and the optimizer is not called. On a GPU reading it would wait for
    the device, so that the update is made and then undone there, element by element, where the
    flag is false; weights, optimizer state and norm statistics are copied for that. What an
    optimizer counts on the host (the step number of LAMB) is not undone.
    """

    def __init__(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        # All buffers: batch norms are not the only modules that keep statistics.
        self._buffers = list(network.buffers())
        self.before: dict[int, Tensor] = {}  # id of a buffer -> what it was before this update

    @torch.no_grad()
    def before_forward(self) -> None:
        """Keep the buffers, of which the forward pass changes the norm statistics."""
        self.before = {id(buffer): buffer.clone() for buffer in self._buffers}

    @torch.no_grad()
    def step(self, scaler: torch.amp.GradScaler, is_finite: Tensor) -> None:
        """Make the optimizer's step if `is_finite`, a bool scalar on the device; else undo all."""
        if is_finite.device.type == "cpu":
            if is_finite:
                scaler.step(self._optimizer)
            else:
                for buffer in self._buffers:
                    buffer.copy_(self.before[id(buffer)])
            return
        kept = [(tensor, tensor.clone()) for tensor, _ in self._moving()]
        known = {id(tensor) for tensor, _ in kept}
        scaler.step(self._optimizer)
        # State that this very step made becomes what it was made as.
        kept += [(t, self._as_made(t, key)) for t, key in self._moving() if id(t) not in known]
        kept += [(buffer, self.before[id(buffer)]) for buffer in self._buffers]
        for tensor, before in kept:
            tensor.copy_(torch.where(is_finite, tensor, before))

    def _as_made(self, state: Tensor, key: str) -> Tensor:
        is_one = key == "square_avg" and isinstance(self._optimizer, RMSpropTF)
        return torch.ones_like(state) if is_one else torch.zeros_like(state)

    def _moving(self) -> Iterator[tuple[Tensor, str]]:
        """Weights, and the optimizer's tensors on their device, with their names in its state."""
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter, ""
                for key, value in self._optimizer.state.get(parameter, {}).items():
                    if isinstance(value, Tensor) and value.device == parameter.device:
                        yield value, key

"""Muon: momentum whose every step is made orthogonal, for convolution filters.

Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; as used in
airbench94_muon, with filters rescaled before each step.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# The quintic's coefficients: they raise small singular values fast and leave them near 1, not at
# it. Source: Jordan et al. 2024.
_A, _B, _C = 3.4445, -4.7750, 2.0315
_ITERATIONS = 3


class Muon(torch.optim.Optimizer):
    """Muon for groups marked `filters`, SGD for all others.

    Filters (out, in, kh, kw) are taken as matrices (out, in * kh * kw). Before a step each weight
    is scaled to a norm of sqrt(out), so that `lr` is a relative step and weight decay has no part.
    The others move by SGD with `momentum`, Nesterov's or not.
    """

    def __init__(
        self, groups: list[dict[str, Any]], lr: float, momentum: float, nesterov: bool
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "weight_decay": 0.0,
            "filters": False,
        }
        super().__init__(groups, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Make one update of every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("Muon takes no closure.")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                direction = self._direction(parameter, group)
                if group["filters"]:
                    parameter.mul_(len(parameter) ** 0.5 / parameter.norm())
                    flat = direction.reshape(len(direction), -1)
                    direction = orthogonal(flat).view_as(parameter)
                parameter.add_(direction, alpha=-group["lr"])

    def _direction(self, parameter: Tensor, group: dict[str, Any]) -> Tensor:
        """Return the gradient with decay and momentum, as torch.optim.SGD defines them."""
        gradient = parameter.grad
        if gradient is None:
            raise ValueError("a parameter without a gradient has no direction")
        if group["weight_decay"]:
            gradient = gradient.add(parameter, alpha=group["weight_decay"])
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = gradient.clone()
        else:
            state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        average: Tensor = state["momentum_buffer"]
        if group["nesterov"]:
            return gradient.add(average, alpha=group["momentum"])
        return average.clone() if group["filters"] else average


def orthogonal(matrix: Tensor, iterations: int = _ITERATIONS) -> Tensor:
    """Return a matrix (m, n) with the same singular vectors and singular values near 1.

    Newton-Schulz iterations of a quintic, without a decomposition. Float32 on a CPU, where
    bfloat16 would be slower.
    """
    x = matrix if matrix.device.type == "cpu" else matrix.bfloat16()
    x = x / (x.norm() + 1e-7)
    is_tall = x.shape[0] > x.shape[1]
    if is_tall:
        x = x.mT
    for _ in range(iterations):
        gram = x @ x.mT
        x = _A * x + torch.addmm(gram, gram, gram, beta=_B, alpha=_C) @ x
    return (x.mT if is_tall else x).to(matrix.dtype)

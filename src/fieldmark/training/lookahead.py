"""Lookahead: slow weights that follow the fast ones, and pull them back.

Source: Zhang et al. 2019, arXiv:1907.08610; with airbench's growing share (Jordan 2024,
arXiv:2404.00498, section 3.4): at update t of T the slow weights keep decay^every * (t / T)^3.
"""

import torch
from torch import Tensor, nn


class Lookahead:
    """Slow copies of a network's floating-point state, exchanged every few updates."""

    def __init__(self, network: nn.Module, *, decay: float, every: int, total_steps: int) -> None:
        self._fast = [t for t in network.state_dict().values() if t.is_floating_point()]
        self._slow = [t.clone() for t in self._fast]
        self._kept = decay**every
        self._every, self._total = every, total_steps

    @torch.no_grad()
    def update(self, step: int, is_finite: Tensor | None = None) -> None:
        """After update `step`: move the slow weights towards the fast ones, and adopt them.

        At the last update the slow weights are adopted as they are.

        Args:
            is_finite: (), bool, on the network's device. False: the update was skipped, and so is
                the exchange. It is not read here, which would wait for it.
        """
        if step == self._total:
            torch._foreach_copy_(self._fast, self._slow)
            return
        if step % self._every:
            return
        share = 1 - self._kept * (step / self._total) ** 3
        for slow, fast in zip(self._slow, self._fast, strict=True):
            moved = torch.lerp(slow, fast, share)
            if is_finite is not None:
                moved = torch.where(is_finite, moved, slow)
            slow.copy_(moved)
            fast.copy_(moved if is_finite is None else torch.where(is_finite, moved, fast))

    def state_dict(self) -> dict[str, list[Tensor]]:
        """Return the slow weights."""
        return {"slow": self._slow}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        """Take the slow weights of a checkpoint."""
        for mine, theirs in zip(self._slow, state["slow"], strict=True):
            mine.copy_(theirs)

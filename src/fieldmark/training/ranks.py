"""The processes that train one network together, one rank each."""

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

T = TypeVar("T")


class Ranks(Protocol):
    """What a run needs to know of the other processes. All call its methods in the same order."""

    rank: int
    world: int

    def wrap(self, forward: Any, network: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return `forward` (the network, or its compiled form) as the ranks run it together."""

    def seed_parts(self) -> tuple[int, ...]:
        """Return what tells this rank's random numbers from those of others."""

    def accumulating(
        self, forward: Callable[[Tensor], Tensor], *, is_last: bool
    ) -> AbstractContextManager[object]:
        """Return the context of one backward pass; the last of an update exchanges gradients."""

    def contribute_nothing(self, forward: Callable[[Tensor], Tensor], images: Tensor) -> None:
        """Take part in the exchange with no examples; `images` are (0, 3, H, W)."""

    def combine_statistics(
        self, network: nn.Module, before: Mapping[int, Tensor], num_passes: int
    ) -> None:
        """Give every rank the norm statistics that one process would have after all passes.

        Args:
            before: id of each of the network's buffers -> what it was before this update, the
                same everywhere.
            num_passes: forward passes of each rank in this update.
        """

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over the ranks."""

    def largest(self, number: int) -> int:
        """Return the largest of the hosts' numbers."""

    def share(self, value: T) -> T:
        """Return what rank 0 has; what others have is dropped."""

    def gather(self, value: T) -> list[T]:
        """Return what each rank has, in order."""


class Alone:
    """One process."""

    rank = 0
    world = 1

    def wrap(self, forward: Any, network: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return `forward` itself."""
        return forward

    def seed_parts(self) -> tuple[int, ...]:
        """Return nothing: there is no other."""
        return ()

    def accumulating(
        self, forward: Callable[[Tensor], Tensor], *, is_last: bool
    ) -> AbstractContextManager[object]:
        """Return a context that does nothing."""
        return contextlib.nullcontext()

    def contribute_nothing(self, forward: Callable[[Tensor], Tensor], images: Tensor) -> None:
        """Do nothing."""

    def combine_statistics(
        self, network: nn.Module, before: Mapping[int, Tensor], num_passes: int
    ) -> None:
        """Do nothing."""

    def total(self, values: Tensor) -> Tensor:
        """Return the values."""
        return values

    def largest(self, number: int) -> int:
        """Return the number."""
        return number

    def share(self, value: T) -> T:
        """Return the value."""
        return value

    def gather(self, value: T) -> list[T]:
        """Return the value alone."""
        return [value]

"""Ranks as processes: DistributedDataParallel under torchrun, or `fieldmark train --devices N`."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from fieldmark.errors import ConfigError, FieldmarkError, RankLost
from fieldmark.runtime.log import console
from fieldmark.training.ranks import Alone, Ranks

T = TypeVar("T")

_WAIT = timedelta(minutes=30)  # for a rank that decodes, or measures what the others wait for
_LET_GO_S = 0.2  # for threads of gloo that hold the last tensors; see fieldmark/__main__.py
_FIRST_ERROR = "fieldmark/first-error"
_CPU = torch.device("cpu")


@contextmanager
def joined() -> Iterator[Ranks]:
    """Yield the ranks that torchrun started, or this process alone.

    An error is told by the rank that met it first; the others end with its status, in silence.

    Raises:
        RankLost: another rank ended.
        ConfigError: the environment is not what torchrun sets.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if not world.isdecimal() or int(world) == 0:
        raise ConfigError(
            f"the environment's WORLD_SIZE must be the number of processes that train together, "
            f"which torchrun sets. Got {world!r}. Unset it to train in one process."
        )
    if int(world) == 1:
        yield Alone()
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        dist.init_process_group(backend, timeout=_WAIT)
    except ValueError as error:  # torch's: a variable is missing, or no number
        raise ConfigError(
            f"WORLD_SIZE={world} asks for processes that train together, and the environment lacks "
            f"what torchrun sets ({error}). Start them with torchrun, or unset WORLD_SIZE."
        ) from None
    ranks = Processes()
    console.quiet = ranks.rank > 0
    try:
        yield ranks
    except Exception as error:
        told = error
        if isinstance(error, RuntimeError) and _is_lost(error):
            told = RankLost(
                "another process of the run ended, so that this one cannot go on. Once its cause "
                "is known, resume with: fieldmark train --resume --out DIR"
            )
        status = told.exit_status if isinstance(told, FieldmarkError) else 1
        first = ranks.first_status(status)
        if first is not None:
            raise SystemExit(first) from None
        console.quiet = False
        if told is not error:
            raise told from error
        raise
    else:
        console.quiet = False
        time.sleep(_LET_GO_S)
        dist.destroy_process_group()


def local_world() -> int:
    """Return how many ranks share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class Processes:
    """The ranks of torch's default process group."""

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()

    def wrap(self, forward: Any, network: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return DistributedDataParallel of `forward`; buffers are not exchanged by it."""
        is_cuda = next(network.parameters()).is_cuda
        wrapped: Callable[[Tensor], Tensor] = DistributedDataParallel(
            forward,
            device_ids=[torch.cuda.current_device()] if is_cuda else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
        return wrapped

    def seed_parts(self) -> tuple[int, ...]:
        """Return the rank: each draws its own dropout."""
        return (self.rank,)

    def accumulating(
        self, forward: Callable[[Tensor], Tensor], *, is_last: bool
    ) -> AbstractContextManager[object]:
        """Return a context without exchange for all but the last backward pass."""
        if is_last or not isinstance(forward, DistributedDataParallel):
            return contextlib.nullcontext()
        context: AbstractContextManager[object] = forward.no_sync()
        return context

    def contribute_nothing(self, forward: Callable[[Tensor], Tensor], images: Tensor) -> None:
        """Go through forward and backward with an empty share: zero gradients, no statistics."""
        norms = [m for m in _modules(forward) if isinstance(m, _BatchNorm) and m.training]
        if any(isinstance(norm, nn.SyncBatchNorm) for norm in norms):
            norms = []  # they wait for each other, and take an empty batch into account
        else:
            images = images.new_zeros(2, *images.shape[1:])
        for norm in norms:
            norm.eval()
        try:
            (forward(images).sum() * 0).backward()
        finally:
            for norm in norms:
                norm.train()

    def combine_statistics(
        self, network: nn.Module, before: Mapping[int, Tensor], num_passes: int
    ) -> None:
        """Combine what each rank added to its norm statistics, as if one had made all passes.

        A pass takes a statistic r to (1 - m) r + m b, with m the momentum and b that of the batch.
        With k = (1 - m)^passes and ranks 0 .. W - 1 each at r_i from the same r, one process that
        made the passes in order of rank ends at sum_i k^(W-1-i) r_i - r sum_(j=1)^(W-1) k^j.
        """
        norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.training]
        parts: list[tuple[Tensor, Tensor, float]] = []  # statistic, as it was, k
        for norm in norms:
            if isinstance(norm, nn.SyncBatchNorm):
                continue
            known = [(buffer, before[id(buffer)]) for buffer in norm.buffers(recurse=False)]
            if norm.momentum is None:
                raise ConfigError(
                    "several processes need batch norms with a momentum. Got a cumulative average."
                )
            kept = (1 - norm.momentum) ** num_passes
            for now, was in known:
                if now.is_floating_point():
                    parts.append((now, was, kept))
                else:
                    now.copy_(was + (now - was) * self.world)
        if not parts:
            return
        share = [kept ** (self.world - 1 - self.rank) for _, _, kept in parts]
        flat = torch.cat([now.flatten() * s for (now, _, _), s in zip(parts, share, strict=True)])
        dist.all_reduce(flat)
        for (now, was, kept), summed in zip(
            parts, flat.split([now.numel() for now, _, _ in parts]), strict=True
        ):
            surplus = sum(kept**j for j in range(1, self.world))
            now.copy_((summed - was.flatten() * surplus).view_as(now))

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over the ranks, on the device of the values."""
        summed = values.clone()
        dist.all_reduce(summed)
        return summed

    def largest(self, number: int) -> int:
        """Return the largest number of all; hosts exchange it, and no GPU waits for it."""
        known = torch.tensor([number])
        dist.all_reduce(known, op=dist.ReduceOp.MAX)
        return int(known.item())

    def share(self, value: T) -> T:
        """Return rank 0's value."""
        box = [value if self.rank == 0 else None]
        dist.broadcast_object_list(box, src=0, device=_CPU)
        shared: T = box[0]  # type: ignore[assignment]
        return shared

    def gather(self, value: T) -> list[T]:
        """Return every rank's value."""
        box: list[Any] = [None] * self.world
        dist.all_gather_object(box, value)
        return box

    def first_status(self, mine: int) -> int | None:
        """Return the exit status of the rank that failed first, or None if that is this one.

        Where the store that knows is gone, so is the rank that kept it, and has told.
        """
        told = f"{self.rank}:{mine}"
        try:
            store = dist.distributed_c10d._get_default_store()
            first = store.compare_set(_FIRST_ERROR, "", told).decode()
        except (RuntimeError, ValueError):
            return mine
        return None if first == told else int(first.split(":")[1])


def take_gpu() -> None:
    """Let this process use the GPU of its local rank.

    Raises:
        ConfigError: fewer GPUs than processes on this machine.
    """
    number, num_gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local_world() > num_gpus:
        raise ConfigError(
            f"each process on a machine needs a GPU of its own. Got {local_world()} processes and "
            f"{num_gpus} GPUs. Start {num_gpus}, or set train.device=cpu."
        )
    torch.cuda.set_device(number)


def _is_lost(error: RuntimeError) -> bool:
    """Whether an error comes of another process being gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()


def _modules(forward: Callable[[Tensor], Tensor]) -> Iterator[nn.Module]:
    return forward.modules() if isinstance(forward, nn.Module) else iter(())

"""How much memory an update takes, known before the first one.

On a CPU nothing reports that memory is short: the kernel kills the process. So the update is
rehearsed with 2 and with 4 images before a run begins, and what more images would take follows.
"""

import copy
import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fieldmark.config import TrainConfig
from fieldmark.errors import OutOfMemory
from fieldmark.model import Freeze, set_train_mode
from fieldmark.runtime.files import size_text
from fieldmark.runtime.memory import Room, available_bytes, peak_resident_bytes

_REHEARSED = (2, 4)  # images; one alone has no variance for a batch norm over 1x1 pixels
# What a process grows by, over the tensors it holds: scratch memory of convolutions, gaps in the
# heap; and once, the code of kernels. With these two the estimate was 3 % below to 20 % above the
# growth of a process; a heap with many gaps took a third more (docs/decisions/0007).
_OVER_TENSORS = 1.2
_ONCE_BYTES = 100_000_000


class Run(Protocol):
    """A computation that takes so many images at once."""

    def __call__(self, num_images: int, /) -> object:
        """Compute; what it returns is not used."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of tensors held at each allocation of a computation: a + b * images, for each."""

    fixed: tuple[float, ...]
    per_image: tuple[float, ...]

    def tensor_bytes(self, num_images: int) -> int:
        """Return the most bytes of tensors that are held at once with `num_images`."""
        held = (a + b * num_images for a, b in zip(self.fixed, self.per_image, strict=True))
        return int(max(held, default=0.0))

    def process_bytes(self, num_images: int) -> int:
        """Return by how much a process on the CPU will grow; see above for how exact it is."""
        return int(self.tensor_bytes(num_images) * _OVER_TENSORS) + _ONCE_BYTES

    def most_images(self, room_bytes: int) -> int:
        """Return the largest number of images for whose `process_bytes` there is room; or 0."""
        limit = (room_bytes - _ONCE_BYTES) / _OVER_TENSORS
        most = float(2**31)
        for a, b in zip(self.fixed, self.per_image, strict=True):
            if a > limit:
                return 0
            if b > 0:
                most = min(most, (limit - a) / b)
        return int(most)


def measure_memory(run: Run) -> Memory:
    """Return what `run(num_images)` holds, from two small runs of it.

    The operations are the same whatever the number of images, so the bytes held at each of them
    are a line through two points, and the peak is the highest of these lines. Going by the two
    peaks alone would not do: with few images the peak is elsewhere, at the optimizer's step.
    """
    small, large = _REHEARSED
    first, second = _held(run, small), _held(run, large)
    if len(first) != len(second):  # its operations depend on the images: then the peaks only
        first, second = [max(first)], [max(second)]
    slopes = [(b - a) / (large - small) for a, b in zip(first, second, strict=True)]
    fixed = [a - slope * small for a, slope in zip(first, slopes, strict=True)]
    return Memory(tuple(fixed), tuple(slopes))


def _held(run: Run, num_images: int) -> list[int]:
    with _Held() as held:
        run(num_images)
    return held.timeline


class _Held(TorchDispatchMode):
    """Follows the bytes of the tensors that came into being in the block and are still held."""

    def __init__(self) -> None:
        super().__init__()
        self.timeline: list[int] = []
        self._total = 0
        self._known: dict[int, weakref.finalize[Any, Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if _is_dense(t)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if _is_dense(tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self._known and id(storage) not in before:
                    self._add(storage)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, num_bytes = id(storage), storage.nbytes()
        self._total += num_bytes
        self.timeline.append(self._total)
        self._known[key] = weakref.finalize(storage, self._drop, key, num_bytes)

    def _drop(self, key: int, num_bytes: int) -> None:
        del self._known[key]
        self._total -= num_bytes


def _is_dense(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided


def rehearsal(
    network: nn.Module,
    *,
    make_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    loss_fn: Callable[[Tensor, Tensor], Tensor],
    autocast: Callable[[], AbstractContextManager[object]],
    freeze: Freeze,
    image_shape: Sequence[int],
    channels_last: bool,
    num_updates: int = 2,
) -> Run:
    """Return a run of updates on a copy of the network, on noise.

    The network's weights, norm statistics and gradients, and the global random numbers, stay as
    they are. The copy is held as long as the run is.

    Args:
        image_shape: (3, H, W) of the largest images that training shows.
        num_updates: with 2, the second one has the optimizer's state beside its activations.
    """
    device = next(network.parameters()).device
    twin = copy.deepcopy(network)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    twin = twin.to(memory_format=layout)

    def run(num_images: int) -> None:
        optimizer = make_optimizer(twin)
        set_train_mode(twin, freeze)
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                for _ in range(num_updates):
                    images = torch.randn(num_images, *image_shape, device=device)
                    labels = torch.zeros(num_images, dtype=torch.int64, device=device)
                    with autocast():
                        loss = loss_fn(twin(images.to(memory_format=layout)), labels)
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
        finally:  # also after it ran out of memory
            twin.zero_grad(set_to_none=True)

    return run


def validation_rehearsal(network: nn.Module, image_shape: Sequence[int]) -> Run:
    """Return a run of the network as validation uses it: in eval mode, without gradients."""
    device = next(network.parameters()).device
    twin = copy.deepcopy(network).eval()

    def run(num_images: int) -> None:
        with torch.no_grad():
            twin(torch.zeros(num_images, *image_shape, device=device))

    return run


def copies_bytes(network: nn.Module, *, num_averages: int) -> int:
    """Return what a run holds of its weights beside an update, in bytes.

    Each average is a copy; and until the first checkpoint there is one more of the network and of
    each average, to go back to.

    Args:
        num_averages: of train.ema_decay and optim.lookahead_steps, those that are on.
    """
    one = sum(tensor.nbytes for tensor in network.state_dict().values())
    return one * (1 + 2 * num_averages)


def check_memory(
    train: TrainConfig,
    update: Run,
    validation: Run | None = None,
    *,
    eval_batch_size: int,
    device: torch.device,
    beside_bytes: int = 0,
    num_ranks: int = 1,
    ranks_here: int = 1,
) -> int | None:
    """Return by how much a run on the CPU will grow, in bytes; refuse one that does not fit.

    On a GPU nothing is estimated (None): torch says there when memory is short.

    Args:
        update, validation: rehearsals of them.
        beside_bytes: what else each process will hold: `copies_bytes`, the batches that workers
            prepare.
        num_ranks: processes that divide an update; `ranks_here` of them share this memory.

    Raises:
        OutOfMemory: names what is needed, what there is, and what would fit.
    """
    if device.type == "cuda":
        return None
    room = available_bytes()
    room = Room(max(0, room.num_bytes // ranks_here - beside_bytes), room.source)
    needed = check_update_fits(
        measure_memory(update),
        room,
        batch_size=train.examples_per_update,
        accumulation_steps=train.accumulation_steps,
        num_ranks=num_ranks,
    )
    if validation is None:
        return needed
    return max(needed, check_validation_fits(measure_memory(validation), room, eval_batch_size))


def check_update_fits(
    memory: Memory, room: Room, *, batch_size: int, accumulation_steps: int, num_ranks: int = 1
) -> int:
    """Return by how much the process will grow on the CPU, in bytes; refuse what does not fit.

    Raises:
        OutOfMemory: names what the update takes, what there is, and what would fit.
    """
    at_a_time = batch_size // (accumulation_steps * num_ranks)
    needed = memory.process_bytes(at_a_time)
    if needed <= room.num_bytes:
        return needed
    most = memory.most_images(room.num_bytes)
    raise OutOfMemory(
        f"an update of train.batch_size={batch_size} must fit into the {size_text(room.num_bytes)} "
        f"left by {room.source}. Got about {size_text(needed)} for "
        f"{at_a_time} images at a time. "
        + advice(
            most,
            batch_size=batch_size,
            accumulation_steps=accumulation_steps,
            num_ranks=num_ranks,
        )
    )


def check_validation_fits(memory: Memory, room: Room, batch_size: int) -> int:
    """As `check_update_fits`, for a batch of validation.

    Raises:
        OutOfMemory: names what it takes, what there is, and the largest eval.batch_size that fits.
    """
    needed = memory.process_bytes(batch_size)
    if needed <= room.num_bytes:
        return needed
    most = memory.most_images(room.num_bytes)
    action = f"Set eval.batch_size={most}." if most else "Choose a smaller network or image size."
    raise OutOfMemory(
        f"validation with eval.batch_size={batch_size} must fit into the "
        f"{size_text(room.num_bytes)} left by {room.source}. Got about {size_text(needed)}. "
        f"{action}"
    )


def advice(
    most_images: int, *, batch_size: int, accumulation_steps: int, num_ranks: int = 1
) -> str:
    """Return what to set when only `most_images` fit at a time."""
    if not most_images:
        return "Not one image fits: choose a smaller network or model.image_px."
    parts = (
        steps
        for steps in range(accumulation_steps + 1, batch_size + 1)
        if batch_size % (steps * num_ranks) == 0
        and batch_size // (steps * num_ranks) <= most_images
    )
    smaller = most_images * accumulation_steps * num_ranks
    steps = next(parts, batch_size)
    return (
        f"Set train.accumulation_steps={steps}, the same update in smaller parts, "
        f"or train.batch_size={smaller}, the largest that fits."
    )


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory in use so far: of the process on a CPU, of tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_resident_bytes()

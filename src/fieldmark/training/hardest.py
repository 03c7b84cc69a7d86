"""Training on the hardest images of each update alone, as a small network sees them.

The small network is trained first, on the very updates that the large one will see; what it finds
easy, the large one would learn little from.
Source: Jordan 2024, arXiv:2404.00498, and the program airbench96_faster.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.data.transfer import to_device
from fieldmark.errors import NonFiniteLoss, RunError
from fieldmark.model import Architecture, build
from fieldmark.runtime.files import sha256_bytes, write_atomic
from fieldmark.runtime.log import progress, say
from fieldmark.runtime.seed import derive_seed
from fieldmark.training.loop import UpdateRule, set_rates
from fieldmark.training.session import Batch, Batches

PROXY = {"widths": (32, 64, 64)}
_LEARN_EVERY = 4  # updates; the others are only looked at, which is a third of the work
# What it costs of a full training of the small network: a forward pass is a third of an update.
PROXY_SHARE = 1 / _LEARN_EVERY + (1 - 1 / _LEARN_EVERY) / 3
_FILE = "hardest.npy"

Masks = npt.NDArray[np.bool_]  # (updates, examples per update): True stays


class HardestBatches:
    """Batches without the examples that a mask leaves out."""

    def __init__(self, batches: Batches, masks: Masks, accumulation_steps: int) -> None:
        self._batches, self._masks, self._parts = batches, masks, accumulation_steps

    @property
    def steps_per_epoch(self) -> int:
        """Updates in one pass over the data."""
        return self._batches.steps_per_epoch

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Yield what is left of each micro-batch, until the last update that was looked at."""
        parts = self._batches.batches(start_step)
        for mask in self._masks[start_step:]:
            for kept in np.split(mask, self._parts):
                images, targets = next(parts)
                chosen = to_device(np.flatnonzero(kept), images.device)
                yield images[chosen], targets[chosen]


def proxy_network(num_classes: int, seed: int) -> nn.Module:
    """Return the small network, a narrow airnet."""
    torch.manual_seed(derive_seed(seed, "proxy"))
    return build(Architecture("airnet", num_classes, dict(PROXY)))


def settle_hardest(
    folder: Path,
    rule: UpdateRule,
    batches: Batches,
    *,
    total_steps: int,
    keep: int,
    lr_factor: Callable[[int], float],
    decide_once: Callable[[str, Callable[[], tuple[str, str]]], str],
) -> Masks:
    """Return which examples stay: found by a run's first process, kept in its folder.

    Args:
        rule: of the small network, with whole updates.
        keep: examples of an update that stay.

    Raises:
        RunError: the file is not the one that the run has decided on.
    """
    path = folder / _FILE

    def find() -> tuple[str, str]:
        masks = find_hardest(rule, batches, total_steps=total_steps, keep=keep, lr_factor=lr_factor)
        packed = np.packbits(masks, axis=1).tobytes()
        write_atomic(path, packed)
        return sha256_bytes(packed), f"{_FILE}: {keep} of {rule.batch_size} examples an update"

    digest = decide_once("hardest", find)
    packed = path.read_bytes() if path.exists() else b""
    if sha256_bytes(packed) != digest:
        raise RunError(f"{path} must be as the run wrote it. It was changed. Start the run anew.")
    rows = np.frombuffer(packed, dtype=np.uint8).reshape(total_steps, -1)
    masks: Masks = np.unpackbits(rows, axis=1, count=rule.batch_size).astype(bool)
    return masks


def find_hardest(
    rule: UpdateRule,
    batches: Batches,
    *,
    total_steps: int,
    keep: int,
    lr_factor: Callable[[int], float],
) -> Masks:
    """Train the rule's network, and return the `keep` examples of highest loss in each update.

    An example's loss is that of the moment its update comes, before the network learns from it.
    """
    say(f"a small network picks the {keep} hardest of {rule.batch_size} examples in each update")
    masks = np.zeros((total_steps, rule.batch_size), dtype=bool)
    source = batches.batches(0)
    with progress("picking", total_steps * rule.batch_size, "images") as bar:
        for step in range(total_steps):
            set_rates(rule, step, lr_factor(step))
            losses = _losses(rule, source, learns=step % _LEARN_EVERY == 0)
            if not torch.isfinite(losses).all():
                raise NonFiniteLoss(
                    "the small network that picks the hardest images has losses that are not "
                    f"finite in update {step + 1}. Lower optim.lr, or set data.keep_hardest_frac=1."
                )
            masks[step, losses.topk(keep).indices.cpu().numpy()] = True
            bar.advance(rule.batch_size)
    close = getattr(source, "close", None)
    if close is not None:
        close()
    return masks


def _losses(rule: UpdateRule, source: Iterator[Batch], *, learns: bool) -> Tensor:
    """Return the cross-entropy of each example of an update; make the update if it `learns`."""
    rule.network.train()
    losses = []
    for _ in range(rule.accumulation_steps):
        images, targets = next(source)
        with torch.set_grad_enabled(learns), rule.autocast():
            logits = rule.network(images)
            if learns:
                share = len(targets) / (1 if rule.sums_examples else rule.batch_size)
                (rule.loss_fn(logits, targets) * share).backward()
        losses.append(F.cross_entropy(logits.detach().float(), targets, reduction="none"))
    if learns:
        rule.optimizer.step()
        rule.optimizer.zero_grad(set_to_none=True)
    return torch.cat(losses)

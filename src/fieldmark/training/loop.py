"""The update, as a generator: no callbacks, no logger, no flags.

Shapes: B examples per forward pass, K classes, H and W pixels.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fieldmark.model import Freeze, set_train_mode
from fieldmark.runtime.seed import derive_seed
from fieldmark.training.guard import Guard
from fieldmark.training.losses import LossFn
from fieldmark.training.ranks import Alone, Ranks


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer update. Tensors stay on the device: reading one waits for it."""

    index: int  # 1 for the first update
    loss: Tensor  # (), float32, mean over the update's examples
    grad_norm: Tensor  # (), float32, before clipping, of the mean loss
    is_finite: Tensor  # (), bool: False means that this update changed nothing
    inputs_are_finite: Tensor  # (), bool: False means that the images are at fault
    lr_factor: float  # this update's lr / initial lr


def _no_slowdown(_step: int) -> float:
    return 1.0


@dataclass(frozen=True, slots=True)
class UpdateRule:
    """What an update consists of, beside the data."""

    network: nn.Module
    forward: Callable[[Tensor], Tensor]  # the network, or its compiled form
    loss_fn: LossFn
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    lr_factor: Callable[[int], float]  # update from 0 -> multiple of each group's initial_lr; pure
    autocast: Callable[[], AbstractContextManager[object]]
    batch_size: int  # examples per update, over all ranks
    accumulation_steps: int  # of this rank
    max_grad_norm: float  # 0: no clipping
    freeze: Freeze
    seed: int
    sums_examples: bool = False  # the gradient is that of the loss's sum, not of its mean
    stem: Sequence[nn.Parameter] = ()  # learns for `stem_steps` updates, ever more slowly
    stem_steps: int = 0
    slowdown: Callable[[int], float] = _no_slowdown  # the part of lr_factor that is rollbacks
    ranks: Ranks = field(default_factory=Alone)


def train_steps(
    rule: UpdateRule,
    batches: Iterator[tuple[Tensor, Tensor]],
    *,
    start_step: int,
    total_steps: int,
) -> Iterator[Step]:
    """Yield after each update, from `start_step + 1` to `total_steps`.

    Args:
        batches: endless (images, targets) from `start_step` on, `accumulation_steps` of them for
            each update, on the device: float (B, 3, H, W); int64 (B,), or float (B, K) when mixed.
    """
    params = [p for group in rule.optimizer.param_groups for p in group["params"]]
    guard = Guard(rule.network, rule.optimizer)
    for index in range(start_step + 1, total_steps + 1):
        set_train_mode(rule.network, rule.freeze)
        # Dropout and drop-path draw from the global generator: seeded by the update, a resumed
        # run draws what the undisturbed one would have drawn.
        torch.manual_seed(derive_seed(rule.seed, "update", index, *rule.ranks.seed_parts()))
        factor = rule.lr_factor(index - 1)
        set_rates(rule, index - 1, factor)
        guard.before_forward()
        loss, inputs_are_finite = _accumulate(rule, batches, params[0].device)
        rule.ranks.combine_statistics(rule.network, guard.before, rule.accumulation_steps)
        if rule.stem_steps and index > rule.stem_steps:
            for parameter in rule.stem:  # which several ranks exchange all the same
                parameter.grad = None
        rule.scaler.unscale_(rule.optimizer)  # so that the norm and the clipping see true gradients
        grads = [p.grad for p in params if p.grad is not None]
        grad_norm = nn.utils.get_total_norm(grads)
        # The loss too: with a loss of infinity some gradients are zero.
        is_finite = torch.isfinite(grad_norm) & torch.isfinite(loss)
        if rule.max_grad_norm:
            nn.utils.clip_grads_with_norm_(params, rule.max_grad_norm, grad_norm)
        guard.step(rule.scaler, is_finite)
        rule.scaler.update()
        rule.optimizer.zero_grad(set_to_none=True)
        if rule.sums_examples:
            grad_norm = grad_norm / rule.batch_size
        yield Step(index, loss, grad_norm.detach(), is_finite, inputs_are_finite, factor)


def set_rates(rule: UpdateRule, step: int, factor: float) -> None:
    """Set each group's rate for update `step`, from 0; a stem's falls to 0 and it is frozen.

    Frozen, its gradient is not computed either.
    """
    for group in rule.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
        if group.get("stem") and rule.stem_steps:
            share = max(0.0, 1 - step / rule.stem_steps) * rule.slowdown(step)
            group["lr"] = group["initial_lr"] * share
    # With several processes the gradient is exchanged all the same: what is, was settled before.
    if rule.stem_steps and rule.ranks.world == 1:
        for parameter in rule.stem:
            parameter.requires_grad_(step < rule.stem_steps)


def _accumulate(
    rule: UpdateRule, batches: Iterator[tuple[Tensor, Tensor]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Add up the gradients of one update; return its mean loss, and if its images are finite."""
    total = torch.zeros((), device=device)
    num_bad = torch.zeros((), device=device)
    unit = rule.batch_size if rule.sums_examples else 1
    for micro in range(rule.accumulation_steps):
        images, targets = next(batches)
        with rule.ranks.accumulating(rule.forward, is_last=micro == rule.accumulation_steps - 1):
            if not len(targets):  # all of its files were broken
                rule.ranks.contribute_nothing(rule.forward, images)
                continue
            num_bad += ~torch.isfinite(images.sum())  # a sum is cheaper than a mask, as telling
            with rule.autocast():
                # By its share of the update, so that a batch with a broken file weighs less.
                share = len(targets) / rule.batch_size
                loss = rule.loss_fn(rule.forward(images), targets) * share
            rule.scaler.scale(loss * unit * rule.ranks.world).backward()
        total += loss.detach()
    loss, num_bad = rule.ranks.total(torch.stack([total, num_bad])).unbind()
    return loss, num_bad == 0

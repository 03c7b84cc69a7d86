"""The update, as a generator: no callbacks, no logger, no flags.

Shapes: B examples per forward pass, K classes, H and W pixels.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fieldmark.model import Freeze, set_train_mode
from fieldmark.runtime.seed import derive_seed
from fieldmark.training.losses import LossFn


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer update. Tensors stay on the device: reading one waits for it."""

    index: int  # 1 for the first update
    loss: Tensor  # (), float32, mean over the update's examples
    grad_norm: Tensor  # (), float32, before clipping
    lr_factor: float  # this update's lr / initial lr


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
    batch_size: int  # examples per update
    accumulation_steps: int
    max_grad_norm: float  # 0: no clipping
    freeze: Freeze
    seed: int


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
    for index in range(start_step + 1, total_steps + 1):
        set_train_mode(rule.network, rule.freeze)
        # Dropout and drop-path draw from the global generator: seeded by the update, a resumed
        # run draws what the undisturbed one would have drawn.
        torch.manual_seed(derive_seed(rule.seed, "update", index))
        factor = rule.lr_factor(index - 1)
        for group in rule.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        loss = _accumulate(rule, batches, params[0].device)
        rule.scaler.unscale_(rule.optimizer)  # so that the norm and the clipping see true gradients
        grads = [p.grad for p in params if p.grad is not None]
        grad_norm = nn.utils.get_total_norm(grads)
        if rule.max_grad_norm:
            nn.utils.clip_grads_with_norm_(params, rule.max_grad_norm, grad_norm)
        rule.scaler.step(rule.optimizer)
        rule.scaler.update()
        rule.optimizer.zero_grad(set_to_none=True)
        yield Step(index, loss, grad_norm.detach(), factor)


def _accumulate(
    rule: UpdateRule, batches: Iterator[tuple[Tensor, Tensor]], device: torch.device
) -> Tensor:
    """Add up the gradients of one update; return its mean loss."""
    total = torch.zeros((), device=device)
    for _ in range(rule.accumulation_steps):
        images, targets = next(batches)
        if not len(targets):  # all of its files were broken
            continue
        with rule.autocast():
            # By its share of the update, so that a batch with a broken file weighs less.
            share = len(targets) / rule.batch_size
            loss = rule.loss_fn(rule.forward(images), targets) * share
        rule.scaler.scale(loss).backward()
        total += loss.detach()
    return total

"""The parts of a run put together: the update rule, what it moves, and how long it takes."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn

from fieldmark.config import LossConfig, OptimConfig, TrainConfig
from fieldmark.errors import ConfigError
from fieldmark.model import Freeze
from fieldmark.training.average import MovingAverage
from fieldmark.training.device import autocast, make_scaler
from fieldmark.training.lookahead import Lookahead
from fieldmark.training.loop import Step, UpdateRule, train_steps
from fieldmark.training.losses import make_loss
from fieldmark.training.optim import make_optimizer, stem_parameters
from fieldmark.training.plan import Timing
from fieldmark.training.ranks import Ranks
from fieldmark.training.session import Batches, Validate, closing_if_it_can
from fieldmark.training.state import TrainState

_TIMED_S, _PATIENCE_S, _MOST_TIMED = 2.0, 60.0, 100_000
_LEAST_TIMED = 3  # updates of several seconds each vary, too


def make_rule(
    network: nn.Module,
    *,
    train: TrainConfig,
    optim: OptimConfig,
    loss: LossConfig,
    freeze: Freeze,
    steps_per_epoch: int,
    class_counts: Sequence[int],
    device: torch.device,
    ranks: Ranks,
    batch_size: int = 0,
) -> UpdateRule:
    """Return the update of a run; its network lies on the device in the wanted memory format.

    Args:
        batch_size: examples that train in an update, where not all of train.batch_size do.

    Raises:
        ConfigError: settings that this network does not have.
    """
    if train.channels_last:
        network = network.to(memory_format=torch.channels_last)
    network = network.to(device)
    if train.sync_batch_norm:
        if device.type != "cuda":
            raise ConfigError(
                "train.sync_batch_norm needs CUDA: torch has no such kernel for a CPU. Set it to "
                "false; norm statistics of several processes are combined after each update."
            )
        # A copy: the original is what memory is measured with, by one process alone.
        network = convert_sync_batchnorm(copy.deepcopy(network))
    forward = torch.compile(network) if train.compile else network
    return UpdateRule(
        network=network,
        forward=ranks.wrap(forward, network),
        loss_fn=make_loss(loss, class_counts=class_counts),
        optimizer=make_optimizer(network, optim),
        scaler=make_scaler(train, device),
        lr_factor=lambda _: 1.0,  # the session's, which knows the schedule and the rollbacks
        autocast=partial(autocast, train, device),
        batch_size=batch_size or train.examples_per_update,
        accumulation_steps=train.accumulation_steps,
        max_grad_norm=optim.max_grad_norm,
        freeze=freeze,
        seed=train.seed,
        sums_examples=loss.reduction == "sum",
        stem=stem_parameters(network) if optim.stem_epochs else (),
        stem_steps=round(optim.stem_epochs * steps_per_epoch),
        ranks=ranks,
    )


def make_state(
    rule: UpdateRule, *, train: TrainConfig, optim: OptimConfig, total_steps: int
) -> TrainState:
    """Return what a run moves: the rule's network and optimizer, with the averages asked for."""
    average = lookahead = None
    if train.ema_decay:
        average = MovingAverage(
            rule.network, train.ema_decay, warmup=train.ema_warmup, every=train.ema_steps
        )
    if optim.lookahead_steps:
        lookahead = Lookahead(
            rule.network,
            decay=optim.lookahead_decay,
            every=optim.lookahead_steps,
            total_steps=total_steps,
        )
    return TrainState(
        rule.network, rule.optimizer, rule.scaler, average=average, lookahead=lookahead
    )


def _advance(steps: Iterator[Step], at_least: int, seconds: float, ranks: Ranks) -> int:
    """Make so many updates, and for so long; return how many. Slow ones are cut short.

    By the clock of the first process: another that made one more would wait for the rest in vain.
    """
    began, count = time.monotonic(), 0
    while True:
        float(next(steps).loss)  # waits for the device
        count += 1
        spent = time.monotonic() - began
        is_enough = (count >= at_least and spent >= seconds) or spent > _PATIENCE_S
        if ranks.share(is_enough):
            return count


def measure_timing(
    make_rule: Callable[[nn.Module], UpdateRule],
    network: nn.Module,
    batches_at: Callable[[int], Batches],
    sizes: Sequence[int],
    validate: Validate | None,
    *,
    num_prepared: int = 0,
) -> Timing:
    """Time updates at each image size, after some that are not counted, and one validation.

    Everything happens on a copy of the network.

    Args:
        num_prepared: updates that processes have read beforehand while the first one was made. As
            many are not counted, and as many are, so that a run that waits for its images is timed
            waiting for them.
    """
    spare = copy.deepcopy(network)
    rule = replace(make_rule(spare), lr_factor=lambda _: 0.0)  # the copy must not diverge
    update_s = {}
    for px in dict.fromkeys(sizes):
        with closing_if_it_can(batches_at(px).batches(0)) as batches:
            steps = train_steps(rule, batches, start_step=0, total_steps=_MOST_TIMED)
            _advance(steps, 1 + num_prepared, 0.0, rule.ranks)
            began = time.monotonic()
            count = _advance(steps, max(_LEAST_TIMED, num_prepared), _TIMED_S, rule.ranks)
            update_s[px] = (time.monotonic() - began) / count
    began = time.monotonic()
    if validate is not None:
        validate(spare.eval())
    return Timing(update_s, time.monotonic() - began if validate is not None else 0.0)

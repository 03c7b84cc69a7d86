"""The learning-rate range test: raise the rate until the loss diverges, then undo everything.

Source: Smith 2015, "Cyclical Learning Rates for Training Neural Networks", arXiv:1506.01186,
section 3.3; the exponential sweep of one short run and the two suggestions are fastai's variant.
"""

import copy
import dataclasses
import math
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fieldmark.config import RunConfig, override
from fieldmark.errors import ConfigError, DiskFull, Interrupted, Preempted
from fieldmark.runtime.log import progress, say
from fieldmark.training.loop import UpdateRule, train_steps
from fieldmark.training.lr_plot import save_lr_plot
from fieldmark.training.run_folder import RunFolder
from fieldmark.training.signals import stop_requests
from fieldmark.training.start import start_session

NUM_UPDATES = 100
LOW_FACTOR, HIGH_FACTOR = 1e-6, 1e2  # of the recipe's own rate: 12.5 updates for a factor of ten
SMOOTHING = 0.9  # of the moving average
LAG = 9  # updates: SMOOTHING / (1 - SMOOTHING), the mean age of the losses in the average
DIVERGED_FACTOR = 4.0  # smoothed loss over the best one
_UNSTEADY = 5  # first updates, whose average is of too few losses to find a slope in


@dataclass(frozen=True, slots=True)
class LrFinding:
    """The loss over the rate. Rates are those of optim.lr; groups with another keep their ratio."""

    rates: tuple[float, ...]  # one for each update whose loss was finite, rising
    losses: tuple[float, ...]  # nats, of the update's batch before it
    smoothed: tuple[float, ...]  # moving average; it shows what happened LAG updates before
    diverged_at: float | None  # the rate that ended the test; None: the highest rate was reached
    steepest: float | None  # where the smoothed loss falls fastest; None: it never fell
    minimum_tenth: float | None  # a tenth of the rate where the smoothed loss is lowest

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            field.name: list(value) if isinstance(value, tuple) else value
            for field in dataclasses.fields(self)
            for value in [getattr(self, field.name)]
        }


def find_lr(
    rule: UpdateRule,
    batches: Iterator[tuple[Tensor, Tensor]],
    *,
    base_lr: float,
    num_updates: int = NUM_UPDATES,
) -> LrFinding:
    """Return how the loss answers to rates from 1e-6 to 100 times `base_lr`.

    Everything the updates touch is as before when this returns, raises or is interrupted:
    weights, buffers, gradients, modes, optimizer, scaler, and the random generators of torch,
    numpy and Python. Of `batches`, what was taken is gone.

    Args:
        batches: endless (images, targets) as for `train_steps`.
        base_lr: optim.lr, which the rule's optimizer was made with.

    Raises:
        ConfigError: the loss is not finite even at the lowest rate.
    """
    span = math.log(HIGH_FACTOR / LOW_FACTOR)

    def factor(update: int) -> float:
        return LOW_FACTOR * math.exp(span * update / max(1, num_updates - 1))

    test_rule = dataclasses.replace(rule, lr_factor=factor)
    rates: list[float] = []
    losses: list[float] = []
    smoothed: list[float] = []
    diverged_at, average = None, 0.0
    with untouched(rule), progress("range test", num_updates, "updates") as bar:
        steps = train_steps(test_rule, batches, start_step=0, total_steps=num_updates)
        try:
            for step in steps:
                bar.advance()
                loss, rate = step.loss.item(), base_lr * factor(step.index - 1)
                if not math.isfinite(loss):
                    diverged_at = rate
                    break
                # Dividing by 1 - SMOOTHING^n makes it the mean of n losses, not of zeros too.
                average = SMOOTHING * average + (1 - SMOOTHING) * loss
                rates.append(rate)
                losses.append(loss)
                smoothed.append(average / (1 - SMOOTHING ** len(rates)))
                if smoothed[-1] > DIVERGED_FACTOR * min(smoothed):
                    diverged_at = rate
                    break
        finally:
            steps.close()  # type: ignore[attr-defined]  # before its network is put back
    if not rates:
        raise ConfigError(
            f"the loss must be finite at the lowest rate, {base_lr * LOW_FACTOR:g}. Got NaN or "
            "infinity. Check the images, the weights and train.precision."
        )
    steepest, lowest = suggest(rates, losses, smoothed)
    return LrFinding(
        rates=tuple(rates),
        losses=tuple(losses),
        smoothed=tuple(smoothed),
        diverged_at=diverged_at,
        steepest=steepest,
        minimum_tenth=None if lowest is None else lowest / 10,
    )


def suggest(
    rates: Sequence[float], losses: Sequence[float], smoothed: Sequence[float]
) -> tuple[float | None, float | None]:
    """Return (the rate of the steepest fall, the rate of the lowest smoothed loss).

    The slope is that of the smoothed loss over the logarithm of the rate. Rates are read LAG
    updates before, where the losses in the average are from: at the same update, the rate has
    grown fivefold since. Both are None where the smoothed loss falls by less than twice the
    standard deviation of single losses: averages of ten scatter about half as far by chance.
    """
    lowest = int(np.argmin(smoothed))
    if lowest < _UNSTEADY + 2:
        return None, None
    # From the median, which the few last and enormous losses do not move; 0.6745 is the normal
    # distribution's, and a difference of two losses scatters by the root of two more.
    scatter = float(np.median(np.abs(np.diff(losses)))) / (0.6745 * math.sqrt(2))
    if smoothed[_UNSTEADY] - smoothed[lowest] <= 2 * scatter:
        return None, None
    slope = np.gradient(np.asarray(smoothed), np.log(rates))
    steepest = _UNSTEADY + int(np.argmin(slope[_UNSTEADY : lowest + 1]))
    return rates[max(0, steepest - LAG)], rates[max(0, lowest - LAG)]


@contextmanager
def untouched(rule: UpdateRule) -> Iterator[None]:
    """Undo, bit for bit, what the block does to the rule's parts and the random generators.

    Tensors are written back in place, so that whoever holds them sees the old values.
    """
    parts = [getattr(rule, field.name) for field in dataclasses.fields(rule)]
    modules = {
        module: module.training
        for part in parts
        if isinstance(part, nn.Module)
        for module in part.modules()
    }
    tensors = [
        (tensor, tensor.detach().clone())
        for module in modules
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    ]
    flags = [
        (p, p.requires_grad, None if p.grad is None else (p.grad, p.grad.clone()))
        for module in modules
        for p in module.parameters(recurse=False)
    ]
    optimizers = [
        (optimizer, _copied_state(optimizer)) for optimizer in _with_inner(rule.optimizer)
    ]
    # A scaler, and whatever else keeps a state; loss functions and schedules have none.
    others = [
        (part, copy.deepcopy(part.state_dict()))
        for part in parts
        if hasattr(part, "load_state_dict")
        and not isinstance(part, nn.Module | torch.optim.Optimizer)
    ]
    generators = _generator_states()
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in tensors:
                tensor.copy_(value)
            for p, requires_grad, grad in flags:
                p.requires_grad = requires_grad
                p.grad = None if grad is None else grad[0].copy_(grad[1])
        for module, training in modules.items():
            module.training = training
        for optimizer, state in optimizers:
            _restore_state(optimizer, state)
        for part, state in others:
            part.load_state_dict(state)
        _restore_generators(generators)


def range_test(config: RunConfig, plot: Path | None) -> dict[str, Any]:
    """Return the finding for a configuration as plain facts, and draw it; no run is kept.

    Raises:
        ConfigError: the method has no learning rate, or `plot` cannot be written.
        Interrupted, Preempted: a signal came.
    """
    if config.train.method != "gradient":
        raise ConfigError(
            "train.method must be gradient for a learning rate to be looked for. "
            f"Got {config.train.method}. Set train.method=gradient."
        )
    if plot is not None and not plot.absolute().parent.is_dir():
        raise ConfigError(f"--out {plot} must be in a folder that exists. Make it first.")
    try:
        with stop_requests(at_once=True), tempfile.TemporaryDirectory(prefix="fieldmark-") as made:
            finding = _tested(config, Path(made) / "run")
    except (Interrupted, Preempted) as error:  # which says how to resume a run that is gone
        raise type(error)("stopped. Nothing is kept: run the same command again.") from None
    except DiskFull as error:
        raise DiskFull(
            f"{tempfile.gettempdir()} has no room for a temporary run. Make room, or set TMPDIR."
        ) from error
    if plot is not None:
        save_lr_plot(plot, finding, lag=LAG, own_lr=config.optim.lr, title=config.name)
    return {"recipe": config.name, "own_lr": config.optim.lr, **finding.to_json()}


def _tested(config: RunConfig, folder: Path) -> LrFinding:
    kept, parts = config.data.keep_hardest_frac, config.train.accumulation_steps
    if kept < 1:
        size = max(1, round(kept * config.train.examples_per_update / parts)) * parts
        say(f"updates have any {size} images: choosing them would take another training first")
        config = override(config, ["data.keep_hardest_frac=1", f"train.batch_size={size}"])
    with RunFolder.create(folder, config) as run:
        session = start_session(run, config, _no_validation).session
        batches = session.data.batches(0)
        try:
            return find_lr(session.rule, batches, base_lr=config.optim.lr)
        finally:
            close = getattr(batches, "close", None)
            if close is not None:
                close()


def _no_validation(*_: object, **__: object) -> None:
    """Nothing is validated in a range test."""


def _with_inner(optimizer: torch.optim.Optimizer) -> Iterator[torch.optim.Optimizer]:
    """The optimizer, and the one it wraps, as timm's Lookahead does."""
    yield optimizer
    inner = getattr(optimizer, "base_optimizer", None)
    if isinstance(inner, torch.optim.Optimizer):
        yield from _with_inner(inner)


def _copied_state(optimizer: torch.optim.Optimizer) -> tuple[dict[Any, Any], list[dict[str, Any]]]:
    # Not state_dict(): loading it casts the state to the type of the parameters.
    state = {key: copy.deepcopy(value) for key, value in optimizer.state.items()}
    groups = [
        {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
    return state, groups


def _restore_state(
    optimizer: torch.optim.Optimizer, copied: tuple[dict[Any, Any], list[dict[str, Any]]]
) -> None:
    state, groups = copied
    optimizer.state.clear()
    optimizer.state.update(state)
    for group, values in zip(optimizer.param_groups, groups, strict=True):
        for key in group.keys() - values.keys() - {"params"}:
            del group[key]
        group.update(values)


def _generator_states() -> tuple[Any, ...]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()


def _restore_generators(states: tuple[Any, ...]) -> None:
    cpu, cuda, of_numpy, of_python = states
    torch.set_rng_state(cpu)
    if cuda:
        torch.cuda.set_rng_state_all(cuda)
    np.random.set_state(of_numpy)
    random.setstate(of_python)

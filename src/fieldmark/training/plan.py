"""How long a run is, decided once: from epochs, steps or examples, or fitted to a time."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fieldmark.config import ScheduleConfig, TrainConfig
from fieldmark.errors import ConfigError
from fieldmark.runtime.log import say
from fieldmark.training.schedule import lr_factor, total_steps, warmup_steps

_RESERVE_FRAC = 0.02  # of a time budget, for what the measurement did not see

Sizes = Sequence[tuple[float, int]]
"""(fraction of the run from which it holds, image side in px), rising from 0."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The length of a run, in updates, and its rate at each."""

    total: int
    warmup: int
    steps_per_epoch: int
    schedule: ScheduleConfig
    size_changes: tuple[int, ...] = ()  # the first updates (from 1) at each later image size
    sides_px: tuple[int, ...] = (1,)  # of the images, first to last

    def work(self, updates: float) -> float:
        """Return what the first `updates` cost, in pixels of one side squared: for time left."""
        starts = [0, *(change - 1 for change in self.size_changes)]
        ends = [*starts[1:], self.total]
        return sum(
            side**2 * min(max(updates - start, 0), end - start)
            for side, start, end in zip(self.sides_px, starts, ends, strict=True)
        )

    def lr_factor(self, step: int) -> float:
        """Return the schedule's rate of update `step` (0 for the first) over optim.lr."""
        return lr_factor(
            self.schedule,
            step,
            total=self.total,
            warmup=self.warmup,
            steps_per_epoch=self.steps_per_epoch,
        )


@dataclass(frozen=True, slots=True)
class Timing:
    """What one update and one validation take on this machine."""

    update_s: Mapping[int, float]  # by image side in px
    validation_s: float


DecideOnce = Callable[[str, Callable[[], tuple[int, str]]], int]
"""kind, what finds (value, why) -> the value found the first time."""


def make_plan(
    train: TrainConfig,
    schedule: ScheduleConfig,
    *,
    steps_per_epoch: int,
    sizes: Sizes,
    decide_once: DecideOnce,
    measure: Callable[[], Timing],
) -> Plan:
    """Return the plan of a run; a time budget is fitted the first time and kept.

    Args:
        sizes: of the training images, at least one.
        measure: times updates on this machine; called for train.max_minutes alone.

    Raises:
        ConfigError: less than one update, or a warm-up as long as the run.
    """

    def find() -> tuple[int, str]:
        if not train.max_minutes:
            total = total_steps(train, steps_per_epoch)
            auto = ", train.epochs=auto" if train.epochs == "auto" else ""
            return total, f"{total / steps_per_epoch:.3g} epochs, from train and the data{auto}"
        timing = measure()
        eval_steps = train.eval_epochs * steps_per_epoch
        total = fit_total(timing, train.max_minutes * 60, sizes, eval_steps)
        why = _fitted_sentence(timing, train.max_minutes)
        say(f"{total} updates {why}")
        return total, why

    total = decide_once("total_steps", find)
    warmup = warmup_steps(
        schedule,
        total=total,
        steps_per_epoch=steps_per_epoch,
        batch_size=train.examples_per_update,
    )
    changes = tuple(math.ceil(start * total - 1e-6) + 1 for start, _ in sizes[1:])
    sides = tuple(px for _, px in sizes)
    return Plan(total, warmup, steps_per_epoch, schedule, changes, sides)


def fit_total(timing: Timing, budget_s: float, sizes: Sizes, eval_steps: int) -> int:
    """Return the most updates that, with their validations, fit in `budget_s` seconds.

    Raises:
        ConfigError: not even one fits.
    """
    update_s = mean_over_sizes(sizes, timing.update_s)
    left_s = budget_s * (1 - _RESERVE_FRAC)
    per_update_s = update_s + timing.validation_s / eval_steps
    total = math.floor((left_s - timing.validation_s) / per_update_s)
    if total < 1:
        raise ConfigError(
            f"train.max_minutes must hold at least one update and one validation, which take "
            f"{update_s + timing.validation_s:.3g} s here. Got {budget_s / 60:g}. Raise it."
        )
    return total


def mean_over_sizes(sizes: Sizes, cost: Mapping[int, float]) -> float:
    """Return the mean cost of an update, each image size weighing by its share of the run."""
    ends = [*(start for start, _ in sizes[1:]), 1.0]
    return sum((end - start) * cost[px] for (start, px), end in zip(sizes, ends, strict=True))


def _fitted_sentence(timing: Timing, minutes: float) -> str:
    listed = ", ".join(f"{s:.3g} s at {px} px" for px, s in timing.update_s.items())
    return f"to fit {minutes:g} min: an update takes {listed}"

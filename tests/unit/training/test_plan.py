"""The length of a run: from a budget of time, decided once."""

from collections.abc import Callable
from typing import Any

import pytest

from fieldmark.config import ScheduleConfig, TrainConfig
from fieldmark.errors import ConfigError
from fieldmark.runtime.log import Bar
from fieldmark.training.plan import Plan, Timing, fit_total, make_plan, mean_over_sizes

SIZES = ((0.0, 24), (0.5, 32))


def test_the_mean_weighs_each_size_by_its_share_of_the_run() -> None:
    assert mean_over_sizes(SIZES, {24: 1.0, 32: 3.0}) == 2.0
    assert mean_over_sizes(((0.0, 24), (0.9, 32)), {24: 1.0, 32: 3.0}) == pytest.approx(1.2)


def test_updates_and_validations_fill_the_budget() -> None:
    timing = Timing({24: 1.0, 32: 3.0}, validation_s=10.0)
    total = fit_total(timing, 1000.0, SIZES, eval_steps=50)
    taken = total * (2.0 + 10.0 / 50) + 10.0
    assert 980 - 2.2 < taken <= 980  # 2 % in reserve


def test_larger_images_still_to_come_count_in_the_time_left() -> None:
    plan = Plan(100, 0, 10, ScheduleConfig(), size_changes=(51,), sides_px=(24, 32))
    assert plan.work(50) == 50 * 24**2
    assert plan.work(100) == 50 * 24**2 + 50 * 32**2
    assert plan.work(75) - plan.work(50) == 25 * 32**2
    bar = Bar("training", 1000, "images", work=lambda done: plan.work(done / 10))
    bar.start()
    bar.done = 500
    assert bar._left_s(90.0) == pytest.approx(90 * (32 / 24) ** 2)  # as many, each dearer
    assert Bar("evaluating", 1000, "images")._left_s(90.0) == 0.0  # nothing done: not known


def test_a_budget_without_room_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"train.max_minutes must hold .* Got 0.1\. Raise it"):
        fit_total(Timing({24: 4.0, 32: 4.0}, 10.0), 6.0, SIZES, eval_steps=50)


class Decisions:
    def __init__(self) -> None:
        self.known: dict[str, Any] = {}

    def once(self, kind: str, find: Callable[[], tuple[int, str]]) -> int:
        if kind not in self.known:
            self.known[kind] = find()
        value: int = self.known[kind][0]
        return value


def test_a_resumed_run_keeps_what_was_fitted() -> None:
    decisions, measured = Decisions(), []

    def measure(update_s: float) -> Timing:
        measured.append(update_s)
        return Timing({32: update_s}, 0.0)

    def plan(update_s: float) -> int:
        return make_plan(
            TrainConfig(max_minutes=1, batch_size=10),
            ScheduleConfig(warmup_frac=0.1),
            steps_per_epoch=20,
            sizes=((0.0, 32),),
            decide_once=decisions.once,
            measure=lambda: measure(update_s),
        ).total

    assert plan(0.125) == plan(0.5) == 470
    assert measured == [0.125]
    assert "to fit 1 min: an update takes 0.125 s at 32 px" in decisions.known["total_steps"][1]


def test_without_a_budget_nothing_is_timed() -> None:
    plan = make_plan(
        TrainConfig(epochs=2, batch_size=10),
        ScheduleConfig(warmup_epochs=1),
        steps_per_epoch=20,
        sizes=((0.0, 32),),
        decide_once=Decisions().once,
        measure=lambda: pytest.fail("timed"),
    )
    assert (plan.total, plan.warmup, plan.steps_per_epoch) == (40, 20, 20)


def test_a_budget_is_a_length_like_others() -> None:
    with pytest.raises(ValueError, match="exactly one of epochs, steps, examples, max_minutes"):
        TrainConfig(epochs=2, max_minutes=3)

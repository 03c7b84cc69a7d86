"""Schedules against their formulas and torch's own schedulers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError
from timm.scheduler import CosineLRScheduler, StepLRScheduler

from fieldmark.config import ScheduleConfig, TrainConfig
from fieldmark.errors import ConfigError
from fieldmark.training.schedule import auto_epochs, lr_factor, total_steps, warmup_steps


def factors(config: ScheduleConfig, total: int, warmup: int) -> list[float]:
    return [lr_factor(config, step, total=total, warmup=warmup) for step in range(total)]


def test_cosine_is_the_textbook_formula_with_eta_min() -> None:
    eta_max, eta_min, t_max = 0.1, 0.004, 200
    config = ScheduleConfig(end_factor=eta_min / eta_max)
    for t, factor in enumerate(factors(config, t_max, 0)):
        expected = eta_min + 0.5 * (eta_max - eta_min) * (1 + math.cos(t / t_max * math.pi))
        assert eta_max * factor == pytest.approx(expected)


def test_warmup_and_cosine_equal_torch_s_sequential_schedulers() -> None:
    total, warmup = 100, 5
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=total - warmup),
        ],
        milestones=[warmup],
    )
    found = factors(ScheduleConfig(), total, warmup)
    assert found[0] == pytest.approx(0.01)
    for factor in found:
        assert 0.1 * factor == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9)
        optimizer.step()
        scheduler.step()


def test_linear_and_constant() -> None:
    linear = ScheduleConfig(name="linear", end_factor=0.2, warmup_steps=2, warmup_start_factor=0.5)
    found = factors(linear, 10, 2)
    assert found[:3] == pytest.approx([0.5, 0.75, 1.0])
    assert lr_factor(linear, 10, total=10, warmup=2) == pytest.approx(0.2)
    assert set(factors(ScheduleConfig(name="constant"), 5, 0)) == {1.0}


@given(
    st.sampled_from(["cosine", "linear", "constant"]),
    st.integers(1, 500),
    st.floats(0, 0.9),
    st.floats(0, 1),
)
def test_a_factor_is_between_the_ends_and_a_pure_function(
    name: str, total: int, warmup_frac: float, end: float
) -> None:
    end = 0 if name == "constant" else end
    config = ScheduleConfig.model_validate({"name": name, "end_factor": end})
    warmup = min(total - 1, round(warmup_frac * total))
    found = factors(config, total, warmup)
    assert found == factors(config, total, warmup)
    assert all(min(0.01, end) - 1e-9 <= factor <= 1 + 1e-9 for factor in found)


# (settings, update, factor): 100 updates of which 10 warm up, 20 to an epoch. Worked out by hand.
TABLE = [
    ({"name": "cosine"}, 10, 1.0),
    ({"name": "cosine"}, 55, 0.5),  # half of the 90 updates after the warm-up
    ({"name": "cosine", "decay_from": "start"}, 50, 0.5),  # half of all
    ({"name": "cosine", "decay_from": "start"}, 10, 0.9755283),  # (1 + cos 18 degrees) / 2
    ({"name": "cosine", "end_factor": 0.2, "decay_from": "start"}, 75, 0.3171573),
    ({"name": "linear", "decay_from": "start"}, 10, 0.9),
    ({"name": "linear", "decay_from": "start", "end_factor": 0.5}, 80, 0.6),
    ({"name": "linear"}, 10, 1.0),
    ({"name": "constant"}, 99, 1.0),
    ({"name": "step", "step_epochs": 1}, 29, 1.0),  # 19 updates after the warm-up
    ({"name": "step", "step_epochs": 1}, 30, 0.1),
    ({"name": "step", "step_epochs": 1}, 50, 0.01),
    ({"name": "step", "step_epochs": 1, "decay_from": "start"}, 19, 1.0),
    ({"name": "step", "step_epochs": 1, "decay_from": "start"}, 20, 0.1),
    ({"name": "step", "step_epochs": 0.5, "decay_from": "start"}, 5, 0.505),  # still warming up
    ({"name": "step", "step_epochs": 0.5, "decay_from": "start"}, 10, 0.1),
    ({"name": "step", "step_epochs": 2.4, "step_factor": 0.97, "decay_from": "start"}, 47, 1.0),
    ({"name": "step", "step_epochs": 2.4, "step_factor": 0.97, "decay_from": "start"}, 48, 0.97),
    ({"name": "step", "step_epochs": 2.4, "step_factor": 0.97, "decay_from": "start"}, 96, 0.9409),
]


@pytest.mark.parametrize(("settings", "step", "factor"), TABLE)
def test_factors_by_hand(settings: dict[str, object], step: int, factor: float) -> None:
    config = ScheduleConfig.model_validate(settings)
    found = lr_factor(config, step, total=100, warmup=10, steps_per_epoch=20)
    assert found == pytest.approx(factor, rel=1e-6)


@pytest.mark.parametrize("from_start", [False, True])
@pytest.mark.parametrize("kind", ["cosine", "step"])
def test_equal_to_timm_s_schedulers(kind: str, from_start: bool) -> None:
    total, warmup, per_epoch, rate = 120, 15, 10, 0.4
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)
    shared = {"warmup_t": warmup, "warmup_lr_init": 0.004, "t_in_epochs": False}
    settings: dict[str, object] = {"name": kind, "warmup_start_factor": 0.01}
    settings["decay_from"] = "start" if from_start else "warmup"
    scheduler: CosineLRScheduler | StepLRScheduler
    if kind == "cosine":
        length = total if from_start else total - warmup
        scheduler = CosineLRScheduler(
            optimizer, length, lr_min=0.02, warmup_prefix=not from_start, **shared
        )
        settings["end_factor"] = 0.05
    else:
        scheduler = StepLRScheduler(optimizer, 24, 0.97, warmup_prefix=not from_start, **shared)
        settings |= {"step_epochs": 2.4, "step_factor": 0.97}
    config = ScheduleConfig.model_validate(settings)
    for step in range(total):
        scheduler.step_update(step)
        found = lr_factor(config, step, total=total, warmup=warmup, steps_per_epoch=per_epoch)
        assert rate * found == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6), step


def test_a_fraction_of_an_epoch_falls_on_the_update_it_names() -> None:
    config = ScheduleConfig(name="step", step_epochs=0.07, step_factor=0.5)
    assert 0.07 * 100 > 7  # so that the seventh update would come too early
    for count in range(1, 300):
        before, at = (
            lr_factor(config, 7 * count + shift, total=9999, warmup=0, steps_per_epoch=100)
            for shift in (-1, 0)
        )
        assert at == pytest.approx(before / 2)


def test_what_belongs_to_another_schedule_is_refused() -> None:
    with pytest.raises(ValidationError, match="end_factor belongs to"):
        ScheduleConfig(name="constant", end_factor=0.1)
    with pytest.raises(ValidationError, match="step_epochs belongs to"):
        ScheduleConfig(name="cosine", step_epochs=3)


@pytest.mark.parametrize(
    ("duration", "steps"),
    [({"epochs": 2.5}, 50), ({"steps": 7}, 7), ({"examples": 1000}, 100)]
    + [({"epochs": 2.5, "min_steps": 49}, 50), ({"epochs": 2.5, "min_steps": 51}, 51)],
)
def test_a_duration_in_any_unit(duration: dict[str, float], steps: int) -> None:
    config = TrainConfig.model_validate({"batch_size": 10, **duration})
    assert total_steps(config, 20) == steps


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        ({}, 0),
        ({"warmup_epochs": 1.5}, 30),
        ({"warmup_steps": 9}, 9),
        ({"warmup_examples": 95}, 9),
        ({"warmup_frac": 0.25}, 25),
    ],
)
def test_a_warmup_in_any_unit(duration: dict[str, float], steps: int) -> None:
    config = ScheduleConfig.model_validate(duration)
    assert warmup_steps(config, total=100, steps_per_epoch=20, batch_size=10) == steps


def test_impossible_durations_are_refused() -> None:
    with pytest.raises(ConfigError, match="at least one update"):
        total_steps(TrainConfig(epochs=0.01, batch_size=8), 10)
    with pytest.raises(ConfigError, match="shorter than the run of 10 updates. Got 10"):
        warmup_steps(ScheduleConfig(warmup_steps=10), total=10, steps_per_epoch=5, batch_size=1)


def test_epochs_of_fine_tuning_fall_with_the_number_of_images() -> None:
    assert auto_epochs(100) == auto_epochs(1_000) == 8
    assert auto_epochs(50_000) == pytest.approx(3.008, abs=1e-3)
    assert auto_epochs(1_281_167) == pytest.approx(1.337, abs=1e-3)
    auto = TrainConfig(epochs="auto", min_steps=60, batch_size=100)
    assert total_steps(auto, 500) == 1504
    assert total_steps(auto, 2) == 60

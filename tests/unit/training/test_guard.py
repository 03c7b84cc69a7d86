"""An update with a value that is not finite changes nothing, whatever was at fault."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fieldmark.config import LossConfig, OptimConfig, TrainConfig
from fieldmark.model import Architecture, build
from fieldmark.training.assemble import make_rule, make_state
from fieldmark.training.guard import Guard
from fieldmark.training.loop import UpdateRule, train_steps
from fieldmark.training.ranks import Alone
from fieldmark.training.state import TrainState

TRAIN = TrainConfig(steps=9, batch_size=8, ema_decay=0.9, channels_last=False)


def parts(optim: OptimConfig, seed: int = 0) -> tuple[UpdateRule, TrainState]:
    torch.manual_seed(seed)
    rule = make_rule(
        build(Architecture("small_test_resnet", 4)),
        train=TRAIN,
        optim=optim,
        loss=LossConfig(),
        freeze="none",
        steps_per_epoch=10,
        class_counts=[8] * 4,
        device=torch.device("cpu"),
        ranks=Alone(),
    )
    return rule, make_state(rule, train=TRAIN, optim=optim, total_steps=9)


def batches(spoil: Callable[[int, Tensor], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    step = 0
    while True:
        step += 1
        images = torch.randn(8, 3, 32, 32, generator=generator)
        yield spoil(step, images), torch.randint(0, 4, (8,), generator=generator)


def flat(state: TrainState) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def visit(name: str, value: object) -> None:
        if isinstance(value, Tensor):
            found[name] = value.clone()
        elif isinstance(value, dict):
            for key, part in value.items():
                visit(f"{name}.{key}", part)
        elif isinstance(value, list):
            for key, part in enumerate(value):
                visit(f"{name}.{key}", part)

    visit("", state.state_dict())
    return found


def inf_at_4(step: int, images: Tensor) -> Tensor:
    return images.fill_(float("inf")) if step == 4 else images


def nan_pixel_at_4(step: int, images: Tensor) -> Tensor:
    if step == 4:
        images[0, 0, 0, 0] = float("nan")
    return images


def huge_at_4(step: int, images: Tensor) -> Tensor:
    return images * 3e38 if step == 4 else images  # finite, and overflows in the first layer


@pytest.mark.parametrize("spoil", [inf_at_4, nan_pixel_at_4, huge_at_4])
@pytest.mark.parametrize(
    "optim",
    [
        OptimConfig(lr=0.1, momentum=0.9),
        OptimConfig(name="adamw", lr=1e-3, weight_decay=0.1),
        OptimConfig(name="lamb", lr=1e-3),
        OptimConfig(lr=0.1, lookahead_steps=2),
    ],
    ids=["sgd", "adamw", "lamb", "lookahead"],
)
def test_nothing_moves_and_the_next_update_is_sound(
    optim: OptimConfig, spoil: Callable[[int, Tensor], Tensor]
) -> None:
    rule, state = parts(optim)
    before: dict[str, Tensor] = {}
    flags = []
    for step in train_steps(rule, batches(spoil), start_step=0, total_steps=6):
        state.after_update(step.index, step.is_finite)
        flags.append(bool(step.is_finite))
        now = flat(state)
        if step.index == 4:
            moved = [name for name in now if not torch.equal(now[name], before[name])]
            assert not moved
        elif step.index > 1:
            assert any(not torch.equal(now[name], before[name]) for name in now)
        before = now
    assert flags == [True, True, True, False, True, True]
    assert all(torch.isfinite(tensor.float()).all() for tensor in flat(state).values())


def test_the_flag_tells_bad_images_from_a_bad_update() -> None:
    for spoil, is_input in ((inf_at_4, True), (nan_pixel_at_4, True), (lambda _, x: x, False)):
        rule, _ = parts(OptimConfig(lr=0.1))
        steps = list(train_steps(rule, batches(spoil), start_step=0, total_steps=4))
        assert bool(steps[3].inputs_are_finite) != is_input


class _DeviceFlag:
    """A flag as on a GPU: the optimizer steps, and the guard undoes it by `torch.where`."""

    def __init__(self, value: Tensor) -> None:
        self.device = torch.device("meta")
        self.value = value


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_undoing_on_the_device_restores_weights_state_and_statistics(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    optim = OptimConfig(name=name, lr=0.1)
    rule, state = parts(optim)
    list(train_steps(rule, batches(lambda _, x: x), start_step=0, total_steps=2))
    guard = Guard(rule.network, rule.optimizer)
    where = torch.where
    monkeypatch.setattr(
        torch,
        "where",
        lambda flag, *rest: where(flag.value if isinstance(flag, _DeviceFlag) else flag, *rest),
    )
    for is_finite in (False, True):
        before = flat(state)
        guard.before_forward()
        rule.network.train()
        rule.network(torch.randn(8, 3, 32, 32)).square().sum().backward()
        guard.step(rule.scaler, _DeviceFlag(torch.tensor(is_finite)))  # type: ignore[arg-type]
        rule.optimizer.zero_grad()
        after = flat(state)
        moved = {n for n in after if not torch.equal(after[n], before[n])}
        # AdamW keeps its own count of steps on the host, which is not undone.
        moved = {n for n in moved if not n.endswith(".step")}
        assert bool(moved) == is_finite


def test_state_that_an_undone_first_step_made_is_as_the_optimizer_makes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """RMSprop as TensorFlow has it begins at one, the momentum at zero."""
    rule, _ = parts(OptimConfig(name="rmsproptf", lr=0.1))
    guard = Guard(rule.network, rule.optimizer)
    where = torch.where
    monkeypatch.setattr(torch, "where", lambda flag, *rest: where(flag.value, *rest))
    guard.before_forward()
    rule.network.train()
    rule.network(torch.randn(8, 3, 32, 32)).square().sum().backward()
    guard.step(rule.scaler, _DeviceFlag(torch.tensor(False)))  # type: ignore[arg-type]
    states = list(rule.optimizer.state.values())
    assert states
    for state in states:
        assert (state["square_avg"] == 1).all()
        assert (state["momentum_buffer"] == 0).all()

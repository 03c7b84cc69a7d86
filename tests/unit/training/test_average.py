"""The moving average of weights against timm's, and what it promises of resuming and skipping."""

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from fieldmark.training.average import MovingAverage


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def move(module: nn.Module, step: int) -> None:
    """Change every parameter and statistic as an update would."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for value in module.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.randn(value.shape, generator=generator))
            else:
                value.add_(1)


def values(module: nn.Module) -> list[Tensor]:
    return [value.clone() for value in module.state_dict().values()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("decay", [0.5, 0.99])
def test_equal_to_timm_s(decay: float, warmup: bool) -> None:
    ours, theirs = network(), network()
    average = MovingAverage(ours, decay, warmup=warmup)
    reference = ModelEmaV3(theirs, decay=decay, use_warmup=warmup)
    for step in range(1, 40):
        for module in (ours, theirs):
            move(module, step)
        average.update(step)
        reference.update(theirs, step)
        assert average.decay_at(step) == reference.get_decay(step)
        assert equal(values(average.module), values(reference.module))
    assert not equal(values(average.module), values(ours))


def test_the_warmup_by_hand() -> None:
    average = MovingAverage(network(), 0.9, warmup=True)
    assert average.decay_at(1) == 0  # a copy
    assert average.decay_at(8) == pytest.approx(1 - 8 ** (-2 / 3))  # 0.75
    assert average.decay_at(32) == pytest.approx(0.9)  # 1 - 32^(-2/3) is 0.9008, above the cap
    assert average.decay_at(31) < 0.9


def test_it_moves_at_every_fourth_update_and_begins_with_a_copy() -> None:
    module = network()
    average = MovingAverage(module, 0.75, warmup=False, every=4)
    before = values(average.module)
    for step in range(1, 13):
        move(module, step)
        average.update(step)
        now = values(average.module)
        assert equal(before, now) is (step % 4 != 0), step
        if step == 4:
            assert equal(now, values(module))
        if step == 8:  # a quarter of the way to the network
            for old, new, target in zip(before, now, values(module), strict=True):
                if new.is_floating_point():
                    assert torch.allclose(new, 0.75 * old + 0.25 * target, atol=1e-6)
                else:
                    assert torch.equal(new, target)
        before = now


def test_a_skipped_update_changes_nothing_even_if_the_network_holds_nan() -> None:
    module = network()
    average = MovingAverage(module, 0.9, warmup=False)
    for step in (1, 2):
        move(module, step)
        average.update(step, torch.tensor(True))
    before = values(average.module)
    with torch.no_grad():
        module[1].running_mean.fill_(float("nan"))  # type: ignore[union-attr,operator]
        module[0].weight.fill_(float("inf"))  # type: ignore[union-attr,operator]
        module[1].num_batches_tracked.add_(1)  # type: ignore[union-attr,operator]
    average.update(3, torch.tensor(False))
    assert equal(before, values(average.module))


def test_a_finite_update_is_what_it_would_be_without_the_flag() -> None:
    modules = network(), network()
    averages = [MovingAverage(module, 0.9, warmup=True) for module in modules]
    for step in range(1, 6):
        for module in modules:
            move(module, step)
        averages[0].update(step)
        averages[1].update(step, torch.tensor(True))
    assert equal(values(averages[0].module), values(averages[1].module))


def test_resuming_from_its_state_gives_the_same_bits() -> None:
    module = network()
    straight = MovingAverage(module, 0.9, warmup=True, every=2)
    for step in range(1, 6):
        move(module, step)
        straight.update(step)
    resumed = MovingAverage(module, 0.9, warmup=True, every=2)
    resumed.load_state_dict({name: v.clone() for name, v in straight.state_dict().items()})
    for step in range(6, 11):
        move(module, step)
        straight.update(step)
        resumed.update(step)
    assert equal(values(straight.module), values(resumed.module))


def test_the_average_is_in_eval_mode_and_is_not_the_network() -> None:
    module = network().train()
    average = MovingAverage(module, 0.9, warmup=False)
    assert not average.module.training
    assert module.training
    shared = {p.data_ptr() for p in module.parameters()}
    assert not shared & {p.data_ptr() for p in average.module.parameters()}


def test_an_average_whose_first_update_was_skipped_begins_with_the_next() -> None:
    network = nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(100.0)  # the random start, which must not linger
    average = MovingAverage(network, 0.999, warmup=False)
    bad, good = torch.tensor(False), torch.tensor(True)
    average.update(1, bad)
    average.update(2, bad)
    assert float(average.module.weight.detach()) == 100
    network.weight.data.fill_(1.0)
    average.update(3, good)
    assert float(average.module.weight.detach()) == 1
    again = MovingAverage(network, 0.999, warmup=False)
    again.load_state_dict(average.state_dict())
    network.weight.data.fill_(2.0)
    again.update(4, good)
    assert float(again.module.weight.detach()) == pytest.approx(1.001)

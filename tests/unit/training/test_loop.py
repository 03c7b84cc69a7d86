"""The update: against a loop written out by hand, and its parts against their formulas."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.config import LossConfig, OptimConfig, TrainConfig
from fieldmark.errors import ConfigError, UnknownName
from fieldmark.model import Architecture, build
from fieldmark.training.device import pick_device, prepare
from fieldmark.training.loop import UpdateRule, train_steps
from fieldmark.training.losses import make_loss
from fieldmark.training.optim import make_optimizer, parameter_groups


def batches(size: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield (
            torch.randn(size, 3, 32, 32, generator=generator),
            torch.randint(0, 4, (size,), generator=generator),
        )


def make_rule(network: nn.Module, optim: OptimConfig, accumulation_steps: int = 1) -> UpdateRule:
    return UpdateRule(
        network=network,
        forward=network,
        loss_fn=make_loss(LossConfig(), class_counts=[8] * 4),
        optimizer=make_optimizer(network, optim),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        lr_factor=lambda step: 1 / (1 + step),
        autocast=contextlib.nullcontext,
        batch_size=8,
        accumulation_steps=accumulation_steps,
        max_grad_norm=optim.max_grad_norm,
        freeze="none",
        seed=0,
    )


def small_network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build(Architecture("small_test_resnet", 4))


SGD = OptimConfig(lr=0.1, momentum=0.9, weight_decay=5e-4)


def test_equal_to_the_loop_everyone_writes() -> None:
    ours, theirs = small_network(), small_network()
    steps = list(train_steps(make_rule(ours, SGD), batches(8), start_step=0, total_steps=4))
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    theirs.train()
    for step, (images, targets) in zip(steps, batches(8), strict=False):
        optimizer.param_groups[0]["lr"] = 0.1 / step.index
        loss = F.cross_entropy(theirs(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert step.loss.item() == pytest.approx(loss.item(), rel=1e-6)
        assert step.lr_factor == pytest.approx(1 / step.index)
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_accumulation_equals_one_larger_batch_without_batch_statistics() -> None:
    def vit() -> nn.Module:
        torch.manual_seed(0)
        return build(Architecture("test_vit", 4, {"img_size": 32, "patch_size": 8}))

    large = next(batches(8))
    halves = iter([(large[0][:4], large[1][:4]), (large[0][4:], large[1][4:])])
    whole, parts = vit(), vit()
    (a,) = train_steps(make_rule(whole, SGD), iter([large]), start_step=0, total_steps=1)
    (b,) = train_steps(make_rule(parts, SGD, 2), halves, start_step=0, total_steps=1)
    assert a.loss.item() == pytest.approx(b.loss.item(), rel=1e-5)
    assert a.grad_norm.item() == pytest.approx(b.grad_norm.item(), rel=1e-4)
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.allclose(p, q, atol=1e-6)


def test_clipping_bounds_the_step_and_reports_the_norm_before_it() -> None:
    network = small_network()
    before = [p.detach().clone() for p in network.parameters()]
    optim = OptimConfig(lr=1.0, momentum=0.0, max_grad_norm=0.01)
    (step,) = train_steps(make_rule(network, optim), batches(8), start_step=0, total_steps=1)
    moved = torch.cat(
        [(p - q).flatten() for p, q in zip(network.parameters(), before, strict=True)]
    ).norm()
    assert step.grad_norm.item() > 0.01
    assert moved.item() == pytest.approx(0.01, rel=1e-3)


def test_what_is_drawn_in_an_update_depends_on_the_update_alone() -> None:
    def run(start: int, network: nn.Module) -> list[float]:
        stream = batches(8)
        for _ in range(start):
            next(stream)
        torch.manual_seed(start * 99)  # whatever the process did before must not matter
        rule = replace(make_rule(network, OptimConfig(lr=1e-9)), seed=3)
        return [s.loss.item() for s in train_steps(rule, stream, start_step=start, total_steps=4)]

    torch.manual_seed(0)
    network = build(Architecture("small_test_resnet", 4, {"drop_rate": 0.5}))
    straight, resumed = run(0, network), run(2, network)
    assert straight[2:] == pytest.approx(resumed, rel=1e-4)
    different = replace(make_rule(network, OptimConfig(lr=1e-9)), seed=4)
    (other,) = train_steps(different, batches(8), start_step=0, total_steps=1)
    assert other.loss.item() != pytest.approx(straight[0], rel=1e-4)


def test_groups_separate_head_and_decay() -> None:
    network = build(Architecture("test_vit", 4))
    config = OptimConfig(lr=0.1, weight_decay=0.05, decay_norm_and_bias=False, head_lr_factor=10)
    groups = {group["name"]: group for group in parameter_groups(network, config)}
    assert set(groups) == {"backbone", "backbone, no decay", "head", "head, no decay"}
    assert groups["head"]["lr"] == pytest.approx(1.0)
    assert groups["backbone, no decay"]["weight_decay"] == 0
    exempt = {id(p) for p in groups["backbone, no decay"]["params"]}
    assert id(network.pos_embed) in exempt
    assert all(p.ndim > 1 for p in groups["backbone"]["params"])
    total = sum(len(group["params"]) for group in groups.values())
    assert total == len(list(network.parameters()))


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "rmsproptf", "lion", "muon"])
def test_optimizers_by_name(name: str) -> None:
    network = small_network()
    filter_lr = 0.1 if name == "muon" else 0
    config = OptimConfig(name=name, lr=1e-3, weight_decay=1e-2, filter_lr=filter_lr)
    rule = make_rule(network, config)
    before = [p.detach().clone() for p in network.parameters()]
    list(train_steps(rule, batches(8), start_step=0, total_steps=1))
    moved = [not torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True)]
    assert sum(moved) > len(moved) / 2


def test_unknown_optimizers_and_arguments_are_one_sentence() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'adamw'"):
        make_optimizer(small_network(), OptimConfig(name="adamww", lr=0.1))
    with pytest.raises(ConfigError, match="optim.args must be arguments of sgd"):
        make_optimizer(small_network(), OptimConfig(lr=0.1, args={"speed": 3}))


def test_devices_that_are_not_there() -> None:
    assert pick_device("cpu").type == "cpu"
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="train.device=cuda needs a CUDA device"):
            pick_device("cuda")
    half = TrainConfig(epochs=1, batch_size=1, precision="float16")
    with pytest.raises(ConfigError, match="float16 needs a CUDA device"):
        prepare(half, torch.device("cpu"))

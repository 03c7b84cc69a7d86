"""The range test: what it suggests on losses whose answer is known, and that it leaves no trace."""

import contextlib
import copy
import dataclasses
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.optim import Lookahead
from torch import Tensor, nn

import fieldmark
from fieldmark.config import LossConfig, OptimConfig
from fieldmark.errors import ConfigError
from fieldmark.model import Architecture, build, freeze_backbone
from fieldmark.training.loop import UpdateRule, train_steps
from fieldmark.training.losses import make_loss
from fieldmark.training.lr_finder import LAG, SMOOTHING, find_lr, suggest
from fieldmark.training.optim import make_optimizer

LR = 0.1


def batches(size: int = 8) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    while True:
        labels = torch.randint(0, 4, (size,), generator=generator)
        images = torch.randn(size, 3, 16, 16, generator=generator)
        yield images + labels[:, None, None, None] / 2, labels


def make_network() -> nn.Module:
    torch.manual_seed(0)
    return build(Architecture("airnet", 4, {"widths": [4, 4, 4]}))


def make_rule(
    network: nn.Module, optim: OptimConfig | torch.optim.Optimizer, **changes: Any
) -> UpdateRule:
    values: dict[str, Any] = {
        "network": network,
        "forward": network,
        "loss_fn": make_loss(LossConfig(), class_counts=[1] * 4),
        "optimizer": make_optimizer(network, optim) if isinstance(optim, OptimConfig) else optim,
        "scaler": torch.amp.GradScaler("cpu", enabled=False),
        "lr_factor": lambda step: 1.0,
        "autocast": contextlib.nullcontext,
        "batch_size": 8,
        "accumulation_steps": 1,
        "max_grad_norm": 0.0,
        "freeze": "none",
        "seed": 0,
    }
    return UpdateRule(**values | changes)


def everything(rule: UpdateRule) -> list[Any]:
    """All that an update may touch, as values that can be compared."""
    network = rule.network
    optimizer = getattr(rule.optimizer, "base_optimizer", rule.optimizer)
    found: list[Any] = [random.getstate(), torch.get_rng_state(), *np.random.get_state()]
    for module in network.modules():
        found += [module.training, *(b.clone() for b in module.buffers(recurse=False))]
    for p in network.parameters():
        found += [p.detach().clone(), p.requires_grad, None if p.grad is None else p.grad.clone()]
    for group in optimizer.param_groups:
        found.append({k: v for k, v in group.items() if k != "params"})
        for p in group["params"]:
            state = optimizer.state.get(p)
            found.append(copy.deepcopy(state))
    found.append(rule.scaler.state_dict())
    return copy.deepcopy(found)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)


def calm(rule: UpdateRule) -> None:
    assert find_lr(rule, batches(), base_lr=LR, num_updates=12).rates


def to_nan(rule: UpdateRule) -> None:
    """A loss that is NaN from the fifth update on."""
    seen: list[int] = []

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        seen.append(1)
        value = rule.loss_fn(logits, targets)
        return value * float("nan") if len(seen) >= 5 else value

    broken = dataclasses.replace(rule, loss_fn=loss)
    finding = find_lr(broken, batches(), base_lr=LR, num_updates=12)
    assert len(finding.rates) == 4
    assert finding.diverged_at is not None
    assert all(math.isfinite(loss) for loss in finding.losses)


def interrupted(rule: UpdateRule) -> None:
    def stopping() -> Iterator[tuple[Tensor, Tensor]]:
        for number, batch in enumerate(batches()):
            if number == 6:
                random.random()
                np.random.rand()
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        find_lr(rule, stopping(), base_lr=LR, num_updates=12)


OPTIMIZERS = {
    "sgd": OptimConfig(lr=LR, momentum=0.9, weight_decay=1e-2),
    "adamw": OptimConfig(name="adamw", lr=LR),
    "muon": OptimConfig(name="muon", lr=LR, filter_lr=0.2),
    "lookahead": OptimConfig(lr=LR, momentum=0.9),
}


@pytest.mark.parametrize("test", [calm, to_nan, interrupted], ids=lambda f: f.__name__)
@pytest.mark.parametrize("optim", OPTIMIZERS)
@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
def test_everything_is_as_before_bit_for_bit(
    test: Callable[[UpdateRule], None], optim: str, trained: bool
) -> None:
    network = make_network()
    optimizer = make_optimizer(network, OPTIMIZERS[optim])
    if optim == "lookahead":  # one optimizer around another
        optimizer = Lookahead(optimizer, k=2)
    rule = make_rule(network, optimizer)
    if trained:  # momentum, statistics and a gradient are there
        list(train_steps(rule, batches(), start_step=0, total_steps=2))
        rule.loss_fn(network(next(batches())[0]), next(batches())[1]).backward()
    network.eval()  # as after a validation
    network.training = True  # of the outermost module alone
    random.seed(5)
    np.random.seed(6)
    torch.manual_seed(7)
    before = everything(rule)
    test(rule)
    assert same(everything(rule), before)


def test_a_frozen_backbone_stays_frozen() -> None:
    network = make_network()
    freeze_backbone(network)
    rule = make_rule(network, OPTIMIZERS["sgd"], freeze="backbone")
    before = everything(rule)
    calm(rule)
    assert same(everything(rule), before)


def test_training_after_the_test_is_training_without_it() -> None:
    def trained(look_first: bool) -> dict[str, Tensor]:
        network = make_network()
        rule = make_rule(network, OPTIMIZERS["sgd"])
        if look_first:
            find_lr(rule, batches(), base_lr=LR, num_updates=12)
        list(train_steps(rule, batches(), start_step=0, total_steps=3))
        return network.state_dict()

    assert same(dict(trained(True)), dict(trained(False)))


def test_rates_rise_by_one_factor_and_losses_are_averaged_without_bias() -> None:
    rule = make_rule(make_network(), OPTIMIZERS["sgd"])
    finding = find_lr(rule, batches(), base_lr=LR, num_updates=30)
    assert finding.rates[0] == pytest.approx(LR * 1e-6)
    ratio = 1e8 ** (1 / 29)
    assert finding.rates == pytest.approx([LR * 1e-6 * ratio**i for i in range(len(finding.rates))])
    n = len(finding.losses)
    weights = SMOOTHING ** np.arange(n - 1, -1, -1)
    mean = float((weights * finding.losses).sum() / weights.sum())
    assert finding.smoothed[-1] == pytest.approx(mean)
    assert finding.smoothed[0] == pytest.approx(finding.losses[0])
    # The lowest rates move nothing, so the first losses are those of the untouched network.
    reference = make_rule(make_network(), OptimConfig(lr=1e-30, momentum=0.0))
    first = [s.loss.item() for s in train_steps(reference, batches(), start_step=0, total_steps=4)]
    assert finding.losses[:4] == pytest.approx(first, rel=1e-3)


class Bowl(nn.Module):
    """A quadratic: gradient descent contracts below rate 2 / curvature, and explodes above."""

    def __init__(self, curvature: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))
        self.curvature = curvature

    def get_classifier(self) -> nn.Module:
        return nn.Identity()

    def forward(self, images: Tensor) -> Tensor:
        return self.curvature / 2 * self.w**2


@pytest.mark.parametrize("curvature", [0.2, 20.0])
def test_on_a_quadratic_the_suggestions_are_below_the_rate_at_which_it_diverges(
    curvature: float,
) -> None:
    bowl = Bowl(curvature)
    optimizer = torch.optim.SGD([{"params": [bowl.w], "lr": LR, "initial_lr": LR}], lr=LR)
    # The bottom is not at 0, or four times the best loss would be no loss at all.
    rule = make_rule(bowl, optimizer, loss_fn=lambda value, _: value + 0.1 * curvature)
    finding = find_lr(rule, batches(), base_lr=LR)
    limit = 2 / curvature
    assert finding.steepest is not None
    assert finding.minimum_tenth is not None
    assert limit / 1000 < finding.steepest < limit
    assert limit / 1000 < finding.minimum_tenth < limit
    if limit < LR * 100 / 3:
        assert finding.diverged_at is not None
        assert limit < finding.diverged_at < 10 * limit
        assert finding.smoothed[-1] > 4 * min(finding.smoothed)
        before = finding.smoothed[:-1]
        assert all(a <= 4 * min(before[: i + 1]) for i, a in enumerate(before))


def test_the_steepest_place_of_a_known_curve_is_found_despite_the_average() -> None:
    rates = np.geomspace(1e-6, 1e2, 100)
    losses = 2.3 - 1.5 / (1 + np.exp(-4 * np.log10(rates / 1e-2)))  # steepest at 1e-2
    losses = losses + np.where(rates > 1, (rates - 1) * 0.3, 0)  # lowest near 1
    weights = [SMOOTHING ** np.arange(i, -1, -1) for i in range(100)]
    smoothed = [float((w * losses[: len(w)]).sum() / w.sum()) for w in weights]
    steepest, lowest = suggest(rates.tolist(), losses.tolist(), smoothed)
    assert steepest == pytest.approx(1e-2, rel=0.6)
    assert lowest is not None
    assert 0.1 < lowest < 3
    assert round(SMOOTHING / (1 - SMOOTHING)) == LAG


def test_where_nothing_is_learned_nothing_is_suggested() -> None:
    rng = np.random.default_rng(0)
    losses = (2.3 + 0.1 * rng.standard_normal(100)).tolist()
    smoothed = [float(np.mean(losses[max(0, i - 9) : i + 1])) for i in range(100)]
    assert suggest(np.geomspace(1e-6, 1e2, 100).tolist(), losses, smoothed) == (None, None)
    rising = np.linspace(1, 3, 100).tolist()
    assert suggest(np.geomspace(1e-6, 1e2, 100).tolist(), rising, rising) == (None, None)


def test_a_loss_that_is_never_finite_is_one_sentence() -> None:
    rule = make_rule(make_network(), OPTIMIZERS["sgd"])
    nan = dataclasses.replace(rule, loss_fn=lambda x, _: x.sum() * float("nan"))
    before = everything(rule)
    with pytest.raises(ConfigError, match="must be finite at the lowest rate"):
        find_lr(nan, batches(), base_lr=LR)
    assert same(everything(rule), before)


@pytest.mark.slow
def test_the_verb_draws_reports_and_leaves_no_run(
    in_empty_folder: Path, tiny_settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = in_empty_folder / "tmp"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    result = fieldmark.lr_find("digits", [*tiny_settings, "train.threads=1"], out="plot.png")
    facts = result.to_json()
    assert facts["own_lr"] == 0.2
    assert facts["path"] == "plot.png"
    assert (in_empty_folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert 0.2 * 1e-6 < facts["steepest"] < 0.2 * 100
    assert len(facts["rates"]) == len(facts["losses"]) == len(facts["smoothed"]) <= 100
    assert not list(temporary.iterdir())
    assert [path.name for path in in_empty_folder.iterdir() if path != temporary] == ["plot.png"]
    with pytest.raises(ConfigError, match="in a folder that exists"):
        fieldmark.lr_find("digits", out="nowhere/plot.png")
    with pytest.raises(ConfigError, match="train.method must be gradient"):
        fieldmark.lr_find("linear-probe", ["model.pretrained=timm:resnet18"])


def test_no_other_network_is_trained_to_choose_images_for_it(
    tiny_settings: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: object, **__: object) -> None:
        pytest.fail("a network was trained to choose images")

    monkeypatch.setattr("fieldmark.training.parts.settle_hardest", never)
    settings = [*tiny_settings, "train.threads=1", "data.keep_hardest_frac=0.5"]
    assert fieldmark.lr_find("digits", settings).to_json()["rates"]
    assert "updates have any 8 images" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_signal_ends_it_without_a_trace(
    tmp_path: Path, number: signal.Signals, status: int
) -> None:
    words = [sys.executable, "-m", "fieldmark", "lr-find", "digits", "train.threads=1"]
    process = subprocess.Popen(
        [*words, "--out", str(tmp_path / "plot.png")],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    limit = time.monotonic() + 60
    while not list(tmp_path.glob("*/run/decisions.jsonl")) and time.monotonic() < limit:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status, stderr
    assert "Nothing is kept" in stderr
    assert "Traceback" not in stderr
    assert not list(tmp_path.glob("fieldmark-*"))

"""Why training went wrong: four causes, each measured.

Inputs that do not fit their normalisation, a rate too high for the weights, gradients that nothing
clips, and an initialisation whose signal grows or dies from layer to layer.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fieldmark.training.loop import UpdateRule, train_steps
from fieldmark.training.watch import Fault, Line

# Healthy networks move by about a thousandth to a hundredth of their norm in one update.
_USUAL_STEP, _LARGE_STEP = 0.01, 0.1
_MAX_INPUT_MEAN, _MAX_INPUT_STD, _MIN_INPUT_STD = 3.0, 5.0, 0.1
_MAX_LAYER_STD, _MIN_LAYER_STD = 1e3, 1e-5
_LARGE_NORM_RATIO = 10.0

Update = Sequence[tuple[Tensor, Tensor]]
"""(images, targets) of each of its micro-batches."""


@dataclass(frozen=True, slots=True)
class Signal:
    """How large the outputs of the layers are, in order of the forward pass."""

    first_non_finite: str  # name of a layer; empty: none
    largest: str
    largest_std: float | None
    smallest: str
    smallest_std: float | None


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was measured, and what it points to."""

    cause: str  # "input", "rate", "clipping" or "initialisation"
    what: str  # the fault, as part of a sentence
    rollbacks: int
    input_mean: float | None  # of a batch as the network sees it: near 0
    input_std: float | None  # near 1
    input_finite_frac: float
    lr: float  # optim.lr times the schedule and the rollbacks, at the fault
    relative_step: float | None  # norm of one update over that of the weights; None: not finite
    sound_grad_norm: float | None  # median of the updates that were sound
    last_grad_norm: float | None  # the largest of the last ones; None: not finite
    max_grad_norm: float  # 0: no clipping
    at_fault: Signal  # with the weights as they are now
    when_sound: Signal  # with those of the last good state

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def sentence(self) -> str:
        """Return the cause with its measurement and what to do, then the other measurements."""
        again = f" again after {self.rollbacks} rollbacks" if self.rollbacks else ""
        layer = self.at_fault.first_non_finite
        beside = [
            f"inputs have mean {_g(self.input_mean)} and std {_g(self.input_std)}",
            f"one update moves the weights by {_percent(self.relative_step)} of their norm at a "
            f"rate of {self.lr:.3g}",
            f"gradient norm {_g(self.last_grad_norm)} against {_g(self.sound_grad_norm)} before, "
            + (f"clipped at {self.max_grad_norm:g}" if self.max_grad_norm else "not clipped"),
            f"the first layer that is not finite is {layer}"
            if layer
            else f"the largest layer is {self.at_fault.largest}, "
            f"std {_g(self.at_fault.largest_std)}",
        ]
        return f"{self.what}{again}. {_ADVICE[self.cause](self)} Measured: {'; '.join(beside)}."


def diagnose(
    rule: UpdateRule,
    *,
    fault: Fault,
    lines: Sequence[Line],
    update: Update,
    at_fault: Signal,
    lr: float,
    rollbacks: int,
) -> Diagnosis:
    """Measure from the last good state, which `rule` holds and which this spoils.

    Args:
        lines: metrics of the last updates, the bad ones among them.
        update: the micro-batches of the first bad update, of this rank.
        at_fault: `layer_signal` of the bad weights.
        lr: the rate at the fault.
    """
    when_sound = layer_signal(rule, update)
    relative_step = _relative_step(rule, update, fault.step)
    mean, std, finite_frac = _input_statistics(rule, update)
    bad = [line for line in lines if line["step"] >= fault.step]
    norms = [line["grad_norm"] for line in bad]
    found = Diagnosis(
        cause="",
        what=fault.sentence(),
        rollbacks=rollbacks,
        input_mean=mean,
        input_std=std,
        input_finite_frac=finite_frac,
        lr=lr,
        relative_step=relative_step,
        sound_grad_norm=_median([line["grad_norm"] for line in lines if line["step"] < fault.step]),
        last_grad_norm=None if None in norms or not norms else max(norms),
        max_grad_norm=rule.max_grad_norm,
        at_fault=at_fault,
        when_sound=when_sound,
    )
    # Each rank has measured its own part; they must tell the same.
    return rule.ranks.share(replace(found, cause=_cause(found, fault)))


@torch.no_grad()
def layer_signal(rule: UpdateRule, update: Update) -> Signal:
    """Return how large each layer's output is in training mode, of the worst micro-batch."""
    network = rule.network
    images = max((part for part, _ in update), key=lambda part: _num_bad(part) + (len(part) > 0))
    seen: list[tuple[str, float]] = []

    def listen(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                seen.append((name, float(output.float().std())))

        return hook

    leaves = [(name, m) for name, m in network.named_modules() if not list(m.children())]
    hooks = [module.register_forward_hook(listen(name)) for name, module in leaves]
    was_training = network.training
    statistics = {name: buffer.clone() for name, buffer in network.named_buffers()}
    try:
        network.train()
        with rule.autocast():
            network(images)
    finally:
        for hook in hooks:
            hook.remove()
        for name, buffer in network.named_buffers():
            buffer.copy_(statistics[name])
        network.train(was_training)
    broken = next((name for name, std in seen if not math.isfinite(std)), "")
    sound = [pair for pair in seen if math.isfinite(pair[1])]
    largest = max(sound, key=lambda pair: pair[1], default=("", None))
    smallest = min(sound, key=lambda pair: pair[1], default=("", None))
    return Signal(broken, *largest, *smallest)


def _num_bad(images: Tensor) -> float:
    return float((~torch.isfinite(images)).sum())


def _input_statistics(rule: UpdateRule, update: Update) -> tuple[float | None, float | None, float]:
    """Return mean and standard deviation of the finite inputs over all ranks, and their share."""
    sums = torch.zeros(4, dtype=torch.float64)  # values, finite ones, their sum, that of squares
    for images, _ in update:
        finite = images[torch.isfinite(images)].double()
        sums += torch.stack(
            [
                torch.tensor(float(images.numel())),
                torch.tensor(float(finite.numel())),
                finite.sum().cpu(),
                finite.square().sum().cpu(),
            ]
        )
    values, num_finite, total, squares = rule.ranks.total(sums).tolist()
    share = num_finite / values if values else 1.0
    if not num_finite:
        return None, None, share
    mean = total / num_finite
    return mean, math.sqrt(max(0.0, squares / num_finite - mean**2)), share


def _relative_step(rule: UpdateRule, update: Update, step: int) -> float | None:
    """Make the update that failed once more; return how far it moves the weights.

    None: it is refused again, and moves nothing.
    """
    params = [p for p in rule.network.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in params]

    (again,) = train_steps(rule, iter(update), start_step=step - 1, total_steps=step)
    if not again.is_finite:
        return None
    moved = _norm([p.detach() - old for p, old in zip(params, before, strict=True)])
    norm = _norm(before)
    return _number(moved / norm)


def _cause(found: Diagnosis, fault: Fault) -> str:
    mean, std, step = found.input_mean, found.input_std, found.relative_step
    if (
        fault.kind == "input"
        or found.input_finite_frac < 1
        or mean is None
        or abs(mean) > _MAX_INPUT_MEAN
        or (std is not None and not _MIN_INPUT_STD < std < _MAX_INPUT_STD)
    ):
        return "input"
    if step is not None and step > _LARGE_STEP:
        return "rate"
    sound = found.when_sound
    if sound.first_non_finite or not (
        (sound.smallest_std or 0) > _MIN_LAYER_STD and (sound.largest_std or 0) < _MAX_LAYER_STD
    ):
        return "initialisation"
    norm = found.last_grad_norm
    grows = norm is None or norm > _LARGE_NORM_RATIO * (found.sound_grad_norm or norm)
    return "clipping" if grows and not found.max_grad_norm else "rate"


def _advise_input(found: Diagnosis) -> str:
    if found.input_finite_frac < 1 or found.input_mean is None:
        return (
            f"The images are at fault: {1 - found.input_finite_frac:.2%} of a batch's values are "
            "not finite. Check the data."
        )
    return (
        f"The inputs do not fit their normalisation: mean {_g(found.input_mean)} and std "
        f"{_g(found.input_std)} instead of about 0 and 1. Check the data and the weights' mean "
        "and std."
    )


def _advise_rate(found: Diagnosis) -> str:
    step = found.relative_step
    if step is None or step <= _USUAL_STEP:
        return f"The rate {found.lr:.3g} is the likeliest cause. Lower optim.lr to a tenth."
    return (
        f"The rate is too high: at {found.lr:.3g} one update moves the weights by "
        f"{_percent(step)} of their norm, where {_USUAL_STEP:.0%} is usual. Try a rate of "
        f"{found.lr * _USUAL_STEP / step:.2g} (optim.lr)."
    )


def _advise_clipping(found: Diagnosis) -> str:
    limit = 2 * (found.sound_grad_norm or 0.5)
    return (
        f"Single gradients are much larger than the usual {_g(found.sound_grad_norm)}, and nothing "
        f"clips them. Set optim.max_grad_norm={limit:.2g}."
    )


def _advise_initialisation(found: Diagnosis) -> str:
    sound = found.when_sound
    return (
        f"The signal does not pass the network: the outputs of {sound.largest} have std "
        f"{_g(sound.largest_std)}, those of {sound.smallest} {_g(sound.smallest_std)}. Check the "
        "weights it starts from, or warm up longer (schedule.warmup_epochs)."
    )


_ADVICE = {
    "input": _advise_input,
    "rate": _advise_rate,
    "clipping": _advise_clipping,
    "initialisation": _advise_initialisation,
}


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.square().sum() for tensor in tensors]).sum().sqrt()


def _number(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None


def _median(values: Sequence[float | None]) -> float | None:
    known = sorted(value for value in values if value is not None)
    return known[len(known) // 2] if known else None


def _g(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3g}"


def _percent(value: float | None) -> str:
    return "no finite share" if value is None else f"{value:.2%}"

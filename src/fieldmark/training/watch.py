"""Reading what training reports: which updates went wrong, and whether to go back."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fieldmark.training.loop import Step

MAX_BAD_INPUTS = 50  # updates in a row
HISTORY = 100  # sound updates that a loss is compared with
_EARLIEST = 20  # updates before which a rising loss is no news

Line = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a run cannot simply go on."""

    step: int  # the first of the bad updates in a row
    kind: str  # "non-finite", "spike" or "input"
    count: int

    def sentence(self) -> str:
        """Return what happened, as part of a sentence."""
        what = {
            "non-finite": "loss or gradient is not finite",
            "spike": "loss has jumped",
            "input": "images have values that are not finite",
        }[self.kind]
        return f"{what} in {self.count} updates in a row from update {self.step} on"


def read_steps(steps: Sequence[Step], *, per_epoch: int, lr: float, is_scaled: bool) -> list[Line]:
    """Return a line of metrics for each update; this waits for the device.

    An update that changed nothing has "skipped": "non-finite" or "input", and null for a number
    that is not finite. With a gradient scaler an infinite norm alone is how the scale is found.
    """
    values = torch.stack(
        [
            torch.stack(
                [s.loss, s.grad_norm.float(), s.is_finite.float(), s.inputs_are_finite.float()]
            )
            for s in steps
        ]
    ).tolist()
    lines = []
    for step, (loss, norm, is_finite, inputs_are_finite) in zip(steps, values, strict=True):
        line: Line = {
            "kind": "train",
            "step": step.index,
            "epoch": (step.index - 1) / per_epoch,
            "loss": loss if math.isfinite(loss) else None,
            "grad_norm": norm if math.isfinite(norm) else None,
            "lr": lr * step.lr_factor,
        }
        if not inputs_are_finite:
            line["skipped"] = "input"
        elif not is_finite:
            line["skipped"] = "scale" if is_scaled and math.isfinite(loss) else "non-finite"
        lines.append(line)
    return lines


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the lines of some updates say."""

    fault: Fault | None
    is_calm: bool  # the last update was sound: its state is one to go back to


def examine(
    before: Iterable[Line], lines: Sequence[Line], *, bad_updates: int, spike_factor: float
) -> Verdict:
    """Return the first fault that `lines` complete, given the lines `before` them.

    A fault is `bad_updates` updates in a row that are not finite or whose loss is more than
    `spike_factor` times the largest of the last 100 sound ones; or 50 in a row whose images are
    not finite: those are skipped, and going back would not mend them. A pure function of the
    lines, so that a resumed run finds what the undisturbed one would have found.
    """
    sound: list[float] = []
    streak: list[Line] = []
    kind = ""
    fresh = {id(line) for line in lines}
    for line in [*before, *lines]:
        found = _kind(line, sound, spike_factor)
        if not found:
            sound = [*sound[1 - HISTORY :], line["loss"]] if line["loss"] is not None else sound
            streak, kind = [], ""
            continue
        is_same = (found == "input") == (kind == "input")
        streak = [*streak, line] if streak and is_same else [line]
        kind = found
        limit = MAX_BAD_INPUTS if kind == "input" else bad_updates
        if len(streak) >= limit and id(line) in fresh:
            return Verdict(Fault(streak[0]["step"], kind, len(streak)), False)
    return Verdict(None, not streak)


def _kind(line: Line, sound: Sequence[float], spike_factor: float) -> str:
    skipped = line.get("skipped", "")
    if skipped == "scale":
        return ""
    if skipped:
        return str(skipped)
    is_spike = (
        spike_factor > 0
        and len(sound) >= _EARLIEST
        and line["loss"] is not None
        and line["loss"] > spike_factor * max(sound)
    )
    return "spike" if is_spike else ""

"""Reading what training reports: which updates went wrong, and whether to go back."""

import math
import statistics
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fieldmark.training.loop import Step

MAX_BAD_INPUTS = 50  # updates in a row
MAX_OFTEN = 30  # of HISTORY updates that are not finite, though not in a row
MAX_HIGH = 20  # updates in a row whose loss is above all of the sound ones
_RISING = 5  # of them, from which on no state is kept to go back to
HISTORY = 100  # sound updates that a loss is compared with
_EARLIEST = 20  # updates before which a rising loss is no news
_SEARCH = 30  # updates in a row in which a gradient scaler may find its scale: 2^16 is halved to 1

Line = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a run cannot simply go on."""

    step: int  # the first of the bad updates in a row; of "often" the last of them
    kind: str  # "non-finite", "often", "spike", "rise" or "input"
    count: int

    def sentence(self) -> str:
        """Return what happened, as part of a sentence."""
        if self.kind == "often":
            return (
                f"loss or gradient is not finite in {self.count} of the last {HISTORY} updates up "
                f"to {self.step}"
            )
        what = {
            "non-finite": "loss or gradient is not finite",
            "spike": "loss has jumped",
            "rise": "loss has stayed above all before",
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


class Watch:
    """Follows the lines of a run, one after the other, and says when to go back.

    A fault is `bad_updates` updates in a row that are not finite or whose loss jumps; or 50 in a
    row whose images are not finite: those are skipped, and going back would not mend them. So are
    30 of the last 100 updates (or `bad_updates`, if more) that are not finite. A loss
    jumps when it is more than `spike_factor` times the largest of the last 100 sound ones. One that
    stays above all of these, 20 updates in a row, is a fault too: what was learned is lost, though
    it was not lost at once. Either must be more than half of what the first losses were: a run that
    has almost nothing left to learn may treble its loss without harm.

    What it says depends on the lines alone, all of them from the first, so that a resumed run finds
    what the undisturbed one would have found.
    """

    def __init__(
        self,
        *,
        bad_updates: int,
        spike_factor: float,
        fresh_starts: Collection[int] = (),
        forgiven_to: int = 0,
    ) -> None:
        """Begin before the first line.

        Args:
            fresh_starts: updates from which on losses are of another kind, such as of larger
                images, and are not compared with those before.
            forgiven_to: the last update before a rollback's lower rate: what was not finite until
                then does not count any more, unless it is in a row with what comes.
        """
        self._bad_updates, self._spike_factor = bad_updates, spike_factor
        self._fresh_starts, self._forgiven_to = fresh_starts, forgiven_to
        self._first: list[float] = []
        self._sound: deque[float] = deque(maxlen=HISTORY)
        self._high: list[float] = []  # losses in a row above all sound ones
        self._high_from = 0
        self._begun_at, self._count, self._kind = 0, 0, ""  # of the bad updates in a row
        self._is_bad: deque[bool] = deque(maxlen=HISTORY)  # of the last updates: not finite
        self._searching = 0  # updates in a row that a gradient scaler skipped

    @property
    def is_calm(self) -> bool:
        """Whether the state after the last line is one to go back to."""
        is_rising = len(self._high) >= _RISING
        return self._kind in ("", "input") and not is_rising  # bad images change nothing

    def take(self, line: Line) -> Fault | None:
        """Take the next line in; return the fault that it completes."""
        skipped = str(line.get("skipped", ""))
        if skipped == "scale":
            self._searching += 1
            if self._searching <= _SEARCH:
                return None
            skipped = "non-finite"
        else:
            self._searching = 0
        if line["step"] in self._fresh_starts:
            self._sound.clear()
            self._high.clear()
        self._is_bad.append(skipped == "non-finite" and line["step"] > self._forgiven_to)
        kind = skipped or ("spike" if self._is_above(line["loss"], self._spike_factor) else "")
        if not kind:
            self._count, self._kind = 0, ""
            return self._take_finite(line["step"], line["loss"])
        if not self._count or (kind == "input") != (self._kind == "input"):
            self._begun_at, self._count = line["step"], 0
        self._count, self._kind = self._count + 1, kind
        limit = MAX_BAD_INPUTS if kind == "input" else self._bad_updates
        if self._count == limit:
            return Fault(self._begun_at, kind, self._count)
        often = max(MAX_OFTEN, self._bad_updates)
        if kind == "non-finite" and sum(self._is_bad) >= often:
            self._is_bad.clear()  # told once
            return Fault(line["step"], "often", often)
        return None

    def _take_finite(self, step: int, loss: float) -> Fault | None:
        if len(self._sound) == HISTORY and self._is_above(loss, 1.0):
            self._high_from = self._high_from if self._high else step
            self._high.append(loss)
            is_fault = len(self._high) == MAX_HIGH
            return Fault(self._high_from, "rise", MAX_HIGH) if is_fault else None
        self._sound.extend([*self._high, loss])
        self._high.clear()
        if len(self._first) < _EARLIEST:
            self._first.append(loss)
        return None

    def _is_above(self, loss: float, factor: float) -> bool:
        """Whether a loss is above `factor` times the largest sound one, and no small one."""
        is_early = len(self._first) < _EARLIEST or len(self._sound) < _EARLIEST
        if not self._spike_factor or is_early:
            return False
        return loss > max(factor * max(self._sound), statistics.median(self._first) / 2)

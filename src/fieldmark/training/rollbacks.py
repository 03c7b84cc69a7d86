"""The times a run has gone back, and what they make of its rate."""

from typing import Any

from fieldmark.config import TrainConfig
from fieldmark.runtime.log import warn
from fieldmark.training.run_folder import RunFolder
from fieldmark.training.watch import Fault

_KIND = "rollback "  # of the decision, before its number


class Rollbacks:
    """Recorded in the run's decisions, so that a resumed run has the same rates."""

    def __init__(self, run: RunFolder, train: TrainConfig) -> None:
        self._run, self._factor, self._most = run, train.rollback_lr_factor, train.max_rollbacks
        self._known: list[dict[str, Any]] = list(run.decisions(_KIND).values())

    def __len__(self) -> int:
        """Return how many there were."""
        return len(self._known)

    @property
    def is_last_reached(self) -> bool:
        """Whether there may be no other."""
        return len(self) >= self._most

    @property
    def last_to(self) -> int:
        """The update that the run last went back to; 0: it has not, or to its beginning."""
        return int(self._known[-1]["to"]) if self._known else 0

    def slowdown(self, step: int) -> float:
        """Return the product of the factors of all rollbacks to an update at or before `step`."""
        factor = 1.0
        for rollback in self._known:
            if step >= rollback["to"]:
                factor *= rollback["lr_factor"]
        return factor

    def add(self, fault: Fault, *, found_at: int, to: int) -> None:
        """Record that the run goes back from update `found_at` to update `to`."""
        decision = {"from": found_at, "to": to, "lr_factor": self._factor}
        self._known.append(self._run.decide(f"{_KIND}{len(self) + 1}", decision, fault.sentence()))
        warn(
            f"{fault.sentence()}: back to update {to} with {self._factor:g} times the rate "
            f"(rollback {len(self)} of at most {self._most})"
        )

"""What a sweep found: a row for each trial, and the command that repeats the best."""

import csv
import io
import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fieldmark.measure import Rate
from fieldmark.runtime.files import write_atomic, write_json
from fieldmark.training.sweep_plan import Plan

STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}


@dataclass(frozen=True, slots=True)
class Row:
    """One trial that has ended."""

    trial: int  # from 1
    state: str  # complete, pruned or failed
    values: dict[str, Any]  # of the keys that are searched
    settings: tuple[str, ...]  # the same as section.key=value
    accuracy: Rate | None  # on val, of the weights that the run chose; None: never validated
    loss: float | None  # nats, of the same weights
    step: int | None  # the update they are from
    minutes: float
    note: str  # why it was pruned or failed

    @property
    def run(self) -> str:
        """The run's folder in the sweep's."""
        return run_name(self.trial)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "trial": self.trial,
            "state": self.state,
            "values": self.values,
            "val_top1_accuracy": None if self.accuracy is None else self.accuracy.to_json(),
            "val_loss": self.loss,
            "step": self.step,
            "minutes": round(self.minutes, 3),
            "note": self.note,
            "run": self.run,
        }


def run_name(trial: int) -> str:
    """Return the folder of a trial's run, counted from 1."""
    return f"trial-{trial:04d}"


def best_row(rows: Sequence[Row], plan: Plan) -> Row | None:
    """Return the best complete trial; of equal accuracies the one with the lower loss."""

    def rank(row: Row) -> tuple[float, float]:
        accuracy = 0.0 if row.accuracy is None else row.accuracy.value
        loss = float("inf") if row.loss is None else row.loss
        return (-accuracy, loss) if plan.larger_is_better else (loss, -accuracy)

    return min((row for row in rows if row.state == "complete"), key=rank, default=None)


def summarise(folder: Path, rows: Sequence[Row], plan: Plan) -> dict[str, Any]:
    """Return the facts of a sweep."""
    best = best_row(rows, plan)
    found = None
    if best is not None:
        command = ["fieldmark", "train", plan.recipe, *plan.fixed, *best.settings]
        found = best.to_json() | {
            "settings": [*plan.fixed, *best.settings],
            "command": shlex.join(command),
            "finish": shlex.join(
                ["fieldmark", "train", "--resume", "--out", str(folder / best.run)]
            ),
        }
    return {
        "recipe": plan.recipe,
        "metric": plan.metric,
        "num_trials": plan.num_trials,
        "fixed": list(plan.fixed),
        "spaces": {space.key: space.text for space in plan.spaces},
        "trials": [row.to_json() for row in rows],
        "best": found,
    }


def write_results(folder: Path, facts: dict[str, Any]) -> None:
    """Write sweep.json, and sweep.csv with a line for each trial."""
    write_json(folder / "sweep.json", facts)
    keys = list(facts["spaces"])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    columns = ["val_top1_accuracy", "low", "high", "n", "val_loss", "step", "minutes", "note"]
    writer.writerow(["trial", "state", *keys, *columns])
    for row in facts["trials"]:
        rate = row["val_top1_accuracy"] or {}
        values = [row["values"].get(key) for key in keys]
        writer.writerow(
            [
                row["trial"],
                row["state"],
                *(json.dumps(v) if isinstance(v, bool | list) else v for v in values),
                *(rate.get(name) for name in ("value", "low", "high", "n")),
                *(row[name] for name in ("val_loss", "step", "minutes", "note")),
            ]
        )
    write_atomic(folder / "sweep.csv", text.getvalue().encode())

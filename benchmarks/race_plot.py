"""Draw the race: top-1 accuracy over six views against seconds of training.

    .venv/bin/python benchmarks/race_plot.py docs/images/race.png

Points are runs to their end, of benchmarks/results/race.json, those of the machine of its last row.
What is dashed was not run to its end: its time is extrapolated from updates that were timed there,
and its accuracy is another's: airbench94's was measured on this copy on another day, and
the tutorial's is published, for the original images (docs/experiments.md).
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import results_file
from matplotlib import pyplot
from matplotlib.axes import Axes

RUNS = {
    "ours": ("cifar10-fast94", "C0", "o"),
    "ours-12": ("cifar10-fast94, fitted to 12 minutes", "C0", "^"),
    "plain-12": ("airbench94's settings in this trainer, 12 minutes", "C1", "^"),
}
EXTRAPOLATED = {
    "rival-bfloat16": ("airbench94's settings in plain torch, bfloat16 (time extrapolated)", 0.906),
    "rival": ("the same in float32 (time extrapolated)", 0.906),
    "tutorial": ("the tutorial's loop (time extrapolated; accuracy published, original)", 0.945),
}


def main() -> None:
    """Read the rows and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a PNG")
    out = parser.parse_args().out
    rows = json.loads((results_file.RESULTS / "race.json").read_text())["rows"]
    here = [row for row in rows if row["machine"]["instruction_set"] == instructions(rows[-1])]
    figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
    for arm, (label, colour, marker) in RUNS.items():
        runs = [row for row in here if row["arm"] == arm]
        axes.scatter(
            [row["train_s"] for row in runs],
            [100 * row["six_views"] for row in runs],
            color=colour,
            marker=marker,
            label=f"{label} ({len(runs)} runs)",
        )
    for index, (arm, (label, accuracy)) in enumerate(EXTRAPOLATED.items(), start=2):
        times = [row["extrapolated_s"] for row in here if row["arm"] == arm]
        if times:
            draw_extrapolated(axes, statistics.median(times), 100 * accuracy, label, f"C{index}")
    axes.set_xscale("log")
    axes.set_xlabel(f"seconds of training, 2 cores ({rows[-1]['machine']['cpu']}), log scale")
    axes.set_ylabel("top-1 accuracy over six views, %")
    axes.set_title("CIFAR-10 (a JPEG copy, which is harder than the original)", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", fontsize=8)
    axes.set_ylim(89.5, 97)
    figure.savefig(out, dpi=110)


def draw_extrapolated(axes: Axes, seconds: float, accuracy: float, label: str, colour: str) -> None:
    """Draw a time that was not waited for, dashed, with an empty mark at its end."""
    axes.plot([seconds, seconds], [0, accuracy], "--", color=colour, alpha=0.7)
    axes.plot([seconds], [accuracy], "s", color=colour, mfc="white", label=label)


def instructions(row: dict[str, Any]) -> str:
    """Return the instruction set that a row was measured with."""
    return str(row["machine"]["instruction_set"])


if __name__ == "__main__":
    main()

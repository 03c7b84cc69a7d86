"""The picture of calibration: how sure, against how often right, before and after."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from fieldmark.errors import require
from fieldmark.packaging.entries import CalibrationEntry, Confidence
from fieldmark.runtime.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def save_reliability_plot(path: Path, confidence: Confidence, *, title: str) -> None:
    """Write a PNG with a reliability diagram at temperature 1, and one at the fitted.

    Each point is a bin with its 95 % interval; on the diagonal, a probability means what it says.
    """
    require("matplotlib", "train", "drawing the reliability diagram")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 5.6), dpi=110)
    figure.suptitle(title, parse_math=False)  # a name may hold a dollar sign
    above, below = figure.subplots(2, 2, height_ratios=(3, 1), sharex=True)
    pairs = (
        ("before", 1.0, confidence.before),
        ("after", confidence.temperature, confidence.after),
    )
    for column, (name, temperature, entry) in enumerate(pairs):
        _draw_accuracy(above[column], entry)
        _draw_counts(below[column], entry)
        above[column].set_title(
            f"{name}: temperature {temperature:.3g}\n"
            f"ECE {entry.ece.value:.3f} ({entry.ece.low:.3f} to {entry.ece.high:.3f}), "
            f"NLL {entry.nll.value:.3f}",
            fontsize=10,
        )
    above[0].set_ylabel("share that is right")
    above[0].legend(fontsize=8, loc="upper left")
    below[0].set_ylabel("images")
    below[1].sharey(below[0])
    figure.tight_layout()
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight", pad_inches=0.15)
    write_atomic(path, file.getvalue())


def _draw_accuracy(axes: "Axes", entry: CalibrationEntry) -> None:
    axes.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="calibrated")
    points = [
        (one.mean_confidence, one.accuracy)
        for one in entry.bins
        if one.mean_confidence is not None and one.accuracy is not None
    ]
    rates = [rate for _, rate in points]
    axes.errorbar(
        [sure for sure, _ in points],
        [rate.value for rate in rates],
        yerr=[
            [rate.value - rate.low for rate in rates],
            [rate.high - rate.value for rate in rates],
        ],
        fmt="o-",
        color="tab:blue",
        ecolor="0.55",
        markersize=4,
        linewidth=1.2,
        elinewidth=1,
        capsize=2,
        label=f"measured, n={entry.ece.n:,}",
    )
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.grid(visible=True, color="0.92")


def _draw_counts(axes: "Axes", entry: CalibrationEntry) -> None:
    axes.bar(
        [one.low for one in entry.bins],
        [one.count for one in entry.bins],
        width=[one.high - one.low for one in entry.bins],
        align="edge",
        color="tab:blue",
        edgecolor="white",
    )
    axes.set_xlabel("probability of the top class")

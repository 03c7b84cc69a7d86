"""The picture of a range test."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from fieldmark.errors import require
from fieldmark.runtime.files import write_atomic

if TYPE_CHECKING:
    from fieldmark.training.lr_finder import LrFinding


def save_lr_plot(path: Path, finding: "LrFinding", *, lag: int, own_lr: float, title: str) -> None:
    """Write a PNG of the loss over the rate, with the suggestions and the recipe's own rate.

    Args:
        lag: updates by which the smoothed losses are late; they are drawn where they belong.
    """
    require("matplotlib", "train", "drawing the range test")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), dpi=110)
    axes = figure.subplots()
    axes.plot(finding.rates, finding.losses, color="0.75", linewidth=1, label="each update")
    late = min(lag, len(finding.rates) - 1)
    axes.plot(
        finding.rates[: len(finding.rates) - late],
        finding.smoothed[late:],
        color="tab:blue",
        linewidth=2,
        label="smoothed",
    )
    marks = [
        ("steepest fall", finding.steepest, "tab:green", "-"),
        ("minimum / 10", finding.minimum_tenth, "tab:purple", "-"),
        ("the recipe's own", own_lr, "tab:orange", "--"),
        ("diverged", finding.diverged_at, "tab:red", ":"),
    ]
    for name, rate, color, style in marks:
        if rate is not None:
            axes.axvline(rate, color=color, linestyle=style, label=f"{name}: {rate:.2g}")
    # The last losses are many times the others, and would flatten what there is to see.
    low, start = min(finding.losses), finding.smoothed[0]
    room = max(start - low, 0.1 * abs(start), 1e-6)
    axes.set_ylim(max(0.0, low - 0.1 * room), start + room)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate (optim.lr)")
    axes.set_ylabel("training loss, nats")
    axes.set_title(title, parse_math=False)  # a name may hold a dollar sign
    axes.grid(visible=True, color="0.92")
    axes.legend(fontsize=8, loc="upper left")
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight", pad_inches=0.15)
    write_atomic(path, file.getvalue())

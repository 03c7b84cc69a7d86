"""The picture of a search for an int8 model: what each one tried costs in accuracy and speed."""

import io
from collections.abc import Sequence
from pathlib import Path

from fieldmark.errors import require
from fieldmark.packaging.int8_search import Candidate
from fieldmark.runtime.files import write_atomic

_MARKERS = {"minmax": "o", "percentile": "s", "entropy": "^"}


def save_frontier(
    path: Path, tried: Sequence[Candidate], *, max_drop: float, float_bytes: int
) -> None:
    """Write a PNG of accuracy drop over speed for each candidate, with its 95 % interval.

    Args:
        max_drop: the bound, a fraction.
        float_bytes: size of the float32 model, to which the sizes in the legend are compared.
    """
    require("matplotlib", "train", "drawing the frontier")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 5.0), dpi=110)
    axes = figure.subplots()
    axes.axhline(100 * max_drop, color="tab:red", linestyle="--", linewidth=1, label="bound")
    axes.axhline(0.0, color="0.6", linewidth=1)
    axes.plot(1.0, 0.0, "*", color="black", markersize=12, label="float32")
    for number, candidate in enumerate(tried, start=1):
        measured, settings = candidate.measured, candidate.settings
        drop = 100 * measured.drop
        name = f"{number}: {settings.calibration}"
        name += ", corrected biases" if settings.bias_corrected else ""
        if settings.float_layers:
            name += f", {len(settings.float_layers)} layers in float"
        name += f" ({float_bytes / candidate.num_bytes:.2f} times smaller)"
        interval = measured.agreement.accuracy_drop
        error = None
        if interval is not None:
            _, low, high = interval
            error = [[max(0.0, drop - 100 * low)], [max(0.0, 100 * high - drop)]]
        axes.errorbar(
            measured.speed_ratio,
            drop,
            yerr=error,
            fmt=_MARKERS[settings.calibration],
            capsize=3,
            color=f"C{(number - 1) % 10}",
            label=name,
        )
        axes.annotate(
            str(number),
            (measured.speed_ratio, drop),
            textcoords="offset points",
            xytext=(7, 5),
            fontsize=9,
        )
    axes.set_xlabel("speed, times that of float32 on this machine")
    axes.set_ylabel("drop of top-1 accuracy on the selection images, points")
    axes.grid(visible=True, color="0.92")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight", pad_inches=0.15)
    write_atomic(path, file.getvalue())

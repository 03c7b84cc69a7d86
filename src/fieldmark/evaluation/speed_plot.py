"""The picture of a benchmark: latency over throughput."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fieldmark.errors import require
from fieldmark.runtime.files import write_atomic

_MARKERS = "osD^vP*X"


def save_speed_plot(path: Path, facts: dict[str, Any]) -> None:
    """Write a PNG with a point for each combination: the lower and the further right, the better.

    Args:
        facts: of `bench`. Bars are the range over the rounds, and from the median to the 99th
            percentile where there is one.
    """
    require("matplotlib", "train", "drawing the benchmark")
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import LogFormatter

    variants = [item["variant"] for item in facts["variants"]]
    settings = facts["plan"]["settings"]
    figure = Figure(figsize=(7.5, 5.0), dpi=110)
    axes = figure.subplots()
    for row in facts["rows"]:
        colour = f"C{variants.index(row['variant']) % 10}"
        marker = _marker(settings, f"{row['workers']}x{row['threads']}")
        rate, middle = row["images_per_s"], row["p50_ms"]["value"]
        across = [[rate["median"] - rate["min"]], [rate["max"] - rate["median"]]]
        up = 0.0 if row["p99_ms"] is None else max(0.0, row["p99_ms"]["value"] - middle)
        axes.errorbar(
            rate["median"],
            middle,
            xerr=across,
            yerr=[[0.0], [up]],
            color=colour,
            marker=marker,
            markersize=7,
            elinewidth=1,
            alpha=0.85,
        )
        axes.annotate(
            str(row["batch"]), (rate["median"], middle), xytext=(5, -11),
            textcoords="offset points", fontsize=8, color=colour,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):  # 40 rather than 4 x 10^1
        axis.set_major_formatter(LogFormatter())
        axis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
    axes.set_xlabel("images/s: median and range of the rounds")
    axes.set_ylabel("ms for a batch: median, up to the 99th percentile")
    machine = facts["machine"]
    axes.set_title(
        f"{Path(facts['package']).name} on {machine['cpu']}, {machine['cores']} cores "
        "(beside a point: its batch)",
        parse_math=False,
        fontsize=10,
    )
    axes.grid(visible=True, which="both", color="0.92")
    axes.set_axisbelow(True)
    lines = [
        Line2D([], [], color=f"C{number % 10}", linewidth=3, label=_label(item))
        for number, item in enumerate(facts["variants"])
    ]
    shapes = [
        Line2D(
            [], [], color="0.4", linestyle="", marker=_marker(settings, text), label=_words(text)
        )
        for text in settings
    ]
    axes.legend(handles=lines + shapes, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight", pad_inches=0.15)
    write_atomic(path, file.getvalue())


def _marker(settings: Sequence[str], text: str) -> str:
    return _MARKERS[settings.index(text) % len(_MARKERS)]


def _label(item: dict[str, Any]) -> str:
    # A name that starts with "_" would be left out of the legend.
    note = "" if item["deployable"] else ", not deployable"
    return f" {item['variant']} ({item['bytes'] / 1e6:.1f} MB{note})"


def _words(setting: str) -> str:
    workers, threads = setting.split("x")
    return f"{workers} at once, {threads} thread{'' if threads == '1' else 's'} each"

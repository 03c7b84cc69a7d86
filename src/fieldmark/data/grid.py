"""A picture of augmented views: a row for each image, the original first."""

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fieldmark.errors import require
from fieldmark.preprocess import Pixels
from fieldmark.runtime.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CELL_IN = 1.35  # inches
_CAPTION_IN = 0.13  # of a line
_LINE_IN = 0.2
_CHARACTERS_PER_IN = 14.5  # of the title's font
_MAX_CAPTION = 20  # characters


@dataclass(frozen=True)
class View:
    """One cell: pixels as they are shown, and what stands below them."""

    pixels: Pixels  # uint8 (H, W, 3)
    caption: str  # a line or more


def save_grid(
    path: Path, rows: Sequence[Sequence[View]], columns: Sequence[str], *, title: str
) -> None:
    """Write a PNG of the views, with a heading for each column and a title above."""
    require("matplotlib", "train", "drawing augmented images")
    from matplotlib.figure import Figure

    width = _CELL_IN * len(columns)
    lines = textwrap.wrap(title, int(width * _CHARACTERS_PER_IN))
    top = _LINE_IN * (len(lines) + 1.5)
    caption = 0.1 + _CAPTION_IN * max(1 + view.caption.count("\n") for row in rows for view in row)
    height = (_CELL_IN + caption) * len(rows) + top
    figure = Figure(figsize=(width, height), dpi=110)
    figure.text(
        0.01,
        1 - 0.5 * _LINE_IN / height,
        "\n".join(lines),
        fontsize=9,
        va="top",
        parse_math=False,
    )
    grid = figure.subplots(len(rows), len(columns), squeeze=False)
    for row, axes_of_row in zip(rows, grid, strict=True):
        for view, axes in zip(row, axes_of_row, strict=True):
            _draw(axes, view)
    for name, axes in zip(columns, grid[0], strict=True):
        axes.set_title(name, fontsize=8, pad=3, parse_math=False)
    figure.subplots_adjust(
        left=0.005,
        right=0.995,
        top=1 - top / height,
        bottom=caption / height,
        wspace=0.06,
        hspace=caption / _CELL_IN + 0.04,
    )
    file = io.BytesIO()
    figure.savefig(file, format="png")
    write_atomic(path, file.getvalue())


def _draw(axes: "Axes", view: View) -> None:
    axes.imshow(view.pixels, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)
    lines = [_shortened(line) for line in view.caption.split("\n")]
    axes.set_xlabel("\n".join(lines), fontsize=7, labelpad=2, parse_math=False)


def _shortened(text: str) -> str:
    """Cut from the middle: the end may say how much."""
    half = _MAX_CAPTION // 2
    return text if len(text) <= _MAX_CAPTION else f"{text[: half - 1]}…{text[-half:]}"

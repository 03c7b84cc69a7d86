"""Finding settings before the real run: the verbs that train only to compare."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fieldmark.errors import require
from fieldmark.pipeline import Result

Metric = Literal["val_top1_accuracy", "val_loss"]


def lr_find(recipe: str, settings: Sequence[str] = (), *, out: str | Path | None = None) -> Result:
    """Raise the learning rate over 100 updates, and suggest one from how the loss answers.

    No run is kept. The facts hold both suggestions, the recipe's own rate and the curve.

    Args:
        recipe, settings: as for `train`.
        out: a PNG of the loss over the rate.
    """
    require("torch", "train", "the learning-rate finder")
    from fieldmark.cookbook import load_recipe
    from fieldmark.training.lr_finder import range_test

    plot = None if out is None else Path(out)
    return Result(plot, range_test(load_recipe(recipe, settings), plot))

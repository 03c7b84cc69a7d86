"""Finding settings before the real run: the verbs that train only to compare."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from fieldmark.errors import ConfigError, UnknownName, require
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


def sweep(
    recipe: str = "",
    settings: Sequence[str] = (),
    *,
    out: str | Path,
    trials: int | None = None,
    metric: Metric | None = None,
    resume: bool = False,
) -> Result:
    """Train a recipe `trials` times with values drawn from spaces, compared on val alone.

    Each trial is a run in `out` without test result and package; sweep.csv and sweep.json list
    them. The facts hold the best and the command that repeats it.

    Args:
        settings: "section.key=value", or a space: 1e-4..1e-1, log:1e-4..1e-1, int:2..8, [64,128].
        metric: val_top1_accuracy (default) or val_loss, of the weights that a run chooses.
        resume: go on with the sweep in `out`, with its own plan; `trials` may be raised.
    """
    require("torch", "train", "a sweep")
    require("optuna", "sweep", "a sweep")
    from fieldmark.evaluation.validation import make_validation
    from fieldmark.training.sweep import sweep as run_sweep

    if metric not in (None, *get_args(Metric)):
        raise UnknownName.among("metric", str(metric), get_args(Metric))
    if trials is not None and trials < 1:
        raise ConfigError(f"trials must be at least 1. Got {trials}.")
    facts = run_sweep(
        recipe,
        settings,
        Path(out),
        num_trials=trials,
        metric=metric,
        resume=resume,
        make_validation=make_validation,
    )
    return Result(Path(out), facts, passed=facts["best"] is not None)

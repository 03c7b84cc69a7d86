"""The run of a linear probe, from its configuration to its package."""

from collections.abc import Callable
from typing import Any

from fieldmark.config import RunConfig
from fieldmark.errors import ConfigError, FieldmarkError, Interrupted, Preempted
from fieldmark.training.prepare import BROKEN
from fieldmark.training.probe import finish_report, fit_probe
from fieldmark.training.run_folder import RunFolder
from fieldmark.training.signals import stop_error
from fieldmark.training.start import start_probe


def train_probe(
    run: RunFolder, config: RunConfig, finish_run: Callable[..., dict[str, Any]], *, resume: bool
) -> dict[str, Any]:
    """Fit a new head to features of the pretrained network, measure it, and package it.

    Args:
        finish_run: measures the network on the splits and writes the package; returns the facts.
        resume: keep the run when it fails before anything is fitted.
    """
    try:
        if run.ranks.world > 1:
            raise ConfigError(
                "train.method=linear-probe needs one process, which uses all cores. "
                f"Got {run.ranks.world}. Start it without torchrun or --devices."
            )
        ready = start_probe(run, config)
        report = fit_probe(
            ready,
            probe=config.probe,
            train=config.train,
            data=config.data,
            evaluation=config.eval,
        )
    except (Interrupted, Preempted):
        raise  # what was extracted serves the resumed run
    except (FieldmarkError, KeyboardInterrupt):
        if not resume:
            run.discard()  # nothing was fitted: the same command can be tried again
        raise
    selected_by = run.decide(
        "selection", {"split": "train", "step": 0}, "the penalty that cross-validation chose"
    )
    try:
        facts = finish_run(
            run.path,
            config,
            splits=ready.splits,
            preprocess=ready.preprocess,
            network=ready.network,
            architecture=ready.architecture,
            pretrained=ready.pretrained,
            training={
                "steps": 0,
                "selected_by": selected_by,
                "broken": [list(pair) for pair in run.decisions(BROKEN).items()],
                "probe": report,
            },
            device=ready.device,
        )
    except KeyboardInterrupt as stopped:
        raise stop_error(
            stopped,
            "stopped after the fit, before the package was written. "
            f"Resume with: fieldmark train --resume --out {run.path}",
        ) from None
    finish_report(run.path, report, facts)
    return facts

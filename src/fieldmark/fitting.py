"""Training a run to its end: the weights that it chooses, measured and packaged."""

from typing import Any

from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.finish import RESULT_FILE, finish_run
from fieldmark.evaluation.validation import make_validation
from fieldmark.runtime.files import read_json
from fieldmark.runtime.log import say
from fieldmark.training.prepare import BROKEN
from fieldmark.training.probe_run import train_probe
from fieldmark.training.run_folder import RunFolder
from fieldmark.training.session import summary_sentence
from fieldmark.training.signals import stop_requests
from fieldmark.training.start import start_session


def fit(run: RunFolder, resume: bool) -> dict[str, Any]:
    """Train a run that is open to its end; return its facts, none on ranks but the first."""
    with run, stop_requests(at_once=True):
        if run.ranks.share((run.path / RESULT_FILE).is_file()):
            say(f"run {run.path} has ended already: nothing to resume")
            return read_json(run.path / RESULT_FILE) if run.writes else {}
        config = run.config()
        if config.train.method == "linear-probe":
            return train_probe(run, config, finish_run, resume=resume)
        try:
            ready = start_session(run, config, make_validation)
        except (FieldmarkError, KeyboardInterrupt, RuntimeError):  # of another process, too
            if not resume:
                run.discard()  # nothing was trained: the same command can be tried again
            raise
        trained = ready.fit()
        say(summary_sentence(trained))
        selected_by = run.decide(
            "selection",
            {"split": "val" if trained.best else None, "step": (trained.best or trained).step},
            "the best top-1 accuracy on val" if trained.best else "the last weights: no val split",
        )
        if not run.writes:
            return {}
        facts = finish_run(
            run.path,
            config,
            splits=ready.splits,
            preprocess=ready.images.preprocess,
            network=trained.network,
            architecture=ready.architecture,
            pretrained=ready.pretrained,
            training={
                "steps": trained.step,
                "selected_by": selected_by,
                "broken": [list(pair) for pair in run.decisions(BROKEN).items()],
            },
            device=ready.session.device,
        )
    effort = {
        "images_per_s": trained.images_per_s,
        "train_s": trained.train_s,
        "precision": ready.session.train.precision,
        "peak_memory_bytes": trained.peak_memory_bytes,
        "rollbacks": trained.rollbacks,
        "cost": ready.cost(trained.step),
    }
    return facts | effort

"""Many runs of one recipe, each with other values, compared on the validation split alone.

A trial is a run in the sweep's folder that ends after training: nothing measures it on test, and
it has no package. What was tried and found is in study.db; values are drawn by Optuna's TPE
(Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization"), whose draws for a trial
follow from train.seed, the trial's number and the trials before it. So a sweep that was killed
goes on as it would have: its last trial resumes from its checkpoint.
"""

import gc
import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fieldmark.config import RunConfig, override
from fieldmark.config.space import Space
from fieldmark.errors import (
    ConfigError,
    DiskFull,
    FieldmarkError,
    Interrupted,
    ModelError,
    NonFiniteLoss,
    OutOfMemory,
    Preempted,
    RunError,
    UnknownName,
)
from fieldmark.measure import Rate, wilson
from fieldmark.runtime.log import say, warn
from fieldmark.runtime.seed import derive_seed
from fieldmark.training.run_folder import RunFolder, lock_folder
from fieldmark.training.session import OnValidation, Pruned, Session
from fieldmark.training.signals import stop_error, stop_requests
from fieldmark.training.start import MakeValidation, start_session
from fieldmark.training.sweep_plan import Metric, Plan, new_plan
from fieldmark.training.sweep_results import (
    STATES,
    Row,
    best_row,
    run_name,
    summarise,
    write_results,
)

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial, Trial

STUDY_FILE = "study.db"
_NAME = "sweep"
_PRUNE_FROM_EPOCH = 2  # the first epoch is of the warm-up rather than of the settings


def sweep(
    recipe: str,
    texts: Sequence[str],
    folder: Path,
    *,
    num_trials: int | None,
    metric: Metric | None,
    resume: bool,
    make_validation: MakeValidation,
) -> dict[str, Any]:
    """Run a new sweep into `folder`, or go on with the one there; return its facts.

    Raises:
        Interrupted, Preempted, DiskFull: it can be resumed; the message says how.
    """
    if resume:
        given = [*([recipe] if recipe else []), *texts, *([metric] if metric else [])]
        if given:
            raise ConfigError(
                f"--resume goes on with the sweep's own plan. Got {' '.join(given)!r}. Leave it "
                "out, or start a new sweep in another folder."
            )
        plan = Plan.load(folder, num_trials)
    else:
        plan = new_plan(recipe, texts, num_trials, metric or "val_top1_accuracy")
        if folder.exists() and not _is_vacant(folder):
            raise RunError(
                f"--out {folder} must not exist yet. Resume with: {_resume(folder)}, or choose "
                "another folder."
            )
        folder.mkdir(parents=True, exist_ok=True)
    lock = lock_folder(folder)
    try:
        plan.save(folder)
        return _Sweep(folder, plan, make_validation, is_new=not resume).run()
    finally:
        lock.close()


class _Sweep:
    """The trials of one process."""

    def __init__(
        self, folder: Path, plan: Plan, make_validation: MakeValidation, *, is_new: bool
    ) -> None:
        self.folder, self.plan, self.make_validation = folder, plan, make_validation
        self.is_new = is_new  # and so far without a trial that trained
        self.study, self.storage = _open_study(folder, plan)

    def run(self) -> dict[str, Any]:
        """Run what is left of the trials, and write the results after each of them."""
        from optuna.exceptions import StorageInternalError

        try:
            with stop_requests(at_once=True):
                while (trial := self._next()) is not None:
                    self._run_trial(trial)
                    self._write()
        except (KeyboardInterrupt, Interrupted, Preempted) as error:
            raise self._stopped(error) from None
        except DiskFull as error:
            raise DiskFull(
                f"{self.folder} cannot be written: the disk is full. Make room. "
                f"Resume with: {_resume(self.folder)}"
            ) from error
        except StorageInternalError as error:
            raise _unusable(self.folder, error) from error
        except FieldmarkError:
            if self.is_new:  # nothing was trained yet: the same command can be tried again
                shutil.rmtree(self.folder, ignore_errors=True)
            raise
        return self._write()

    def _next(self) -> "Trial | None":
        """The trial that a killed process left, else a new one; None when there are enough."""
        from optuna.trial import Trial, TrialState

        known = self.study.get_trials(deepcopy=False)
        for frozen in known:
            if frozen.state == TrialState.RUNNING:
                self.study.sampler = _sampler(self.plan, frozen.number)
                study_id = self.storage.get_study_id_from_name(_NAME)
                get_id = self.storage.get_trial_id_from_study_id_trial_number
                return Trial(self.study, get_id(study_id, frozen.number))
        if len(known) >= self.plan.num_trials:
            return None
        self.study.sampler = _sampler(self.plan, len(known))
        return self.study.ask()

    def _run_trial(self, trial: "Trial") -> None:
        from optuna.trial import TrialState

        number = trial.number + 1
        settings = [space.setting(_draw(trial, space)) for space in self.plan.spaces]
        say(f"trial {number} of {self.plan.num_trials}: {' '.join(settings)}")
        try:
            value = self._train(trial, settings)
        except Pruned as error:
            say(f"trial {number} is given up: {error}")
            trial.set_user_attr("note", str(error))
            self.study.tell(trial, state=TrialState.PRUNED)
        except (NonFiniteLoss, OutOfMemory, ConfigError, ModelError, UnknownName) as error:
            if self.is_new and not isinstance(error, NonFiniteLoss | OutOfMemory):
                raise  # what the first trial stumbles over is wrong for all of them
            warn(f"trial {number} failed: {error}")
            trial.set_user_attr("note", str(error))
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            self.study.tell(trial, value)
        self.is_new = False
        gc.collect()  # a session is full of cycles, and holds the images

    def _train(self, trial: "Trial", settings: Sequence[str]) -> float:
        """Train a trial's run from where it stands; return its metric."""
        config = override(self.plan.config, settings)
        path = self.folder / run_name(trial.number + 1)
        is_begun = (path / "config.json").is_file()
        run = _reopened(path, config) if is_begun else RunFolder.create(path, config)
        with run:
            try:
                ready = start_session(run, config, self.make_validation)
            except (ConfigError, ModelError, UnknownName):
                if not is_begun:
                    run.discard()
                raise
            if ready.splits.val is None:
                raise ConfigError(
                    f"{config.data.source} must have a validation split for a sweep. Got none. "
                    "Raise data.val_frac."
                )
            self.is_new = False
            num_val = len(ready.splits.val)
            ready.session.on_validation = self._reporting(trial, ready.session, num_val)
            best = ready.fit().best
        if best is None:
            raise NonFiniteLoss(
                f"losses must be finite when weights are validated. In {path} none were."
            )
        value = best.top1_accuracy if self.plan.larger_is_better else best.loss
        if not math.isfinite(value):
            raise NonFiniteLoss(f"the validation loss must be finite. Got {value}.")
        _keep(trial, best.top1_accuracy, best.loss, best.step, num_val)
        return value

    def _reporting(self, trial: "Trial", session: Session, num_val: int) -> OnValidation:
        """What notes a validation in the study, and gives a trial up."""
        before = trial.user_attrs.get("seconds", 0.0)
        known = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
        reported = set(known)  # by a process that was killed after it; the values are the same
        started = time.monotonic()

        def on_validation(step: int, accuracy: float, loss: float) -> None:
            trial.set_user_attr("seconds", before + time.monotonic() - started)
            if session.best is not None:
                best = session.best
                _keep(trial, best.top1_accuracy, best.loss, best.step, num_val)
            epoch = -(-step // session.data.steps_per_epoch)
            if epoch not in reported:
                trial.report(accuracy if self.plan.larger_is_better else loss, epoch)
            if self.plan.prunes and step < session.plan.total and trial.should_prune():
                raise Pruned(f"worse at epoch {epoch} than the median of the trials before")

        return on_validation

    def _write(self) -> dict[str, Any]:
        """Write the results so far; free what the worse trials hold."""
        rows = [
            _row(frozen, self.plan)
            for frozen in self.study.get_trials(deepcopy=False)
            if frozen.state.name in STATES
        ]
        facts = summarise(self.folder, rows, self.plan)
        write_results(self.folder, facts)
        best = best_row(rows, self.plan)
        for row in rows:
            if best is None or row.trial != best.trial:
                for path in (self.folder / row.run / "checkpoints").glob("step-*"):
                    path.unlink()
        return facts

    def _stopped(self, error: BaseException) -> RunError:
        ended = sum(frozen.state.name in STATES for frozen in self.study.get_trials(deepcopy=False))
        message = (
            f"stopped after {ended} of {self.plan.num_trials} trials. "
            f"Resume with: {_resume(self.folder)}"
        )
        return type(error)(message) if isinstance(error, RunError) else stop_error(error, message)


def _open_study(folder: Path, plan: Plan) -> "tuple[Study, RDBStorage]":
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # At least one trial, and of many a quarter, must end before others are measured by them.
    first = min(5, max(1, plan.num_trials // 4))
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{(folder / STUDY_FILE).absolute()}")
        study = optuna.create_study(
            storage=storage,
            study_name=_NAME,
            direction="maximize" if plan.larger_is_better else "minimize",
            pruner=optuna.pruners.MedianPruner(first, n_warmup_steps=_PRUNE_FROM_EPOCH),
            load_if_exists=True,
        )
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise _unusable(folder, error) from error
    return study, storage


def _unusable(folder: Path, error: Exception) -> RunError:
    reason = str(error).strip().splitlines()[0]
    return RunError(
        f"{folder / STUDY_FILE} must be a study that can be read and written. {reason}. "
        "Make room on the disk, or start a new sweep in another folder."
    )


def _sampler(plan: Plan, number: int) -> Any:
    """The sampler of one trial: made anew, so that a resumed sweep draws what it would have."""
    from optuna.samplers import TPESampler

    seed = derive_seed(plan.config.train.seed, "sweep", number) % 2**32  # numpy takes 32 bits
    at_random = min(10, max(2, plan.num_trials // 3))
    return TPESampler(seed=seed, n_startup_trials=at_random)


def _draw(trial: "Trial", space: Space) -> Any:
    """The trial's value of a key, drawn the first time it is asked for."""
    if space.kind == "choice":  # as texts, for Optuna stores no lists
        texts = [json.dumps(value) for value in space.values]
        return json.loads(trial.suggest_categorical(space.key, texts))
    if space.kind == "int":
        return trial.suggest_int(space.key, int(space.low), int(space.high))
    return trial.suggest_float(space.key, space.low, space.high, log=space.kind == "log")


def _keep(trial: "Trial", accuracy: float, loss: float, step: int, num_val: int) -> None:
    rate = wilson(round(accuracy * num_val), num_val)
    finite = loss if math.isfinite(loss) else None
    trial.set_user_attr("found", {"rate": rate.to_json(), "loss": finite, "step": step})


def _row(frozen: "FrozenTrial", plan: Plan) -> Row:
    found = frozen.user_attrs.get("found", {})
    drawn = [
        (space, json.loads(value) if space.kind == "choice" else value)
        for space in plan.spaces
        for value in [frozen.params.get(space.key)]
        if value is not None
    ]
    return Row(
        trial=frozen.number + 1,
        state=STATES[frozen.state.name],
        values={space.key: space.value(value) for space, value in drawn},
        settings=tuple(space.setting(value) for space, value in drawn),
        accuracy=Rate(**found["rate"]) if found else None,
        loss=found.get("loss"),
        step=found.get("step"),
        minutes=frozen.user_attrs.get("seconds", 0.0) / 60,
        note=frozen.user_attrs.get("note", ""),
    )


def _reopened(path: Path, config: RunConfig) -> RunFolder:
    run = RunFolder.open(path)
    if run.config() != config:
        with run:
            raise RunError(
                f"{path} must hold the settings that its sweep drew. It was changed. Remove it, "
                "and resume the sweep."
            )
    return run


def _is_vacant(folder: Path) -> bool:
    """Whether nothing but the beginnings of a sweep that was killed at once is there."""
    return folder.is_dir() and {entry.name for entry in folder.iterdir()} <= {".lock"}


def _resume(folder: Path) -> str:
    return f"fieldmark sweep --resume --out {folder}"

"""One training run from its last checkpoint to its last update."""

import copy
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from fieldmark.config import OptimConfig, TrainConfig
from fieldmark.errors import CheckpointError, FieldmarkError, NonFiniteLoss
from fieldmark.measure import Rate
from fieldmark.runtime.files import size_text
from fieldmark.runtime.log import Bar, duration, say, warn
from fieldmark.training.capacity import peak_memory_bytes
from fieldmark.training.checkpoint import (
    IS_STOP,
    Best,
    checkpoint_path,
    drop_stops,
    load_checkpoint,
    load_newest,
    must_fit,
    prune,
    remove_temporary,
    save_checkpoint,
)
from fieldmark.training.diagnosis import diagnose, layer_signal
from fieldmark.training.forecast import Forecast
from fieldmark.training.journal import Journal
from fieldmark.training.loop import UpdateRule, train_steps
from fieldmark.training.plan import Plan
from fieldmark.training.rollbacks import Rollbacks
from fieldmark.training.run_folder import RunFolder
from fieldmark.training.signals import StopRequest, stop_error, stop_requests
from fieldmark.training.state import TrainState
from fieldmark.training.watch import Fault

DIAGNOSED_LINES = 140  # of the last updates: what was usual, and what went wrong

Batch = tuple[Tensor, Tensor]


class Batches(Protocol):
    """Training data as a pure function of the update."""

    @property
    def steps_per_epoch(self) -> int:
        """Updates in one pass over the data."""

    def batches(self, start_step: int) -> Iterator[Batch]:
        """Yield (images, targets) without end, from the update after `start_step`."""


Validate = Callable[[nn.Module], tuple[Rate, float]]
"""A network in eval mode -> (top-1 accuracy, loss in nats) on the validation split."""


OnValidation = Callable[[int, float, float], None]
"""Called with (update, top-1 accuracy, loss in nats) after each validation; may raise Pruned."""


class Pruned(FieldmarkError):
    """The run was given up: others did better at the same point."""

    code = "pruned"


@dataclass(frozen=True, slots=True)
class TrainResult:
    """Where training ended. The weights of `network` are those to evaluate and package."""

    network: nn.Module
    step: int  # the last update
    best: Best | None  # None: there was no validation split, and the last weights are used
    train_s: float  # of this process; a resumed run counts its own part
    images_per_s: float
    peak_memory_bytes: int  # of the GPU, or resident on a CPU, of this process so far
    rollbacks: int


class _GoBack(Exception):
    """The run cannot go on from where it is."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.sentence())
        self.fault = fault


class Session:
    """Drives the update, and keeps what it moves in checkpoints, while a run trains."""

    def __init__(
        self,
        run: RunFolder,
        rule: UpdateRule,
        state: TrainState,
        data: Batches,
        validate: Validate | None,
        *,
        plan: Plan,
        train: TrainConfig,
        optim: OptimConfig,
    ) -> None:
        self.run, self.state, self.data, self.validate = run, state, data, validate
        self.train, self.lr, self.plan = train, optim.lr, plan
        self._rollbacks = Rollbacks(run, train)
        self.rule = replace(rule, lr_factor=self.lr_factor, slowdown=self._rollbacks.slowdown)
        self.on_validation: OnValidation | None = None
        self._journal = Journal(
            run,
            steps_per_epoch=plan.steps_per_epoch,
            lr=optim.lr,
            is_scaled=rule.scaler.is_enabled(),
            bad_updates=train.bad_updates,
            spike_factor=train.spike_factor,
            fresh_starts=plan.size_changes,
            forgiven_to=lambda: self._rollbacks.last_to,
        )
        # Until there is a checkpoint, going back means going back to this.
        self._beginning: dict[str, Any] | None = state.copied()
        self.best: Best | None = None
        self.done = self._saved_at = 0
        if run.writes:
            remove_temporary(run.checkpoints)
        self.start = self._load_newest()
        if self.start:
            say(f"resuming after update {self.start} of {plan.total}")

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.state.network.parameters()).device

    def lr_factor(self, step: int) -> float:
        """Return the rate of update `step` (0 for the first) as a multiple of optim.lr.

        The schedule's, times the factor of each rollback to an update at or before `step`.
        """
        return self.plan.lr_factor(step) * self._rollbacks.slowdown(step)

    def fit(self) -> TrainResult:
        """Train to the end, or until asked to stop; leave the chosen weights in the network.

        Raises:
            Interrupted, Preempted: a signal came; a checkpoint was written.
            NonFiniteLoss: training went wrong again after each rollback; says why.
            Pruned: `on_validation` gave the run up.
        """
        started = time.monotonic()
        size = self.train.examples_per_update
        total = self.plan.total * size
        bar = Bar("training", total, "images", work=lambda done: self.plan.work(done / size))
        bar.start(self.start * size)
        try:
            with stop_requests() as asked:
                stopped_early = self._fit_with_rollbacks(bar, asked)
        finally:
            bar.stop()
        if self._saved_at < self.done:
            self._save()
        seconds = time.monotonic() - started
        trained = max(0, self.done - self.start) * size
        if stopped_early:
            say(
                f"stopped early after update {self.done}: {self.train.early_stop_epochs} epochs "
                "without a better validation accuracy"
            )
        return TrainResult(
            network=self._choose_weights(),
            step=self.done,
            best=self.best,
            train_s=seconds,
            images_per_s=trained / seconds if trained else 0.0,
            peak_memory_bytes=peak_memory_bytes(self.device),
            rollbacks=len(self._rollbacks),
        )

    def _fit_with_rollbacks(self, bar: Bar, asked: StopRequest) -> bool:
        while True:
            try:
                return self._fit_from(self.done, bar, asked)
            except _GoBack as reason:
                self._roll_back(reason.fault)
                bar.start(self.done * self.train.examples_per_update)

    def _fit_from(self, start: int, bar: Bar, asked: StopRequest) -> bool:
        """Train from update `start` on; return whether the run stopped early."""
        stopped_early = self._should_stop_early(start)
        last = start if stopped_early else self.plan.total
        forecast = Forecast(self.plan, start)
        with closing_if_it_can(self.data.batches(start)) as batches:
            for step in train_steps(self.rule, batches, start_step=start, total_steps=last):
                self.done = step.index
                self.state.after_update(step.index, step.is_finite)
                _check(self._journal.add(step))
                bar.advance(self.train.examples_per_update, self._journal.note)
                forecast.see(step)
                improved = self._validate_if_due(step.index)
                stopped_early = self._should_stop_early(step.index)
                is_last = stopped_early or step.index == last
                received = self.rule.ranks.largest(asked.received or 0)
                wants_stop = received > 0 and not is_last
                if improved or self._checkpoint_is_due(step.index):
                    self._save_if_calm()
                elif wants_stop:
                    self._save_if_calm(is_stop=True)
                if wants_stop:
                    raise stop_error(signal.Signals(received), self._resume_sentence())
                if stopped_early:
                    break
            _check(self._journal.flush())
        return stopped_early

    def _roll_back(self, fault: Fault) -> None:
        """Go back to the last good state with a lower rate, or give up with a diagnosis."""
        if fault.kind == "input" or self._rollbacks.is_last_reached:
            self._give_up(fault)
        found_at = self.done
        self._load_newest(is_rollback=True)
        self._rollbacks.add(fault, found_at=found_at, to=self.done)
        self._journal.rewind(self.done)  # once more, as it is now known where to

    def _give_up(self, fault: Fault) -> NoReturn:
        """Measure what may be wrong, in the bad state and in the last good one, and end the run."""
        lines, found_at = self.run.train_metrics()[-DIAGNOSED_LINES:], self.done
        with closing_if_it_can(self.data.batches(fault.step - 1)) as batches:
            update = [next(batches) for _ in range(self.rule.accumulation_steps)]
        at_fault = layer_signal(self.rule, update)
        self._load_newest(is_rollback=True)
        found = diagnose(
            self.rule,
            fault=fault,
            lines=lines,
            update=update,
            at_fault=at_fault,
            lr=self.lr * self.lr_factor(fault.step - 1),
            rollbacks=len(self._rollbacks),
        )
        path = self.run.write_diagnosis(found.to_json() | {"update": found_at})
        raise NonFiniteLoss(
            f"{found.sentence()} The state after update {self._saved_at} is sound; all "
            f"measurements are in {path}."
        )

    def _validate_if_due(self, step: int) -> bool:
        """Evaluate at the end of every `eval_epochs`-th epoch and at the end; say if it is best."""
        per_epoch = self.plan.steps_per_epoch
        due = step % (self.train.eval_epochs * per_epoch) == 0 or step == self.plan.total
        if self.validate is None or not due:
            return False
        _check(self._journal.flush())
        rate, loss = self.validate(self.state.averaged())
        accuracy = rate.value
        # Weights that may be gone back from are not saved, and so cannot be chosen either.
        better = self._journal.is_calm and (
            self.best is None or (accuracy, -loss) > (self.best.top1_accuracy, -self.best.loss)
        )
        if better:
            self.best = Best(step, accuracy, loss)
        self._journal.validated(
            {
                "kind": "val",
                "step": step,
                "epoch": step / per_epoch,
                "loss": loss,
                "top1_accuracy": rate.to_json(),
            }
        )
        star = "  (best so far)" if better else ""
        interval = f"{rate.low:.1%} to {rate.high:.1%}"
        say(
            f"epoch {step / per_epoch:.3g}: validation top-1 {accuracy:.2%} ({interval}), "
            f"loss {loss:.4f}{star}"
        )
        if self.on_validation is not None:
            self.on_validation(step, accuracy, loss)
        return better

    def _checkpoint_is_due(self, step: int) -> bool:
        every = self.train.checkpoint_steps or max(
            1, round(self.train.checkpoint_epochs * self.plan.steps_per_epoch)
        )
        return step % every == 0 or step == self.plan.total

    def _should_stop_early(self, step: int) -> bool:
        patience = self.train.early_stop_epochs * self.plan.steps_per_epoch
        return bool(patience and self.best is not None and step - self.best.step >= patience)

    def _save_if_calm(self, *, is_stop: bool = False) -> None:
        """Save, unless the last updates went wrong: their state may be one to go back from."""
        _check(self._journal.flush())
        if self._journal.is_calm or self.done == self.plan.total:
            self._save(is_stop=is_stop)

    def _save(self, *, is_stop: bool = False) -> None:
        """Write a checkpoint, which promises that all lines up to it are on disk already.

        Args:
            is_stop: it is here because a signal came. A rollback does not go back to it, so that it
                goes where it would have gone without the signal.
        """
        if self.run.writes:
            self.run.must_be_here()
            save_checkpoint(
                self.run.checkpoints,
                self.done,
                self.state.state_dict(),
                self.best,
                extra={IS_STOP: True} if is_stop else None,
            )
            prune(self.run.checkpoints, self.train.keep_checkpoints)
        self._saved_at = self.done
        if not is_stop:
            self._beginning = None

    def _load_newest(self, *, is_rollback: bool = False) -> int:
        """Take the state of the newest sound checkpoint, or of the beginning; return its update."""
        found = None
        if self.run.writes:
            if is_rollback:
                drop_stops(self.run.checkpoints)
            found = load_newest(self.run.checkpoints)
        found = self.rule.ranks.share(found)
        if found is not None:
            header, state = found
            with must_fit(header.step):
                self.state.load(state)
            self.best, step = header.best, header.step
            if not header.extra.get(IS_STOP):
                self._beginning = None
        elif self._beginning is not None:
            self.state.load(copy.deepcopy(self._beginning))  # some optimizers keep what they load
            self.best, step = None, 0
        else:
            raise CheckpointError(
                f"{self.run.checkpoints} must hold a sound checkpoint to go back to. Found none. "
                "Start the run anew."
            )
        self._journal.rewind(step)
        self.done = self._saved_at = step
        return step

    def _choose_weights(self) -> nn.Module:
        """The weights that validation chose, or the last ones."""
        network = self.state.averaged()
        if self.best is None or self.best.step == self.done or not self.run.writes:
            return network
        path = checkpoint_path(self.run.checkpoints, self.best.step)
        try:
            _, state = load_checkpoint(path)
        except (CheckpointError, FileNotFoundError) as error:
            warn(f"the best checkpoint cannot be used, so the last weights are: {error}")
            self.best = None
            return network
        return self.state.load_averaged(state)

    def _resume_sentence(self) -> str:
        saved = "its checkpoint is saved"
        if self._saved_at != self.done:
            kept = f"the checkpoint of update {self._saved_at}" if self._saved_at else "nothing"
            saved = f"its last updates went wrong, and {kept} is kept"
        return (
            f"stopped after update {self.done} of {self.plan.total}; {saved}. "
            f"Resume with: fieldmark train --resume --out {self.run.path}"
        )


def _check(fault: Fault | None) -> None:
    if fault is not None:
        raise _GoBack(fault)


@contextmanager
def closing_if_it_can(batches: Iterator[Batch]) -> Iterator[Iterator[Batch]]:
    """End the batches' worker processes with the block."""
    try:
        yield batches
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()


def summary_sentence(result: TrainResult) -> str:
    """Return one line on how long training took and what it needed."""
    return (
        f"trained to update {result.step}, here in {duration(result.train_s)} "
        f"({result.images_per_s:.0f} images/s, {size_text(result.peak_memory_bytes)} of memory)"
    )

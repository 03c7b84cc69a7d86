"""One training run from its last checkpoint to its last update."""

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fieldmark.config import LossConfig, OptimConfig, ScheduleConfig, TrainConfig
from fieldmark.errors import CheckpointError, FieldmarkError, NonFiniteLoss
from fieldmark.measure import Rate
from fieldmark.model import Freeze
from fieldmark.runtime.files import size_text
from fieldmark.runtime.log import Bar, duration, say, warn
from fieldmark.training.average import MovingAverage
from fieldmark.training.capacity import peak_memory_bytes
from fieldmark.training.checkpoint import (
    Best,
    checkpoint_path,
    load_checkpoint,
    load_newest,
    must_fit,
    prune,
    remove_temporary,
    save_checkpoint,
)
from fieldmark.training.device import autocast, make_scaler
from fieldmark.training.loop import Step, UpdateRule, train_steps
from fieldmark.training.losses import make_loss
from fieldmark.training.optim import make_optimizer
from fieldmark.training.run_folder import RunFolder
from fieldmark.training.schedule import lr_factor, total_steps, warmup_steps
from fieldmark.training.signals import stop_requests

FLUSH_STEPS = 20  # losses are read, checked and written this often: each reading waits for the GPU


class Batches(Protocol):
    """Training data as a pure function of the update."""

    @property
    def steps_per_epoch(self) -> int:
        """Updates in one pass over the data."""

    def batches(self, start_step: int) -> Iterator[tuple[Tensor, Tensor]]:
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


class Session:
    """Owns network, optimizer, moving average and their checkpoints while a run trains."""

    def __init__(
        self,
        run: RunFolder,
        network: nn.Module,
        data: Batches,
        validate: Validate | None,
        *,
        train: TrainConfig,
        optim: OptimConfig,
        schedule: ScheduleConfig,
        loss: LossConfig,
        class_counts: Sequence[int],
        freeze: Freeze,
        device: torch.device,
    ) -> None:
        if train.channels_last:
            network = network.to(memory_format=torch.channels_last)
        self.run, self.network, self.data, self.validate = run, network.to(device), data, validate
        self.train, self.device = train, device
        self.total = run.decide(
            "total_steps", total_steps(train, data.steps_per_epoch), "from train and the data"
        )
        warmup = warmup_steps(
            schedule,
            total=self.total,
            steps_per_epoch=data.steps_per_epoch,
            batch_size=train.examples_per_update,
        )
        self.rule = UpdateRule(
            network=self.network,
            forward=torch.compile(self.network) if train.compile else self.network,
            loss_fn=make_loss(loss, class_counts=class_counts),
            optimizer=make_optimizer(self.network, optim),
            scaler=make_scaler(train, device),
            lr_factor=partial(
                lr_factor,
                schedule,
                total=self.total,
                warmup=warmup,
                steps_per_epoch=data.steps_per_epoch,
            ),
            autocast=partial(autocast, train, device),
            batch_size=train.examples_per_update,
            accumulation_steps=train.accumulation_steps,
            max_grad_norm=optim.max_grad_norm,
            freeze=freeze,
            seed=train.seed,
        )
        self.lr = optim.lr
        self.ema: MovingAverage | None = None
        if train.ema_decay:
            self.ema = MovingAverage(
                self.network, train.ema_decay, warmup=train.ema_warmup, every=train.ema_steps
            )
        self.best: Best | None = None
        self.start = self._restore()
        self.done = self.start
        self._pending: list[Step] = []
        self._note = ""  # what the progress bar shows of the last update that was read
        self._saved_at = self.start
        self.on_validation: OnValidation | None = None

    def fit(self) -> TrainResult:
        """Train to the end, or until asked to stop; leave the chosen weights in the network.

        Raises:
            Interrupted, Preempted: a signal came; a checkpoint was written.
            NonFiniteLoss: the loss or a gradient is not a number; the last checkpoint is sound.
            Pruned: `on_validation` gave the run up.
        """
        started = time.monotonic()
        per_epoch = self.data.steps_per_epoch
        bar = Bar("training", self.total * self.train.examples_per_update, "images")
        bar.start(self.start * self.train.examples_per_update)
        batches = self.data.batches(self.start)
        stopped_early = self._should_stop_early(self.start, per_epoch)
        last = self.start if stopped_early else self.total
        try:
            with stop_requests() as asked:
                for step in train_steps(
                    self.rule, batches, start_step=self.start, total_steps=last
                ):
                    self.done = step.index
                    if self.ema is not None:
                        self.ema.update(step.index)
                    self._pending.append(step)
                    if len(self._pending) >= FLUSH_STEPS:
                        self._flush()
                    bar.advance(self.train.examples_per_update, self._note)
                    improved = self._validate_if_due(step.index, per_epoch)
                    stopped_early = self._should_stop_early(step.index, per_epoch)
                    is_last = stopped_early or step.index == self.total
                    wants_stop = asked.is_set() and not is_last
                    if improved or wants_stop or self._checkpoint_is_due(step.index, per_epoch):
                        self._save()
                    if wants_stop:
                        raise asked.error(self._resume_sentence())
                    if stopped_early:
                        break
        finally:
            bar.stop()
            close = getattr(batches, "close", None)
            if close is not None:
                close()
        if self._saved_at < self.done:
            self._save()
        seconds = time.monotonic() - started
        trained = (self.done - self.start) * self.train.examples_per_update
        if stopped_early:
            say(
                f"stopped early after update {self.done}: {self.train.early_stop_epochs} epochs "
                "without a better validation accuracy"
            )
        chosen = self._choose_weights()
        return TrainResult(
            network=chosen,
            step=self.done,
            best=self.best,
            train_s=seconds,
            images_per_s=trained / seconds if trained else 0.0,
            peak_memory_bytes=peak_memory_bytes(self.device),
        )

    def _flush(self) -> None:
        """Read the pending steps' tensors, check them, and write their lines."""
        if not self._pending:
            return
        values = torch.stack(
            [torch.stack([step.loss, step.grad_norm.float()]) for step in self._pending]
        ).tolist()
        per_epoch = self.data.steps_per_epoch
        lines = []
        for step, (loss, norm) in zip(self._pending, values, strict=True):
            lines.append(
                {
                    "kind": "train",
                    "step": step.index,
                    "epoch": (step.index - 1) / per_epoch,
                    "loss": loss,
                    "grad_norm": norm,
                    "lr": self.lr * step.lr_factor,
                }
            )
        bad = [line["step"] for line in lines if not _is_finite(line, scaled=self._scales())]
        if bad:
            raise NonFiniteLoss(
                f"loss and gradients must be finite. Got NaN or infinity from update {bad[0]} on. "
                "Lower optim.lr, set optim.max_grad_norm=1, or check the input; the checkpoint "
                f"after update {self._saved_at} is sound."
            )
        self.run.append_metrics(lines)
        self._note = f"loss {lines[-1]['loss']:.3f}  lr {lines[-1]['lr']:.3g}"
        self._pending.clear()

    def _scales(self) -> bool:
        return self.rule.scaler.is_enabled()

    def _validate_if_due(self, step: int, per_epoch: int) -> bool:
        """Evaluate at the end of every `eval_epochs`-th epoch and at the end; say if it is best."""
        due = step % (self.train.eval_epochs * per_epoch) == 0 or step == self.total
        if self.validate is None or not due:
            return False
        self._flush()
        rate, loss = self.validate(self._averaged())
        accuracy = rate.value
        better = self.best is None or (accuracy, -loss) > (self.best.top1_accuracy, -self.best.loss)
        if better:
            self.best = Best(step, accuracy, loss)
        self.run.append_metrics(
            [
                {
                    "kind": "val",
                    "step": step,
                    "epoch": step / per_epoch,
                    "loss": loss,
                    "top1_accuracy": rate.to_json(),
                }
            ]
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

    def _checkpoint_is_due(self, step: int, per_epoch: int) -> bool:
        every = self.train.checkpoint_steps or max(
            1, round(self.train.checkpoint_epochs * per_epoch)
        )
        return step % every == 0 or step == self.total

    def _should_stop_early(self, step: int, per_epoch: int) -> bool:
        patience = self.train.early_stop_epochs * per_epoch
        return bool(patience and self.best is not None and step - self.best.step >= patience)

    def _save(self) -> None:
        self._flush()  # metrics first: a checkpoint promises that all lines up to it are on disk
        state = {
            "network": self.network.state_dict(),
            "ema": None if self.ema is None else self.ema.module.state_dict(),
            "optimizer": self.rule.optimizer.state_dict(),
            "scaler": self.rule.scaler.state_dict(),
        }
        save_checkpoint(self.run.checkpoints, self.done, state, self.best)
        self._saved_at = self.done
        prune(self.run.checkpoints, self.train.keep_checkpoints)

    def _restore(self) -> int:
        """Load the newest sound checkpoint, if there is one; return its update."""
        remove_temporary(self.run.checkpoints)
        found = load_newest(self.run.checkpoints)
        if found is None:
            self.run.rewind_metrics(0)
            return 0
        header, state = found
        with must_fit(header.step):
            self.network.load_state_dict(state["network"])
            self.rule.optimizer.load_state_dict(state["optimizer"])
            self.rule.scaler.load_state_dict(state["scaler"])
            if self.ema is not None:
                self.ema.module.load_state_dict(state["ema"])
        self.best = header.best
        self.run.rewind_metrics(header.step)
        say(f"resuming after update {header.step} of {self.total}")
        return header.step

    def _averaged(self) -> nn.Module:
        """The network to evaluate, in eval mode: the moving average where there is one."""
        network = self.network if self.ema is None else self.ema.module
        return network.eval()

    def _choose_weights(self) -> nn.Module:
        """The weights that validation chose, or the last ones."""
        network = self._averaged()
        if self.best is None or self.best.step == self.done:
            return network
        path = checkpoint_path(self.run.checkpoints, self.best.step)
        try:
            _, state = load_checkpoint(path)
        except (CheckpointError, FileNotFoundError) as error:
            warn(f"the best checkpoint cannot be used, so the last weights are: {error}")
            self.best = None
            return network
        chosen = copy.deepcopy(network)
        chosen.load_state_dict(state["network"] if self.ema is None else state["ema"])
        return chosen.eval()

    def _resume_sentence(self) -> str:
        return (
            f"stopped after update {self.done} of {self.total}; its checkpoint is saved. "
            f"Resume with: fieldmark train --resume --out {self.run.path}"
        )


def _is_finite(line: dict[str, Any], *, scaled: bool) -> bool:
    """Whether an update's numbers are finite; with a scaler, a skipped update's norm may not be."""
    norm_is_finite = scaled or abs(line["grad_norm"]) != float("inf")
    return (
        line["loss"] == line["loss"]
        and abs(line["loss"]) != float("inf")
        and norm_is_finite
        and (scaled or line["grad_norm"] == line["grad_norm"])
    )


def summary_sentence(result: TrainResult) -> str:
    """Return one line on how long training took."""
    return (
        f"trained to update {result.step}, here in {duration(result.train_s)} "
        f"({result.images_per_s:.0f} images/s, {size_text(result.peak_memory_bytes)} of memory)"
    )

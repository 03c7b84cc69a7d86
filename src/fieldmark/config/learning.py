"""The sections on what is minimised, how weights move, and for how long."""

import math
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveInt, field_validator, model_validator

from fieldmark.config.section import Frac, Section


class LossConfig(Section):
    """What is minimised."""

    arguments: ClassVar[dict[str, dict[str, Any]]] = {
        "name": {"focal_gamma": 2.0, "adjust_tau": 1.0, "bce_threshold": 0.0},
        "class_weights": {"effective_beta": 0.999},
    }

    name: Literal["cross-entropy", "focal", "bce", "logit-adjusted"] = "cross-entropy"
    # sum: the gradient is that of the sum over an update's examples; what is reported is the mean
    reduction: Literal["mean", "sum"] = "mean"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    # inverse: 1 / images of the class; effective: (1 - beta) / (1 - beta^n); both scaled to a mean
    # of 1 over the train images. Or one for each class, taken as it is.
    class_weights: Literal["none", "inverse", "effective"] | tuple[float, ...] = "none"
    effective_beta: float = Field(default=0.999, gt=0, lt=1)
    focal_gamma: float = Field(default=2.0, ge=0)
    adjust_tau: float = Field(default=1.0, gt=0)  # of logit-adjusted: times the log of the prior
    # of bce: soft targets above it become 1, others 0; 0 leaves them as they are
    bce_threshold: float = Field(default=0.0, ge=0, lt=1)

    @property
    def balancing(self) -> list[str]:
        """The settings of the loss that make up for the sizes of the classes."""
        found = [f"class_weights={self.class_weights}"] if _is_rule(self.class_weights) else []
        return found + ["name=logit-adjusted"] * (self.name == "logit-adjusted")

    @field_validator("class_weights", mode="before")
    @classmethod
    def _one_of(cls, value: Any) -> Any:
        is_list = isinstance(value, list | tuple) and {*map(type, value)} <= {int, float}
        if not is_list and value != "none" and not _is_rule(value):
            raise ValueError(
                "loss.class_weights must be none, inverse, effective, or a list with a number for "
                f"each class. Got {value!r}"
            )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        owners = {
            "focal_gamma": ("name", "focal"),
            "adjust_tau": ("name", "logit-adjusted"),
            "bce_threshold": ("name", "bce"),
            "effective_beta": ("class_weights", "effective"),
        }
        for key, (switch, owner) in owners.items():
            value, chosen = getattr(self, key), getattr(self, switch)
            if value != type(self).model_fields[key].default and chosen != owner:
                raise ValueError(
                    f"loss.{key} belongs to loss.{switch}={owner}. Got {value:g} with "
                    f"loss.{switch}={chosen}"
                )
        if isinstance(self.class_weights, tuple) and (
            min(self.class_weights, default=0) < 0 or not any(self.class_weights)
        ):
            raise ValueError(
                "loss.class_weights must not be below 0, and at least one must be above it. "
                f"Got {list(self.class_weights)}"
            )
        if len(self.balancing) > 1:
            raise ValueError(
                f"loss.{' and loss.'.join(self.balancing)} both make up for the sizes of the "
                "classes, twice in all: keep one of them"
            )
        if self.bce_threshold and self.label_smoothing:
            raise ValueError(
                "loss.bce_threshold makes each target 0 or 1 and so undoes loss.label_smoothing: "
                f"set one of them to 0. Got {self.bce_threshold:g} and {self.label_smoothing:g}"
            )
        return self


def _is_rule(class_weights: Any) -> bool:
    """Whether the weights follow from the sizes of the classes."""
    return class_weights in ("inverse", "effective")


class OptimConfig(Section):
    """How weights move. `name` is sgd, adamw, muon, or any optimizer of timm.optim."""

    arguments: ClassVar[dict[str, dict[str, Any]]] = {
        "name": {"args": {}, "nesterov": False, "momentum": 0.9, "filter_lr": 0}
    }
    needs: ClassVar[dict[str, tuple[str, ...]]] = {
        "filter_momentum": ("name=muon",),
        "lookahead_decay": ("lookahead_steps",),
    }

    name: str = "sgd"
    lr: float = Field(default=0.1, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)  # not of adamw
    nesterov: bool = False
    filter_lr: float = Field(default=0.0, ge=0)  # of muon: the rate of convolution filters
    filter_momentum: float = Field(default=0.6, ge=0, lt=1)  # of muon
    weight_decay: float = Field(default=0.0, ge=0)
    decay_norm_and_bias: bool = True
    # Off: a rate that is k times lr has a decay of 1/k, so that all weights shrink alike.
    decay_follows_lr: bool = True
    head_lr_factor: float = Field(default=1.0, gt=0)  # times lr, for a newly made head
    bias_lr_factor: float = Field(default=1.0, gt=0)  # times lr, for norms and biases
    layer_decay: float = Field(default=1.0, gt=0, le=1)  # rate of a layer over that of the next
    max_grad_norm: float = Field(default=0.0, ge=0)  # 0: no clipping
    lookahead_steps: int = Field(default=0, ge=0)  # slow weights are exchanged so often; 0: none
    lookahead_decay: float = Field(default=0.95, gt=0, lt=1)  # of the slow weights, per update
    stem_epochs: float = Field(default=0.0, ge=0)  # airnet's stem learns so long; 0: to the end
    args: dict[str, Any] = Field(default_factory=dict)  # further arguments of the optimizer


class ScheduleConfig(Section):
    """The learning rate as a multiple of optim.lr, a pure function of the update."""

    units: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("warmup_epochs", "warmup_steps", "warmup_examples", "warmup_frac"),
    )
    arguments: ClassVar[dict[str, dict[str, Any]]] = {"name": {"step_epochs": 0, "end_factor": 0}}
    needs: ClassVar[dict[str, tuple[str, ...]]] = {
        "warmup_start_factor": units[0],
        "step_factor": ("step_epochs",),
    }

    name: Literal["cosine", "linear", "step", "constant"] = "cosine"
    warmup_epochs: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    warmup_examples: int = Field(default=0, ge=0)
    warmup_frac: float = Frac
    warmup_start_factor: float = Field(default=0.01, ge=0, le=1)
    # Where the decay begins: after the warm-up, or at 0, so that the warm-up hides its beginning.
    decay_from: Literal["warmup", "start"] = "warmup"
    end_factor: float = Field(default=0.0, ge=0, le=1)  # the last rate over optim.lr
    step_epochs: float = Field(default=0.0, ge=0)  # of step: a decay every so many epochs
    step_factor: float = Field(default=0.1, gt=0, lt=1)  # of step: the rate is multiplied by it

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = self._set_units(self.units[0])
        if len(given) > 1:
            raise ValueError(f"schedule: only one of {', '.join(self.units[0])} may be set")
        if (self.name == "step") != bool(self.step_epochs):
            raise ValueError(
                "schedule.step_epochs belongs to schedule.name=step, which needs it. "
                f"Got {self.step_epochs:g} with {self.name}"
            )
        if self.end_factor and self.name in ("step", "constant"):
            raise ValueError(
                "schedule.end_factor belongs to schedule.name=cosine and linear. "
                f"Got {self.end_factor:g} with {self.name}"
            )
        return self


class TrainConfig(Section):
    """How long, how much at once, and with which arithmetic."""

    units: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("epochs", "steps", "examples", "max_minutes"),
        ("checkpoint_epochs", "checkpoint_steps"),
    )
    # Who says how long does not want it lengthened.
    arguments: ClassVar[dict[str, dict[str, Any]]] = {
        unit: {"min_steps": 0} for unit in ("epochs", "steps", "examples", "max_minutes")
    }
    needs: ClassVar[dict[str, tuple[str, ...]]] = {
        "ema_warmup": ("ema_decay",),
        "ema_steps": ("ema_decay",),
    }

    # gradient: updates of the network; linear-probe: a regression on features of frozen weights
    method: Literal["gradient", "linear-probe"] = "gradient"
    epochs: NonNegativeFloat | Literal["auto"] = 0.0  # auto: fewer the more images there are
    steps: int = Field(default=0, ge=0)
    examples: int = Field(default=0, ge=0)
    # The length is fitted to it when a run begins. It is the time of the updates and validations:
    # opening the data, timing, the test and the package come beside it.
    max_minutes: float = Field(default=0.0, ge=0)
    min_steps: int = Field(default=0, ge=0)  # of `epochs`: at least so many updates
    batch_size: PositiveInt | Literal["auto"] = 32  # examples per update
    accumulation_steps: int = Field(default=1, gt=0)  # forward and backward passes per update
    # auto: bfloat16 where the processor multiplies it faster, else float32
    precision: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    channels_last: bool = True
    compile: bool = False
    sync_batch_norm: bool = False  # statistics of a batch over all devices; CUDA only
    ema_decay: float = Field(default=0.0, ge=0, lt=1)  # 0: no moving average of the weights
    ema_warmup: bool = False  # the average begins short and lengthens to ema_decay
    ema_steps: int = Field(default=1, gt=0)  # the average moves every so many updates
    seed: int = Field(default=0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = Field(default=0, ge=0)  # 0: the cores this process may use
    eval_epochs: int = Field(default=1, gt=0)  # validate every so many epochs
    checkpoint_epochs: float = Field(default=1.0, ge=0)
    checkpoint_steps: int = Field(default=0, ge=0)
    keep_checkpoints: int = Field(default=2, gt=0)  # beside the best
    early_stop_epochs: int = Field(default=0, ge=0)  # 0: never
    # A loss above so many times the largest recent one is a jump; 0: losses are not watched.
    spike_factor: float = Field(default=3.0, ge=0)
    bad_updates: int = Field(default=3, gt=0)  # in a row that make the run go back
    max_rollbacks: int = Field(default=3, ge=0)  # after which it stops with a diagnosis
    rollback_lr_factor: float = Field(default=0.5, gt=0, le=1)  # times the rate, each time

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = self._set_units(self.units[0])
        if self.method == "gradient" and len(given) != 1:
            raise ValueError(
                "train: exactly one of epochs, steps, examples, max_minutes must be above 0. Got "
                f"{' and '.join(given) or 'none'}. Set one of them"
            )
        if self.min_steps and not self.epochs:
            raise ValueError(
                f"train.min_steps belongs to train.epochs. Got {self.min_steps} without epochs"
            )
        if len(self._set_units(self.units[1])) != 1:
            raise ValueError(
                "train: exactly one of checkpoint_epochs, checkpoint_steps must be above 0"
            )
        if self.early_stop_epochs and self.early_stop_epochs < self.eval_epochs:
            raise ValueError(
                f"train.early_stop_epochs must be at least train.eval_epochs. "
                f"Got {self.early_stop_epochs} and {self.eval_epochs}"
            )
        if self.batch_size != "auto" and self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"train.batch_size must be a multiple of train.accumulation_steps. "
                f"Got {self.batch_size} and {self.accumulation_steps}"
            )
        return self

    @property
    def examples_per_update(self) -> int:
        """`batch_size` as a number.

        Raises:
            ValueError: it is still "auto", which is decided when a run starts.
        """
        if self.batch_size == "auto":
            raise ValueError("train.batch_size must have been decided. Got 'auto'.")
        return self.batch_size


class ProbeConfig(Section):
    """How a linear probe is fitted: train.method=linear-probe."""

    folds: int = Field(default=5, ge=2, le=20)  # of the cross-validation that picks the penalty
    penalties: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # L2, relative to the data term
    neighbours: int = Field(default=20, gt=0)  # of the k-NN reported beside it
    views: Literal["one", "mirrored"] = "one"  # mirrored: each train image and its mirror image

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = self.penalties
        if not given or len(set(given)) < len(given) or not all(0 < p < math.inf for p in given):
            raise ValueError(
                "probe.penalties must list different numbers above 0. "
                f"Got {list(given)}. Example: [0.01, 0.1, 1.0]"
            )
        return self

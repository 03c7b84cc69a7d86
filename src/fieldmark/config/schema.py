"""The sections of a run's configuration. Plain values only: nothing here imports torch."""

import math
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, field_validator, model_validator

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]

Frac = Field(default=0.0, ge=0, le=1)


class Section(BaseModel):
    """Base of every section: immutable, and a key that does not exist is an error."""

    # JSON has no infinity: a configuration with one would not reload equal.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    # Groups of keys that say the same thing in different units: setting one clears the others.
    units: ClassVar[tuple[tuple[str, ...], ...]] = ()
    # A key that names something -> the keys that belong to that thing, with what empties them.
    arguments: ClassVar[dict[str, dict[str, Any]]] = {}

    @classmethod
    def clears(cls, key: str) -> dict[str, Any]:
        """Return the keys that lose their meaning when `key` is set, with what empties them."""
        others = {name: 0 for group in cls.units if key in group for name in group if name != key}
        return others | cls.arguments.get(key, {})

    def _set_units(self, group: tuple[str, ...]) -> list[str]:
        return [name for name in group if getattr(self, name)]


class DataConfig(Section):
    """Where labelled images come from and how they are split."""

    source: str
    val_frac: float = Field(default=0.1, ge=0, le=0.5)
    test_frac: float = Field(default=0.1, ge=0, le=0.5)  # of a folder that has no split of its own
    split_seed: int = Field(default=0, ge=0)
    image_column: str = ""  # for hf: sources with several image columns
    label_column: str = ""  # for hf: sources with several label columns
    storage: Literal["auto", "resident", "files"] = "auto"
    max_resident_mb: int = Field(default=2048, gt=0)  # of decoded uint8 images, train split
    num_workers: int = Field(default=2, ge=0)  # processes that read files; changes no result
    max_broken_frac: float = Field(default=0.05, ge=0, lt=1)  # of the train split
    # Which images an epoch shows: each once; or drawn with replacement, each class as often as
    # any other (balanced), or as the root of its size (sqrt).
    sampler: Literal["shuffle", "balanced", "sqrt"] = "shuffle"
    repeats: int = Field(default=1, ge=1, le=16)  # copies of an image in one update


class AugmentConfig(Section):
    """What changes an image before the network sees it, drawn per image.

    A policy is a set of values for the keys below, chosen for the images at hand when a run
    starts; a key that is set here wins over the policy.
    """

    policy: Literal["custom", "none", "light", "standard", "strong", "medical", "auto"] = "custom"
    crop_pad_px: int = Field(default=0, ge=0)  # pad on each side, then crop at random
    crop_pad_mode: Literal["zero", "reflect"] = "zero"
    resized_crop: bool = False  # torchvision's RandomResizedCrop; reads files, never resident
    resized_crop_min_area_frac: float = Field(default=0.08, gt=0, le=1)
    flip: Literal["auto", "none", "random", "alternating"] = "auto"  # auto: as the policy, or none
    rotation_deg: float = Field(default=0.0, ge=0, le=180)  # at most so far, either way
    elastic_px: float = Field(default=0.0, ge=0)  # root mean square shift of a smooth distortion
    ops: Literal["none", "randaugment", "trivialaugment", "autoaugment", "three-augment"] = "none"
    ops_magnitude: float = Field(default=9.0, ge=0, le=10)  # of randaugment
    ops_magnitude_std: float = Field(default=0.5, ge=0)  # of randaugment, drawn per image
    num_ops: int = Field(default=2, ge=1, le=8)  # of randaugment, per image
    color_jitter: float = Field(default=0.0, ge=0, lt=1)  # brightness, contrast and saturation
    cutout_px: int = Field(default=0, ge=0)
    erase_prob: float = Frac
    erase_mode: Literal["constant", "pixel"] = "pixel"  # the data's mean, or noise per pixel
    mixup_alpha: float = Field(default=0.0, ge=0)
    cutmix_alpha: float = Field(default=0.0, ge=0)
    mix_prob: float = Field(default=1.0, ge=0, le=1)  # of a batch to be mixed at all
    cutmix_prob: float = Field(default=0.5, ge=0, le=1)  # of cutmix, where both are set
    # [fraction of the run from which it holds, size in px]: smaller images early cost less, and
    # a size below the evaluation's makes objects seem as large as there. Empty: always that size.
    sizes: tuple[tuple[float, int], ...] = ()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        starts = [start for start, _ in self.sizes]
        if self.sizes and (
            starts[0] != 0
            or starts != sorted(set(starts))
            or starts[-1] >= 1
            or any(px < 1 for _, px in self.sizes)
        ):
            raise ValueError(
                "augment.sizes must list [from this fraction of the run, px], rising from 0. "
                f"Got {[list(pair) for pair in self.sizes]}. Example: [[0.0, 24], [0.5, 32]]"
            )
        if self.cutout_px and self.erase_prob:
            raise ValueError(
                "augment.cutout_px and augment.erase_prob both remove a part: set one of them to "
                f"0. Got {self.cutout_px} and {self.erase_prob}"
            )
        return self


class ModelConfig(Section):
    """Which network, from which weights."""

    arguments: ClassVar[dict[str, dict[str, Any]]] = {"arch": {"args": {}}}

    arch: str = ""  # empty: the architecture of `pretrained`
    pretrained: str = (
        ""  # a tag of arch's, timm:NAME, local-dir:PATH, a package; empty: from scratch
    )
    freeze: Literal["none", "statistics", "backbone"] = "none"  # statistics: of batch norms
    small_input: Literal["auto", "always", "never"] = "auto"
    image_px: int = Field(default=0, ge=0, le=4096)  # 0: the weights' size, else the source's
    drop_rate: float = Field(default=0.0, ge=0, lt=1)
    drop_path_rate: float = Field(default=0.0, ge=0, lt=1)
    args: dict[str, Any] = Field(default_factory=dict)  # further arguments of the architecture

    @model_validator(mode="after")
    def _has_a_network(self) -> Self:
        if not self.arch and not self.pretrained:
            raise ValueError("model.arch must name a network, unless model.pretrained gives one")
        return self


class LossConfig(Section):
    """What is minimised."""

    arguments: ClassVar[dict[str, dict[str, Any]]] = {
        "name": {"focal_gamma": 2.0, "adjust_tau": 1.0, "bce_threshold": 0.0},
        "class_weights": {"effective_beta": 0.999},
    }

    name: Literal["cross-entropy", "focal", "bce", "logit-adjusted"] = "cross-entropy"
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

    name: str = "sgd"
    lr: float = Field(default=0.1, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)  # not of adamw
    nesterov: bool = False
    filter_lr: float = Field(default=0.0, ge=0)  # of muon: the rate of convolution filters
    filter_momentum: float = Field(default=0.6, ge=0, lt=1)  # of muon
    weight_decay: float = Field(default=0.0, ge=0)
    decay_norm_and_bias: bool = True
    head_lr_factor: float = Field(default=1.0, gt=0)  # times lr, for a newly made head
    bias_lr_factor: float = Field(default=1.0, gt=0)  # times lr, for norms and biases
    layer_decay: float = Field(default=1.0, gt=0, le=1)  # rate of a layer over that of the next
    max_grad_norm: float = Field(default=0.0, ge=0)  # 0: no clipping
    args: dict[str, Any] = Field(default_factory=dict)  # further arguments of the optimizer


class ScheduleConfig(Section):
    """The learning rate as a multiple of optim.lr, a pure function of the update."""

    units: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("warmup_epochs", "warmup_steps", "warmup_examples", "warmup_frac"),
    )
    arguments: ClassVar[dict[str, dict[str, Any]]] = {"name": {"step_epochs": 0, "end_factor": 0}}

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
        ("epochs", "steps", "examples"),
        ("checkpoint_epochs", "checkpoint_steps"),
    )
    # Who says how long does not want it lengthened.
    arguments: ClassVar[dict[str, dict[str, Any]]] = {
        unit: {"min_steps": 0} for unit in ("epochs", "steps", "examples")
    }

    # gradient: updates of the network; linear-probe: a regression on features of frozen weights
    method: Literal["gradient", "linear-probe"] = "gradient"
    epochs: float = Field(default=0.0, ge=0)
    steps: int = Field(default=0, ge=0)
    examples: int = Field(default=0, ge=0)
    min_steps: int = Field(default=0, ge=0)  # of `epochs`: at least so many updates
    batch_size: PositiveInt = 32  # examples per update
    accumulation_steps: int = Field(default=1, gt=0)  # forward and backward passes per update
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    channels_last: bool = True
    compile: bool = False
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

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = self._set_units(self.units[0])
        if self.method == "gradient" and len(given) != 1:
            raise ValueError("train: exactly one of epochs, steps, examples must be above 0")
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
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"train.batch_size must be a multiple of train.accumulation_steps. "
                f"Got {self.batch_size} and {self.accumulation_steps}"
            )
        return self


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


class EvalConfig(Section):
    """How an image is prepared for evaluation and serving, where the weights do not say."""

    batch_size: int = Field(default=250, gt=0)
    crop_frac: float = Field(default=0.0, ge=0, le=1)  # 0: the weights' own, else 1
    interpolation: Interpolation | Literal["auto"] = "auto"
    scaled_decoding: bool = False


class PackageConfig(Section):
    """What the package at the end of the run carries beside the weights."""

    golden: Literal["data", "synthetic", "none"] = "data"  # data: images of the validation split
    num_golden: int = Field(default=12, gt=0, le=100)
    license: str = ""  # empty: that of the pretrained weights


# Sections and keys that a linear probe has no use for.
_NOT_OF_A_PROBE: dict[str, tuple[str, ...]] = {
    "data": ("storage", "max_resident_mb", "num_workers", "sampler", "repeats"),
    "augment": tuple(AugmentConfig.model_fields),
    "model": ("freeze", "drop_rate", "drop_path_rate"),
    "loss": tuple(LossConfig.model_fields),
    "optim": tuple(OptimConfig.model_fields),
    "schedule": tuple(ScheduleConfig.model_fields),
    "train": tuple(
        key
        for key in TrainConfig.model_fields
        if key not in ("method", "channels_last", "seed", "device", "threads")
    ),
}


def _is_default(section: Section, key: str) -> bool:
    field = type(section).model_fields[key]
    return bool(getattr(section, key) == field.get_default(call_default_factory=True))


class RunConfig(Section):
    """Everything a run is told; its JSON reloads equal."""

    name: str = ""  # the recipe it came from
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    probe: ProbeConfig = ProbeConfig()
    eval: EvalConfig = EvalConfig()
    package: PackageConfig = PackageConfig()

    @model_validator(mode="after")
    def _fits_the_method(self) -> Self:
        """What the method of training does not read must be left alone."""
        probed = self.train.method == "linear-probe"
        if probed and not self.model.pretrained:
            raise ValueError(
                "train.method=linear-probe needs model.pretrained, whose features it reads. Got "
                "none. Example: model.pretrained=local-dir:PATH"
            )
        unread = _NOT_OF_A_PROBE if probed else {"probe": tuple(ProbeConfig.model_fields)}
        changed = [
            f"{section}.{key}={getattr(getattr(self, section), key)!r}"
            for section, keys in unread.items()
            for key in keys
            if not _is_default(getattr(self, section), key)
        ]
        if changed:
            more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
            advice = (
                "Leave them out, and start from the recipe linear-probe"
                if probed
                else "Leave them out, or set train.method=linear-probe"
            )
            raise ValueError(
                f"train.method={self.train.method} must leave settings that it does not read at "
                f"their defaults. Got {', '.join(changed[:4])}{more}. {advice}"
            )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.train.early_stop_epochs and not self.data.val_frac:
            raise ValueError("train.early_stop_epochs needs a validation split. data.val_frac is 0")
        if self.loss.balancing and self.data.sampler != "shuffle":
            raise ValueError(
                f"loss.{self.loss.balancing[0]} and data.sampler={self.data.sampler} both make up "
                "for the sizes of the classes, twice in all: keep one of them"
            )
        if self.augment.resized_crop and self.augment.crop_pad_px:
            raise ValueError(
                "augment.resized_crop and augment.crop_pad_px are two ways to crop: set "
                f"one of them to its zero. Got true and {self.augment.crop_pad_px}"
            )
        if self.optim.nesterov and self.optim.name.lower() not in ("sgd", "muon"):
            raise ValueError(f"optim.nesterov is a setting of sgd and muon. Got {self.optim.name}")
        if (self.optim.name.lower() == "muon") != bool(self.optim.filter_lr):
            raise ValueError(
                "optim.filter_lr belongs to optim.name=muon, which needs it. "
                f"Got {self.optim.filter_lr:g} with {self.optim.name}"
            )
        if self.data.storage == "resident" and self.augment.resized_crop:
            raise ValueError(
                "augment.resized_crop reads original files and cannot be used with "
                "data.storage=resident. Set data.storage=files or augment.resized_crop=false"
            )
        return self

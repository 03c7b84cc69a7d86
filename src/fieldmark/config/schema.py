"""The sections of a run's configuration. Plain values only: nothing here imports torch."""

from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]

Frac = Field(default=0.0, ge=0, le=1)


class Section(BaseModel):
    """Base of every section: immutable, and a key that does not exist is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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

    @classmethod
    def clears(cls, key: str) -> dict[str, Any]:
        """A policy that is chosen over a recipe replaces the recipe's own keys."""
        if key != "policy":
            return super().clears(key)
        return {name: field.default for name, field in cls.model_fields.items() if name != key}

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

    name: Literal["cross-entropy", "focal", "bce", "logit-adjusted"] = "cross-entropy"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    # inverse: 1 / images of the class; effective: (1 - beta) / (1 - beta^n); or one for each class
    class_weights: Literal["none", "inverse", "effective"] | tuple[float, ...] = "none"
    effective_beta: float = Field(default=0.999, gt=0, lt=1)
    focal_gamma: float = Field(default=2.0, ge=0)
    adjust_tau: float = Field(default=1.0, gt=0)  # of logit-adjusted: times the log of the prior
    bce_threshold: float = Field(default=0.0, ge=0, lt=1)  # soft targets above it count as 1
    reduction: Literal["mean", "sum"] = "mean"  # over the examples of an update, of its gradient


class OptimConfig(Section):
    """How weights move. `name` is sgd, adamw, muon, or any optimizer of timm.optim."""

    arguments: ClassVar[dict[str, dict[str, Any]]] = {
        "name": {"args": {}, "nesterov": False, "filter_lr": 0}
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
    lookahead_steps: int = Field(default=0, ge=0)  # 0: none
    lookahead_decay: float = Field(default=0.95, gt=0, lt=1)  # of the slow weights, per update
    stem_epochs: float = Field(default=0.0, ge=0)  # airnet's stem learns so long; 0: to the end
    args: dict[str, Any] = Field(default_factory=dict)  # further arguments of the optimizer


class ScheduleConfig(Section):
    """The learning rate as a multiple of optim.lr, a pure function of the update."""

    units: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("warmup_epochs", "warmup_steps", "warmup_examples", "warmup_frac"),
    )

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
        return self


class TrainConfig(Section):
    """How long, how much at once, and with which arithmetic."""

    units: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("epochs", "steps", "examples", "max_minutes"),
        ("checkpoint_epochs", "checkpoint_steps"),
    )

    # gradient: updates of the network; linear-probe: a regression on features of frozen weights
    method: Literal["gradient", "linear-probe"] = "gradient"
    epochs: float = Field(default=0.0, ge=0)
    steps: int = Field(default=0, ge=0)
    examples: int = Field(default=0, ge=0)
    max_minutes: float = Field(default=0.0, ge=0)  # the length is fitted to it, once
    batch_size: PositiveInt | Literal["auto"] = 32  # examples per update, over all devices
    accumulation_steps: int = Field(default=1, gt=0)  # forward and backward passes per update
    keep_hardest_frac: float = Field(default=1.0, gt=0, le=1)  # of a batch, as a small network sees
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    channels_last: bool = True
    compile: bool = False
    sync_batch_norm: bool = False  # statistics over all devices; CUDA only
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
    bad_updates: int = Field(default=3, gt=0)  # in a row that make the run roll back
    max_rollbacks: int = Field(default=3, ge=0)  # after which it stops with a diagnosis
    rollback_lr_factor: float = Field(default=0.5, gt=0, le=1)  # times the rate, each time
    spike_factor: float = Field(default=3.0, ge=0)  # loss over its recent median; 0: not watched

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        given = self._set_units(self.units[0])
        if self.method == "gradient" and len(given) != 1:
            raise ValueError(
                "train: exactly one of epochs, steps, examples, max_minutes must be above 0"
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


class ProbeConfig(Section):
    """How a linear probe is fitted: train.method=linear-probe."""

    folds: int = Field(default=5, ge=2, le=20)  # of the cross-validation that picks the penalty
    penalties: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # L2, relative to the data term
    neighbours: int = Field(default=20, gt=0)  # of the k-NN reported beside it
    views: Literal["one", "mirrored"] = "one"  # mirrored: each train image and its mirror image


class EvalConfig(Section):
    """How an image is prepared for evaluation and serving, where the weights do not say."""

    batch_size: int = Field(default=250, gt=0)
    crop_frac: float = Field(default=0.0, ge=0, le=1)  # 0: the weights' own, else 1
    interpolation: Interpolation | Literal["auto"] = "auto"
    scaled_decoding: bool = False
    views: Literal["one", "six"] = "one"  # six: also reported over mirror images and shifts


class PackageConfig(Section):
    """What the package at the end of the run carries beside the weights."""

    golden: Literal["data", "synthetic", "none"] = "data"  # data: images of the validation split
    num_golden: int = Field(default=12, gt=0, le=100)
    license: str = ""  # empty: that of the pretrained weights


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
    def _consistent(self) -> Self:
        if self.train.early_stop_epochs and not self.data.val_frac:
            raise ValueError("train.early_stop_epochs needs a validation split. data.val_frac is 0")
        if self.train.keep_hardest_frac < 1 and self.model.arch != "airnet":
            raise ValueError(
                "train.keep_hardest_frac below 1 needs model.arch=airnet, whose narrow form "
                f"chooses. Got {self.model.arch or self.model.pretrained!r}"
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

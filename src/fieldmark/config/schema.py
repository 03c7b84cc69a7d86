"""The sections of a run's configuration. Plain values only: nothing here imports torch."""

from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

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


class AugmentConfig(Section):
    """What changes an image before the network sees it, drawn per image."""

    crop_pad_px: int = Field(default=0, ge=0)  # pad on each side, then crop at random
    crop_pad_mode: Literal["zero", "reflect"] = "zero"
    flip: Literal["none", "random", "alternating"] = "none"
    cutout_px: int = Field(default=0, ge=0)
    resized_crop: bool = False  # torchvision's RandomResizedCrop; reads files, never resident
    resized_crop_min_area_frac: float = Field(default=0.08, gt=0, le=1)
    color_jitter: float = Field(default=0.0, ge=0, lt=1)  # brightness, contrast and saturation
    mixup_alpha: float = Field(default=0.0, ge=0)


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

    name: Literal["cross-entropy"] = "cross-entropy"
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)


class OptimConfig(Section):
    """How weights move. `name` is sgd, adamw, or any optimizer of timm.optim."""

    arguments: ClassVar[dict[str, dict[str, Any]]] = {"name": {"args": {}, "nesterov": False}}

    name: str = "sgd"
    lr: float = Field(gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)  # not of adamw
    nesterov: bool = False
    weight_decay: float = Field(default=0.0, ge=0)
    decay_norm_and_bias: bool = True
    head_lr_factor: float = Field(default=1.0, gt=0)  # times lr, for a newly made head
    max_grad_norm: float = Field(default=0.0, ge=0)  # 0: no clipping
    args: dict[str, Any] = Field(default_factory=dict)  # further arguments of the optimizer


class ScheduleConfig(Section):
    """The learning rate as a multiple of optim.lr, a pure function of the update."""

    units: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("warmup_epochs", "warmup_steps", "warmup_examples", "warmup_frac"),
    )

    name: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_epochs: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    warmup_examples: int = Field(default=0, ge=0)
    warmup_frac: float = Frac
    warmup_start_factor: float = Field(default=0.01, ge=0, le=1)
    end_factor: float = Field(default=0.0, ge=0, le=1)  # the last rate over optim.lr

    @model_validator(mode="after")
    def _one_unit(self) -> Self:
        given = self._set_units(self.units[0])
        if len(given) > 1:
            raise ValueError(f"schedule: only one of {', '.join(self.units[0])} may be set")
        return self


class TrainConfig(Section):
    """How long, how much at once, and with which arithmetic."""

    units: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("epochs", "steps", "examples"),
        ("checkpoint_epochs", "checkpoint_steps"),
    )

    epochs: float = Field(default=0.0, ge=0)
    steps: int = Field(default=0, ge=0)
    examples: int = Field(default=0, ge=0)
    batch_size: int = Field(gt=0)  # examples per update
    accumulation_steps: int = Field(default=1, gt=0)  # forward and backward passes per update
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    channels_last: bool = True
    compile: bool = False
    ema_decay: float = Field(default=0.0, ge=0, lt=1)  # 0: no moving average of the weights
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
        if len(self._set_units(self.units[0])) != 1:
            raise ValueError("train: exactly one of epochs, steps, examples must be above 0")
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


class RunConfig(Section):
    """Everything a run is told; its JSON reloads equal."""

    name: str = ""  # the recipe it came from
    data: DataConfig
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig
    loss: LossConfig = LossConfig()
    optim: OptimConfig
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig
    eval: EvalConfig = EvalConfig()
    package: PackageConfig = PackageConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.train.early_stop_epochs and not self.data.val_frac:
            raise ValueError("train.early_stop_epochs needs a validation split. data.val_frac is 0")
        if self.augment.resized_crop and self.augment.crop_pad_px:
            raise ValueError(
                "augment.resized_crop and augment.crop_pad_px are two ways to crop: set "
                f"one of them to its zero. Got true and {self.augment.crop_pad_px}"
            )
        if self.optim.nesterov and self.optim.name.lower() != "sgd":
            raise ValueError(f"optim.nesterov is a setting of sgd. Got {self.optim.name}")
        if self.data.storage == "resident" and self.augment.resized_crop:
            raise ValueError(
                "augment.resized_crop reads original files and cannot be used with "
                "data.storage=resident. Set data.storage=files or augment.resized_crop=false"
            )
        return self

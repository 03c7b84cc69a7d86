"""A run's whole configuration, and the rules that reach over its sections."""

from typing import Literal, Self

from pydantic import Field, model_validator

from fieldmark.config.inputs import AugmentConfig, DataConfig, ModelConfig
from fieldmark.config.learning import (
    LossConfig,
    OptimConfig,
    ProbeConfig,
    ScheduleConfig,
    TrainConfig,
)
from fieldmark.config.section import Interpolation, Section


class EvalConfig(Section):
    """How an image is prepared for evaluation and serving, where the weights do not say."""

    batch_size: int = Field(default=250, gt=0)
    crop_frac: float = Field(default=0.0, ge=0, le=1)  # 0: the weights' own, else 1
    interpolation: Interpolation | Literal["auto"] = "auto"
    scaled_decoding: bool = False
    views: Literal["one", "six"] = "one"  # six: beside one, also over mirror images and shifts


class PackageConfig(Section):
    """What the package at the end of the run carries beside the weights."""

    golden: Literal["data", "synthetic", "none"] = "data"  # data: images of the validation split
    num_golden: int = Field(default=12, gt=0, le=100)
    license: str = ""  # empty: that of the pretrained weights


# Sections and keys that a linear probe has no use for.
_NOT_OF_A_PROBE: dict[str, tuple[str, ...]] = {
    "data": (
        "storage",
        "max_resident_mb",
        "num_workers",
        "sampler",
        "repeats",
        "keep_hardest_frac",
    ),
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
        if self.data.keep_hardest_frac < 1 and (
            self.data.storage == "files"
            or self.train.max_minutes
            or self.train.batch_size == "auto"
        ):
            raise ValueError(
                "data.keep_hardest_frac below 1 looks at every update beforehand: it needs images "
                "in memory and a length that is known, not data.storage=files, train.max_minutes "
                f"or train.batch_size=auto. Got {self.data.keep_hardest_frac:g}"
            )
        if self.data.storage == "resident" and self.augment.resized_crop:
            raise ValueError(
                "augment.resized_crop reads original files and cannot be used with "
                "data.storage=resident. Set data.storage=files or augment.resized_crop=false"
            )
        return self

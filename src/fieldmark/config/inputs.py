"""The sections on images and network: what training starts from."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from fieldmark.config.section import Frac, Section


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
    # The share of each update that trains, the hardest as a small network sees them; resident only.
    keep_hardest_frac: float = Field(default=1.0, gt=0, le=1)


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

    needs: ClassVar[dict[str, tuple[str, ...]]] = {
        "ops_magnitude": ("ops=randaugment",),
        "ops_magnitude_std": ("ops=randaugment",),
        "num_ops": ("ops=randaugment",),
        "erase_mode": ("erase_prob",),
        "mix_prob": ("mixup_alpha", "cutmix_alpha"),
        "resized_crop_min_area_frac": ("resized_crop",),
    }

    @classmethod
    def idle(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Of a policy that chooses for the images, nothing is known before it has seen them."""
        return super().idle(values) if values["policy"] in ("custom", "none") else {}

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
    # statistics: of batch norms; auto: these where few values would make new ones, else none
    freeze: Literal["none", "statistics", "backbone", "auto"] = "none"
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

"""What a named policy of augmentation means for the images at hand.

A policy is a table of values for the keys of AugmentConfig. It is looked up once, when a run
starts; what follows sees plain values. Lengths in px are fractions of the network's input.

Three facts decide: channels, sizes, and how many images there are, of all classes and of the
smallest; how many classes there are does not by itself. Greyscale images (signs, scans, X-rays) get
no colours and no flip: a mirrored letter is another letter, a mirrored chest has its heart on the
wrong side. Small images, up to 64 px, are padded and cropped, because parts of them enlarged show
little, and stay in memory. Photos get resized crops. The fewer images there are, the more
regularisation pays (Steiner et al. 2021, arXiv:2106.10270); but with very few of a class, mixing
would show hardly any of them whole.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import ValidationError

from fieldmark.config import AugmentConfig
from fieldmark.data.labelled import Split
from fieldmark.data.ops import SMALL_PX
from fieldmark.errors import ConfigError, ImageError
from fieldmark.preprocess import Preprocess
from fieldmark.runtime.seed import derive_seed

SAMPLED_IMAGES = 32
GREY_LEVELS = 1.0  # mean difference of two channels up to which an image counts as grey
BLACK_LEVEL = 8  # up to which an edge counts as black
ENOUGH_IMAGES = 20_000  # from here on auto means standard, below it strong
MANY_IMAGES = 100_000  # from here on a resized crop may be as small as on ImageNet
MIXABLE_IMAGES = 50  # of the smallest class, from which on images are mixed

Values = dict[str, Any]


@dataclass(frozen=True)
class Facts:
    """What a policy depends on."""

    num_images: int
    num_classes: int
    fewest: int  # images of the smallest class
    native_px: int  # the median image's longer side, as stored
    image_px: int  # the network's input, its short side
    is_grey: bool  # three equal channels, in all of the sample
    has_black_edge: bool = False  # the middle edge pixel of the median image
    must_be_resident: bool = False  # data.storage=resident: nothing that needs files
    is_pretrained: bool = False  # the network knows other images already, and is trained briefly

    @property
    def is_small(self) -> bool:
        """Whether images are padded and cropped instead of cropped and enlarged."""
        return self.native_px <= SMALL_PX


def facts_of(
    split: Split,
    preprocess: Preprocess,
    *,
    must_be_resident: bool = False,
    is_pretrained: bool = False,
) -> Facts:
    """Return the facts of a training split; sizes and colours are those of a seeded sample."""
    rng = np.random.Generator(np.random.PCG64(derive_seed("policy", len(split))))
    sides, are_grey, edges = [], [], []
    for index in rng.permutation(len(split))[:SAMPLED_IMAGES]:
        try:
            image = split.images.image(int(index))
        except ImageError:
            continue
        sides.append(max(image.size))
        image.thumbnail((SMALL_PX, SMALL_PX), Image.Resampling.NEAREST)
        pixels = np.asarray(image, dtype=np.float32)
        are_grey.append(_is_grey(pixels))
        edges.append(_edge_level(pixels))
    counts = np.bincount(split.labels)
    counts = counts[counts > 0]
    return Facts(
        num_images=len(split),
        num_classes=len(counts),
        fewest=int(counts.min()),
        native_px=round(float(np.median(sides))) if sides else preprocess.height_px,
        image_px=min(preprocess.height_px, preprocess.width_px),
        is_grey=bool(are_grey) and all(are_grey),
        has_black_edge=bool(edges) and float(np.median(edges)) <= BLACK_LEVEL,
        must_be_resident=must_be_resident,
        is_pretrained=is_pretrained,
    )


def _is_grey(pixels_HWC: npt.NDArray[np.float32]) -> bool:
    middle = pixels_HWC[..., 1]
    return all(
        float(np.abs(pixels_HWC[..., other] - middle).mean()) <= GREY_LEVELS for other in (0, 2)
    )


def _edge_level(pixels_HWC: npt.NDArray[np.float32]) -> float:
    top_bottom, sides = pixels_HWC[[0, -1]], pixels_HWC[:, [0, -1]]
    return float(np.median(np.concatenate([top_bottom.ravel(), sides.ravel()])))


def needs_facts(config: AugmentConfig) -> bool:
    """Return whether what the configuration means depends on the images."""
    return config.policy not in ("custom", "none")


def resolve_augment(config: AugmentConfig, facts: Facts | None) -> tuple[AugmentConfig, str]:
    """Return the configuration with policy "custom" and every key filled, and one line on it.

    A key that differs from its default wins over the policy. One that is set to its default is
    not told from one that is not set. (Choosing a policy clears a recipe's own keys: see
    AugmentConfig.clears.)

    Args:
        facts: of the images; None where `needs_facts` says that they do not matter.
    """
    name: str = config.policy
    values = Values()
    if facts is not None and needs_facts(config):
        name = _auto(facts) if config.policy == "auto" else config.policy
        values = _POLICIES[name](facts)
        if facts.must_be_resident:
            values = _without_files(values, facts)
    given = _given(config)
    _give_way(values, given)
    merged = {"flip": "none"} | values | given | {"policy": "custom"}
    for key, default in AugmentConfig.idle(AugmentConfig().model_dump() | merged).items():
        if key not in given:  # it was of what gave way
            merged[key] = default
    try:
        resolved = AugmentConfig.model_validate(merged)
    except ValidationError as error:  # of what is known only now that the policy has chosen
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{message}, as augment.policy={config.policy} chose.") from error
    return resolved, f"augmentation: {describe(resolved)} ({_why(config, name, given, facts)})"


def describe(config: AugmentConfig) -> str:
    """Return what is done to an image, in its order, as a list."""
    c = config
    words = {
        f"random {c.crop_pad_px} px shift": c.crop_pad_px,
        f"resized crop of {c.resized_crop_min_area_frac:.0%} and more": c.resized_crop,
        f"{c.flip} flip": c.flip in ("random", "alternating"),
        f"rotation up to {c.rotation_deg:g}°": c.rotation_deg,
        f"distortion of {c.elastic_px:g} px": c.elastic_px,
        f"{c.ops} {c.num_ops} x {c.ops_magnitude:g}": c.ops == "randaugment",
        c.ops: c.ops not in ("none", "randaugment"),
        f"brightness, contrast and saturation ± {c.color_jitter:.0%}": c.color_jitter,
        f"{c.cutout_px} px cutout": c.cutout_px,
        f"erasing of {c.erase_prob:.0%} ({c.erase_mode})": c.erase_prob,
        f"mixup {c.mixup_alpha:g}": c.mixup_alpha and c.mix_prob,
        f"cutmix {c.cutmix_alpha:g}": c.cutmix_alpha and c.mix_prob,
        f"of {c.mix_prob:.0%} of the updates": 0 < c.mix_prob < 1
        and (c.mixup_alpha or c.cutmix_alpha),
        f"sizes {', '.join(str(px) for _, px in c.sizes)} px": c.sizes,
    }
    return ", ".join(text for text, is_on in words.items() if is_on) or "none"


def _auto(facts: Facts) -> str:
    """Return the policy for these images.

    Standard where there are many. Where there are few, strong from scratch, and light for
    pretrained weights, which are trained briefly: mixing helped none of the short runs in
    docs/experiments.md.
    """
    if facts.num_images >= ENOUGH_IMAGES:
        return "standard"
    return "light" if facts.is_pretrained else "strong"


def _light(facts: Facts) -> Values:
    """Small shifts; for photos mild crops. For short runs and for fine-tuning.

    Pretrained weights have seen smaller crops than that, and take them
    (docs/decisions/0014-fine-tuning.md).
    """
    flip = _flip(facts)
    if facts.is_small:
        return {**_shift(facts, 1 / 16), **flip}
    frac = 0.35 if facts.is_pretrained else 0.5
    return {"resized_crop": True, "resized_crop_min_area_frac": frac, **flip}


def _standard(facts: Facts) -> Values:
    """What baselines are trained with.

    Small images: shift by an eighth and flip (He et al. 2015, arXiv:1512.03385, section 4.2), and
    a cutout of three eighths (Jordan 2024, arXiv:2404.00498, for 96 % on CIFAR-10). Photos:
    resized crop and flip, as torchvision's reference, with mild colours.
    """
    if facts.is_small and facts.is_grey:
        return {**_shift(facts, 1 / 10), "rotation_deg": 10.0}
    if facts.is_small:
        return {**_shift(facts, 1 / 8), **_flip(facts), "cutout_px": _px(facts, 3 / 8)}
    colors = {} if facts.is_grey else {"color_jitter": 0.2}
    return {**_resized_crop(facts), **_flip(facts), **colors, **_erasing(facts, 0.1)}


def _strong(facts: Facts) -> Values:
    """As standard, with more of it and mixing, for long runs and for few images.

    Small images: mixup and cutmix, which hides a part as cutout does without losing it (Yun et al.
    2019, arXiv:1905.04899); with too few of a class to mix, a cutout of half the side (DeVries and
    Taylor 2017, arXiv:1708.04552). No chosen operations, so that they stay in memory. Photos: the
    recipe of DeiT (Touvron et al. 2020, arXiv:2012.12877) with mixup as mild as in Wightman et al.
    2021, arXiv:2110.00476. Grey images: distortion in place of colours (Simard et al. 2003).
    """
    mixing = {}
    if facts.fewest >= MIXABLE_IMAGES:
        mixing = {"mixup_alpha": 0.2, "cutmix_alpha": 1.0}
    geometry = {}
    if facts.is_grey:
        geometry = {"rotation_deg": 15.0, "elastic_px": _length(facts, 1 / 32), **_outside(facts)}
    if facts.is_small:
        shift = _shift(facts, 1 / 10 if facts.is_grey else 1 / 8)
        hidden = mixing or {"cutout_px": _px(facts, 1 / 2)}
        return {**shift, **_flip(facts), **geometry, **hidden}
    ops = {"ops": "randaugment", "ops_magnitude": 9.0, "ops_magnitude_std": 0.5, "num_ops": 2}
    colors = {} if facts.is_grey else ops
    erasing = _erasing(facts, 0.25)
    return {**_resized_crop(facts), **_flip(facts), **geometry, **colors, **erasing, **mixing}


def _medical(facts: Facts) -> Values:
    """Distortion, rotation, flips and mild brightness: what tissue and cameras do.

    Never hue: stains and skin are told apart by it. No resized crop: size can be a finding. Grey
    images, such as X-rays, are not mirrored: on which side the heart is can be one, too.

    Source: Ronneberger et al. 2015, arXiv:1505.04597, section 3.1.
    """
    return {
        **_shift(facts, 1 / 16),
        **_flip(facts),
        "rotation_deg": 15.0,
        "elastic_px": _length(facts, 1 / 50),
        "color_jitter": 0.1,
    }


_POLICIES: dict[str, Callable[[Facts], Values]] = {
    "light": _light,
    "standard": _standard,
    "strong": _strong,
    "medical": _medical,
}


def _flip(facts: Facts) -> Values:
    return {} if facts.is_grey else {"flip": "random"}


def _shift(facts: Facts, frac: float) -> Values:
    return {"crop_pad_px": _px(facts, frac), **_outside(facts)}


def _outside(facts: Facts) -> Values:
    # Black belongs around what is on black. Elsewhere it would be a foreign body: mirror the edge.
    return {"crop_pad_mode": "zero" if facts.has_black_edge else "reflect"}


def _resized_crop(facts: Facts) -> Values:
    # 8 % of a photo often lacks the object: ImageNet is large enough to average that out.
    frac = 0.08 if facts.num_images >= MANY_IMAGES else 0.35
    return {"resized_crop": True, "resized_crop_min_area_frac": frac}


def _erasing(facts: Facts, prob: float) -> Values:
    # Noise is drawn for each channel: it would be the only colour in a grey image.
    return {"erase_prob": prob, "erase_mode": "constant" if facts.is_grey else "pixel"}


def _px(facts: Facts, frac: float) -> int:
    return max(1, round(facts.image_px * frac))


def _length(facts: Facts, frac: float) -> float:
    return round(facts.image_px * frac, 2)


def _without_files(values: Values, facts: Facts) -> Values:
    """Return the values with what only files can have replaced, or left out."""
    kept = {k: v for k, v in values.items() if k not in ("color_jitter", "ops")}
    if kept.pop("resized_crop", False):
        kept.pop("resized_crop_min_area_frac")
        kept |= _shift(facts, 1 / 8)
    return kept


def _given(config: AugmentConfig) -> Values:
    fields = AugmentConfig.model_fields
    return {
        name: value
        for name, value in config.model_dump().items()
        if name != "policy" and value != fields[name].default
    }


def _give_way(values: Values, given: Values) -> None:
    """Drop what the policy says of a thing that is set to be done another way."""
    rivals = {
        "cutout_px": ("erase_prob", "erase_mode"),
        "erase_prob": ("cutout_px",),
        "crop_pad_px": ("resized_crop", "resized_crop_min_area_frac"),
        "resized_crop": ("crop_pad_px",),
    }
    for name in given:
        for rival in rivals.get(name, ()):
            values.pop(rival, None)


def _why(config: AugmentConfig, name: str, given: Values, facts: Facts | None) -> str:
    if facts is None or not needs_facts(config):
        return "as configured" if config.policy == "custom" or given else "policy none"
    color = "grey" if facts.is_grey else "colour"
    seen = (
        f"{facts.num_images:,} images in {facts.num_classes:,} classes, the smallest of "
        f"{facts.fewest:,}, {facts.native_px} px, {color}"
    )
    policy = f"policy {name}" if config.policy == name else f"policy {config.policy}: {name}"
    memory = ", held in memory" if facts.must_be_resident else ""
    own = f"; set by hand: {', '.join(sorted(given))}" if given else ""
    return f"{policy}, for {seen}{memory}{own}"

"""Randomly chosen changes of one photo: RandAugment, TrivialAugment, AutoAugment, 3-Augment.

What is drawn is plain: a list of (name, value). The names are those of `apply_op`; a value is in
that operation's own unit. Pillow does the work, on one uint8 RGB image.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from fieldmark.config import AugmentConfig

Op = tuple[str, float]
"""An operation and how far it goes; 0 where there is nothing to say."""

Color = tuple[int, int, int]

SMALL_PX = 64  # up to this size AutoAugment's policy is that of CIFAR-10, above that of ImageNet

_ENHANCERS: dict[str, Callable[[Image.Image], ImageEnhance._Enhance]] = {
    "brightness": ImageEnhance.Brightness,
    "color": ImageEnhance.Color,
    "contrast": ImageEnhance.Contrast,
    "sharpness": ImageEnhance.Sharpness,
}
_PLAIN: dict[str, Callable[[Image.Image], Image.Image]] = {
    "identity": lambda image: image,
    "autocontrast": ImageOps.autocontrast,
    "equalize": ImageOps.equalize,
    "invert": ImageOps.invert,
    "grayscale": lambda image: image.convert("L").convert("RGB"),
}
_GEOMETRY = ("shear-x", "shear-y", "translate-x", "translate-y", "rotate")


def draw_ops(
    config: AugmentConfig, rng: np.random.Generator, width_px: int, height_px: int
) -> list[Op]:
    """Return the operations for an image of this size, in the order to apply them."""
    if config.ops == "randaugment":
        return _rand_augment(config, rng, width_px, height_px)
    if config.ops == "trivialaugment":
        return [_trivial_augment(rng)]
    if config.ops == "autoaugment":
        return _auto_augment(rng, width_px, height_px)
    if config.ops == "three-augment":
        return [_three_augment(rng)]
    return []


def apply_op(image: Image.Image, op: Op, *, fill: Color, resample: Image.Resampling) -> Image.Image:
    """Return the image changed.

    Args:
        op: shear-x, shear-y (slope), translate-x, translate-y (px), rotate (degrees,
            counter-clockwise), brightness, color, contrast, sharpness (a factor; 1 changes
            nothing), posterize (bits that stay), solarize (values from it on are inverted),
            solarize-add (added to values below 128), blur (radius in px), and those in _PLAIN.
        fill: what comes into view from outside of the image.
    """
    name, value = op
    if name in _PLAIN:
        return _PLAIN[name](image)
    if name in _ENHANCERS:
        return _ENHANCERS[name](image).enhance(value)
    if name in _GEOMETRY:
        return _move(image, name, value, fill, resample)
    if name == "posterize":
        return ImageOps.posterize(image, int(value)) if value < 8 else image
    if name == "solarize":
        return ImageOps.solarize(image, value)  # type: ignore[arg-type]  # a float is compared too
    if name == "solarize-add":
        added = [min(255, level + int(value)) if level < 128 else level for level in range(256)]
        return image.point(added * 3)
    if name == "blur":
        return image.filter(ImageFilter.GaussianBlur(value))
    raise ValueError(f"there is no operation {name!r}")


def _move(
    image: Image.Image, name: str, value: float, fill: Color, resample: Image.Resampling
) -> Image.Image:
    if name == "rotate":
        return image.rotate(value, resample=resample, fillcolor=fill)
    matrix = {
        "shear-x": (1, value, 0, 0, 1, 0),
        "shear-y": (1, 0, 0, value, 1, 0),
        "translate-x": (1, 0, value, 0, 1, 0),
        "translate-y": (1, 0, 0, 0, 1, value),
    }[name]
    affine = Image.Transform.AFFINE
    return image.transform(image.size, affine, matrix, resample=resample, fillcolor=fill)


_RAND_OPS = (
    "autocontrast",
    "equalize",
    "invert",
    "rotate",
    "posterize",
    "solarize",
    "solarize-add",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "shear-x",
    "shear-y",
    "translate-x",
    "translate-y",
)
_RAND_PROB = 0.5  # of a chosen operation to be applied


def _rand_augment(
    config: AugmentConfig, rng: np.random.Generator, width_px: int, height_px: int
) -> list[Op]:
    """Return `num_ops` choices, each applied with probability 0.5, with increasing severity.

    Source: Cubuk et al. 2019, arXiv:1909.13719; in timm's form ("rand-m9-mstd0.5-inc1"), in which
    DeiT and others were trained: a magnitude is drawn for each operation, and more of it always
    changes the image more.
    """
    chosen = rng.integers(0, len(_RAND_OPS), config.num_ops)
    is_applied = rng.random(config.num_ops) < _RAND_PROB
    levels = rng.normal(config.ops_magnitude, config.ops_magnitude_std, config.num_ops)
    signs = rng.choice([-1.0, 1.0], config.num_ops)
    fracs = np.clip(levels, 0, 10) / 10
    return [
        (name, _rand_value(name, frac, sign, width_px, height_px))
        for name, frac, sign, is_on in zip(
            [_RAND_OPS[index] for index in chosen],
            fracs.tolist(),
            signs.tolist(),
            is_applied,
            strict=True,
        )
        if is_on
    ]


def _rand_value(name: str, frac: float, sign: float, width_px: int, height_px: int) -> float:
    """Return what a magnitude, 0 to 1, means for an operation."""
    if name in _ENHANCERS:
        return max(0.1, 1 + sign * 0.9 * frac)
    return {
        "rotate": sign * 30 * frac,
        "shear-x": sign * 0.3 * frac,
        "shear-y": sign * 0.3 * frac,
        "translate-x": sign * 0.45 * frac * width_px,
        "translate-y": sign * 0.45 * frac * height_px,
        "posterize": 4 - int(4 * frac),
        "solarize": 256 - int(256 * frac),
        "solarize-add": int(110 * frac),
    }.get(name, 0.0)


_TRIVIAL_OPS = (
    "identity",
    "shear-x",
    "shear-y",
    "translate-x",
    "translate-y",
    "rotate",
    "brightness",
    "color",
    "contrast",
    "sharpness",
    "posterize",
    "solarize",
    "autocontrast",
    "equalize",
)
_TRIVIAL_STEPS = 30


def _trivial_augment(rng: np.random.Generator) -> Op:
    """Return one operation at any of 31 strengths, in the wide range.

    Source: Mueller and Hutter 2021, arXiv:2103.10158; as torchvision's
    TrivialAugmentWide.
    """
    name = _TRIVIAL_OPS[rng.integers(0, len(_TRIVIAL_OPS))]
    frac = int(rng.integers(0, _TRIVIAL_STEPS + 1)) / _TRIVIAL_STEPS
    sign = 1.0 if rng.random() < 0.5 else -1.0
    return name, _trivial_value(name, frac, sign)


def _trivial_value(name: str, frac: float, sign: float) -> float:
    if name in _ENHANCERS:
        return 1 + sign * 0.99 * frac
    return {
        "rotate": sign * 135 * frac,
        "shear-x": sign * 0.99 * frac,
        "shear-y": sign * 0.99 * frac,
        "translate-x": sign * int(32 * frac),
        "translate-y": sign * int(32 * frac),
        "posterize": round(8 - 6 * frac),
        "solarize": 255 * (1 - frac),
    }.get(name, 0.0)


# Pairs of operations, each as name, probability and strength from 0 to 9: what the search found.
_IMAGENET = """
posterize .4 8 rotate .6 9 | solarize .6 5 autocontrast .6 0 | equalize .8 0 equalize .6 0
posterize .6 7 posterize .6 6 | equalize .4 0 solarize .2 4 | equalize .4 0 rotate .8 8
solarize .6 3 equalize .6 0 | posterize .8 5 equalize 1 0 | rotate .2 3 solarize .6 8
equalize .6 0 posterize .4 6 | rotate .8 8 color .4 0 | rotate .4 9 equalize .6 0
equalize 0 0 equalize .8 0 | invert .6 0 equalize 1 0 | color .6 4 contrast 1 8
rotate .8 8 color 1 2 | color .8 8 solarize .8 7 | sharpness .4 7 invert .6 0
shear-x .6 5 equalize 1 0 | color .4 0 equalize .6 0 | equalize .4 0 solarize .2 4
solarize .6 5 autocontrast .6 0 | invert .6 0 equalize 1 0 | color .6 4 contrast 1 8
equalize .8 0 equalize .6 0
"""
_CIFAR10 = """
invert .1 0 contrast .2 6 | rotate .7 2 translate-x .3 9 | sharpness .8 1 sharpness .9 3
shear-y .5 8 translate-y .7 9 | autocontrast .5 0 equalize .9 0 | shear-y .2 7 posterize .3 7
color .4 3 brightness .6 7 | sharpness .3 9 brightness .7 9 | equalize .6 0 equalize .5 0
contrast .6 7 sharpness .6 5 | color .7 7 translate-x .5 8 | equalize .3 0 autocontrast .4 0
translate-y .4 3 sharpness .2 6 | brightness .9 6 color .2 8 | solarize .5 2 invert 0 0
equalize .2 0 autocontrast .6 0 | equalize .2 0 equalize .6 0 | color .9 9 equalize .6 0
autocontrast .8 0 solarize .2 8 | brightness .1 3 color .7 0 | solarize .4 5 autocontrast .9 0
translate-y .9 9 translate-y .7 9 | autocontrast .9 0 solarize .8 3 | equalize .8 0 invert .1 0
translate-y .7 9 autocontrast .9 0
"""

Choice = tuple[str, float, int]


def _parsed(text: str) -> list[tuple[Choice, Choice]]:
    pairs = []
    for pair in text.strip().replace("\n", "|").split("|"):
        a, a_prob, a_level, b, b_prob, b_level = pair.split()
        pairs.append(((a, float(a_prob), int(a_level)), (b, float(b_prob), int(b_level))))
    return pairs


IMAGENET_POLICY, CIFAR10_POLICY = _parsed(_IMAGENET), _parsed(_CIFAR10)


def _auto_augment(rng: np.random.Generator, width_px: int, height_px: int) -> list[Op]:
    """Return one of 25 pairs of operations; each of the two has its own probability.

    Source: Cubuk et al. 2018, arXiv:1805.09501, tables 7 and 9; strengths as in torchvision.
    """
    policy = CIFAR10_POLICY if max(width_px, height_px) <= SMALL_PX else IMAGENET_POLICY
    pair = policy[rng.integers(0, len(policy))]
    chances = rng.random(2)
    signs = rng.choice([-1.0, 1.0], 2)
    return [
        (name, _auto_value(name, level / 9, sign, width_px, height_px))
        for (name, prob, level), chance, sign in zip(pair, chances, signs.tolist(), strict=True)
        if chance < prob
    ]


def _auto_value(name: str, frac: float, sign: float, width_px: int, height_px: int) -> float:
    if name in _ENHANCERS:
        return 1 + sign * 0.9 * frac
    return {
        "rotate": sign * 30 * frac,
        "shear-x": sign * 0.3 * frac,
        "shear-y": sign * 0.3 * frac,
        "translate-x": sign * int(150 / 331 * width_px * frac),
        "translate-y": sign * int(150 / 331 * height_px * frac),
        "posterize": round(8 - 4 * frac),
        "solarize": 255 * (1 - frac),
    }.get(name, 0.0)


def _three_augment(rng: np.random.Generator) -> Op:
    """Return grey, inverted highlights or a blur, each as likely as the others.

    Source: Touvron et al. 2022 (DeiT III), arXiv:2204.07118.
    """
    kind = int(rng.integers(0, 3))
    radius = float(rng.uniform(0.1, 2.0))
    return (("grayscale", 0.0), ("solarize", 128.0), ("blur", radius))[kind]

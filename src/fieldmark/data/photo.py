"""What changes one photo before it joins a batch: a resized crop, a flip, a distortion, colours.

In this order, as in timm: crop, flip, rotation and distortion, size, chosen operations, colours.
Erasing and mixing follow on the whole batch (augment.py). Equal to torchvision's transforms of the
same names, given the same random numbers.
"""

import math

import numpy as np
import torch
from PIL import Image, ImageEnhance

from fieldmark.config import AugmentConfig
from fieldmark.data.images import Images, prepare, upright
from fieldmark.data.ops import apply_op, draw_ops
from fieldmark.data.sizes import Size
from fieldmark.data.warp import draw_angles, draw_shifts, warp
from fieldmark.preprocess import Pixels, Preprocess

_RATIOS = (3 / 4, 4 / 3)  # width over height of a resized crop
_TRIES = 10
_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)

Box = tuple[int, int, int, int]  # left, top, right, bottom


def train_pixels(
    images: Images,
    index: int,
    preprocess: Preprocess,
    config: AugmentConfig,
    rng: np.random.Generator,
    *,
    is_flipped: bool | None,
    size: Size | None = None,
) -> Pixels:
    """Return one image as training sees it, uint8 (H, W, 3).

    Without a resized crop it is prepared as for evaluation, then padded and cropped at random, so
    that a run gets the same kind of input whether its images are held in memory or read.

    Args:
        is_flipped: whether to mirror the image; None draws it, if the configuration asks for it.
        size: (height, width) of the result; default: that of `preprocess`.

    Raises:
        ImageError: the image cannot be read or decoded.
    """
    full = preprocess.height_px, preprocess.width_px
    size = size or full
    if config.resized_crop:
        at_size = preprocess.model_copy(update={"height_px": size[0], "width_px": size[1]})
        image = resized_crop(upright(images, index, preprocess), at_size, config, rng)
    else:
        pixels = prepare(images, index, preprocess)
        if config.crop_pad_px:
            pixels = padded_crop(pixels, config.crop_pad_px, config.crop_pad_mode, rng)
        image = Image.fromarray(pixels)
    if is_flipped is None:
        is_flipped = config.flip == "random" and bool(rng.random() < 0.5)
    if is_flipped:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if config.rotation_deg or config.elastic_px:
        image = distort(image, config, rng, min(image.size) / min(full))
    if image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    if config.ops != "none":
        image = change(image, preprocess, config, rng)
    if config.color_jitter:
        image = jitter_colors(image, config.color_jitter, rng)
    return np.array(image, dtype=np.uint8)


def distort(
    image: Image.Image, config: AugmentConfig, rng: np.random.Generator, scale: float
) -> Image.Image:
    """Return the image rotated and distorted.

    Args:
        scale: the image's size over the one that augment.elastic_px is of.
    """
    angle = draw_angles(rng, 1, config.rotation_deg) if config.rotation_deg else None
    shifts = draw_shifts(rng, 1) if config.elastic_px else None
    pixels_BHWC = torch.from_numpy(np.array(image, dtype=np.uint8))[None]
    elastic_px, mode = config.elastic_px * scale, config.crop_pad_mode
    warped = warp(pixels_BHWC, angle, shifts, elastic_px=elastic_px, mode=mode)
    return Image.fromarray(warped[0].numpy())


def change(
    image: Image.Image, preprocess: Preprocess, config: AugmentConfig, rng: np.random.Generator
) -> Image.Image:
    """Return the image after the operations that augment.ops draws for it.

    What comes into view from outside is filled with the data's mean, as in timm. Pixels are looked
    up with the interpolation of `preprocess`, or bicubic in place of lanczos, which cannot.
    """
    red, green, blue = (min(255, round(255 * value)) for value in preprocess.mean)
    name = "BICUBIC" if preprocess.interpolation == "lanczos" else preprocess.interpolation.upper()
    for op in draw_ops(config, rng, *image.size):
        image = apply_op(image, op, fill=(red, green, blue), resample=Image.Resampling[name])
    return image


def resized_crop(
    image: Image.Image, preprocess: Preprocess, config: AugmentConfig, rng: np.random.Generator
) -> Image.Image:
    """Return a random part of the image, at the size the model takes."""
    box = resized_crop_box(*image.size, rng, config.resized_crop_min_area_frac)
    # Cropped before it is resized: `resize(box=...)` would let pixels outside of the box bleed in.
    return image.crop(box).resize(
        (preprocess.width_px, preprocess.height_px),
        Image.Resampling[preprocess.interpolation.upper()],
    )


def resized_crop_box(
    width: int, height: int, rng: np.random.Generator, min_area_frac: float
) -> Box:
    """Return the box of a random crop: an area of at least `min_area_frac`, sides within 3:4.

    After ten draws that do not fit, the largest central box whose ratio is allowed.

    Source: Szegedy et al. 2014, arXiv:1409.4842, section 6; as torchvision's RandomResizedCrop.
    """
    for _ in range(_TRIES):
        area = width * height * rng.uniform(min_area_frac, 1.0)
        ratio = math.exp(rng.uniform(math.log(_RATIOS[0]), math.log(_RATIOS[1])))
        crop_width = round(math.sqrt(area * ratio))
        crop_height = round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            top = int(rng.integers(0, height - crop_height + 1))
            left = int(rng.integers(0, width - crop_width + 1))
            return left, top, left + crop_width, top + crop_height
    crop_width, crop_height = width, height
    if width / height < _RATIOS[0]:
        crop_height = round(width / _RATIOS[0])
    elif width / height > _RATIOS[1]:
        crop_width = round(height * _RATIOS[1])
    top, left = (height - crop_height) // 2, (width - crop_width) // 2
    return left, top, left + crop_width, top + crop_height


def padded_crop(pixels: Pixels, pad_px: int, mode: str, rng: np.random.Generator) -> Pixels:
    """Return the image padded on each side (zero or reflect) and cut to its size at random."""
    height, width, _ = pixels.shape
    top, left = rng.integers(0, 2 * pad_px + 1, 2)
    around = ((pad_px, pad_px), (pad_px, pad_px), (0, 0))
    padded = np.pad(pixels, around, mode="constant" if mode == "zero" else "reflect")
    return padded[top : top + height, left : left + width]


def jitter_colors(image: Image.Image, strength: float, rng: np.random.Generator) -> Image.Image:
    """Return the image with brightness, contrast and saturation changed, in a random order.

    Each is multiplied by its own factor from 1 - strength to 1 + strength.
    """
    factors = rng.uniform(1 - strength, 1 + strength, len(_ENHANCERS))
    for index in rng.permutation(len(_ENHANCERS)):
        image = _ENHANCERS[index](image).enhance(float(factors[index]))
    return image

"""What changes one photo before it joins a batch: a resized crop, a flip, colours.

Equal to torchvision's transforms of the same names, given the same random numbers.
"""

import math

import numpy as np
from PIL import Image, ImageEnhance

from fieldmark.config import AugmentConfig
from fieldmark.data.images import Images, prepare, upright
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
) -> Pixels:
    """Return one image as training sees it, uint8 (H, W, 3).

    Without a resized crop it is prepared as for evaluation, then padded and cropped at random, so
    that a run gets the same kind of input whether its images are held in memory or read.

    Args:
        is_flipped: whether to mirror the image; None draws it, if the configuration asks for it.

    Raises:
        ImageError: the image cannot be read or decoded.
    """
    if config.resized_crop:
        image = resized_crop(upright(images, index, preprocess), preprocess, config, rng)
    else:
        pixels = prepare(images, index, preprocess)
        if config.crop_pad_px:
            pixels = padded_crop(pixels, config.crop_pad_px, config.crop_pad_mode, rng)
        image = Image.fromarray(pixels)
    if is_flipped is None:
        is_flipped = config.flip == "random" and bool(rng.random() < 0.5)
    if is_flipped:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if config.color_jitter:
        image = jitter_colors(image, config.color_jitter, rng)
    return np.array(image, dtype=np.uint8)


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

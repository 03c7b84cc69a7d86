"""Rectangles of a normalised batch that are replaced by the mean, or by noise.

Shapes: B images, H rows, W columns, C = 3 channels last (NHWC).
"""

import math

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fieldmark.data.transfer import to_device

MIN_AREA_FRAC, MAX_AREA_FRAC = 0.02, 1 / 3
MIN_RATIO, MAX_RATIO = 0.3, 3.3  # height over width
_TRIES = 10

Boxes = npt.NDArray[np.int64]
"""(B, 4): top, left, height, width."""


def draw_erase_boxes(
    rng: np.random.Generator, count: int, prob: float, height_px: int, width_px: int
) -> Boxes:
    """Return each image's rectangle; one of no size for images that are not erased.

    Source: Zhong et al. 2017, arXiv:1708.04896, with its areas and ratios; drawn as torchvision's
    RandomErasing does.
    """
    is_erased = rng.random(count) < prob
    areas = rng.uniform(MIN_AREA_FRAC, MAX_AREA_FRAC, (count, _TRIES)) * height_px * width_px
    log_ratios = rng.uniform(math.log(MIN_RATIO), math.log(MAX_RATIO), (count, _TRIES))
    place = rng.random((count, 2))
    heights = np.rint(np.sqrt(areas * np.exp(log_ratios))).astype(np.int64)
    widths = np.rint(np.sqrt(areas / np.exp(log_ratios))).astype(np.int64)
    fits = (heights < height_px) & (widths < width_px) & (heights > 0) & (widths > 0)
    first = np.argmax(fits, axis=1)
    each = np.arange(count)
    is_erased &= fits[each, first]
    height = heights[each, first] * is_erased
    width = widths[each, first] * is_erased
    top = np.floor(place[:, 0] * (height_px - height + 1)).astype(np.int64)
    left = np.floor(place[:, 1] * (width_px - width + 1)).astype(np.int64)
    return np.stack([top, left, height, width], axis=1)


def inside_boxes(boxes_B4: Boxes, height_px: int, width_px: int) -> npt.NDArray[np.bool_]:
    """Return (B, H, W): whether a pixel is in its image's rectangle."""
    top, left, height, width = (boxes_B4[:, index, None] for index in range(4))
    y_H, x_W = np.arange(height_px), np.arange(width_px)
    inside_BH = (y_H >= top) & (y_H < top + height)
    inside_BW = (x_W >= left) & (x_W < left + width)
    return inside_BH[:, :, None] & inside_BW[:, None, :]


def erase(x_BHWC: Tensor, boxes_B4: Boxes, noise_rng: np.random.Generator | None) -> None:
    """Replace each image's rectangle in place: by 0, the data's mean, or by normal noise.

    Args:
        x_BHWC: normalised, contiguous.
        noise_rng: draws a value for each pixel and channel; None for 0.
    """
    _, H, W, C = x_BHWC.shape
    which = np.flatnonzero(boxes_B4[:, 2])
    image, y, x = np.nonzero(inside_boxes(boxes_B4[which], H, W))
    # As positions and not as a mask: a GPU would have to count a mask's pixels before it goes on.
    place = to_device((which[image] * H + y) * W + x, x_BHWC.device)
    pixels = x_BHWC.view(-1, C)
    if noise_rng is None:
        pixels.index_fill_(0, place, 0.0)
    else:
        noise = noise_rng.standard_normal((len(place), C), dtype=np.float32)
        pixels.index_copy_(0, place, to_device(noise, x_BHWC.device))

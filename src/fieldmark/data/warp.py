"""Rotations and smooth distortions of a batch: each pixel is looked up elsewhere, once.

Shapes: B images, H rows, W columns, C channels last, G control points along a side.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from fieldmark.data.transfer import to_device
from fieldmark.errors import ConfigError

CONTROL_POINTS = 4  # along each side
FOLDING_FRAC = 1 / 8  # of the short side: larger shifts fold the image over itself

Angles = npt.NDArray[np.float32]
Shifts = npt.NDArray[np.float32]


def draw_angles(rng: np.random.Generator, count: int, most_deg: float) -> Angles:
    """Return (count,) angles in degrees, uniform up to `most_deg` either way."""
    return rng.uniform(-most_deg, most_deg, count).astype(np.float32)


def draw_shifts(rng: np.random.Generator, count: int) -> Shifts:
    """Return (count, 2, G, G) normal shifts of control points: along x, then along y."""
    shape = (count, 2, CONTROL_POINTS, CONTROL_POINTS)
    return rng.standard_normal(shape, dtype=np.float32)


def check_elastic(elastic_px: float, height_px: int, width_px: int) -> None:
    """Raise ConfigError for shifts that would tear the image apart."""
    most = FOLDING_FRAC * min(height_px, width_px)
    if elastic_px > most:
        raise ConfigError(
            f"augment.elastic_px must be at most {most:g}, an eighth of the image's side, so that "
            f"it does not fold over itself. Got {elastic_px:g}. Lower it."
        )


def warp(
    images_BHWC: Tensor,
    angle_deg_B: Angles | None,
    shifts_B2GG: Shifts | None,
    *,
    elastic_px: float,
    mode: str,
) -> Tensor:
    """Return uint8 images rotated about their centre and distorted, in one bilinear look-up.

    Args:
        angle_deg_B: counter-clockwise.
        shifts_B2GG: of control points, in units of `elastic_px`; between them a bicubic surface.
            A pixel's shift then has a root mean square of `elastic_px`, over pixels and draws.
        mode: what lies outside of the image: "zero" is black, "reflect" mirrors at the edge.

    Source: Simard et al. 2003, "Best practices for convolutional neural networks"; on a coarse
    grid as Ronneberger et al. 2015, arXiv:1505.04597, section 3.1.
    """
    B, H, W, _ = images_BHWC.shape
    device = images_BHWC.device
    y_H = torch.arange(H, device=device, dtype=torch.float32) - (H - 1) / 2
    x_W = torch.arange(W, device=device, dtype=torch.float32) - (W - 1) / 2
    x_BHW, y_BHW = x_W.expand(B, H, W), y_H[:, None].expand(B, H, W)
    if angle_deg_B is not None:
        angle = to_device(np.deg2rad(angle_deg_B), device)[:, None, None]
        cos, sin = angle.cos(), angle.sin()
        x_BHW, y_BHW = cos * x_BHW - sin * y_BHW, sin * x_BHW + cos * y_BHW
    if shifts_B2GG is not None:
        shifts = _surface(to_device(shifts_B2GG, device), (H, W)) * elastic_px
        x_BHW, y_BHW = x_BHW + shifts[:, 0], y_BHW + shifts[:, 1]
    # From pixels about the centre to -1 .. 1 from edge to edge.
    grid = torch.stack([x_BHW * (2 / W), y_BHW * (2 / H)], dim=-1)
    warped = F.grid_sample(
        images_BHWC.permute(0, 3, 1, 2).float(),
        grid,
        mode="bilinear",
        padding_mode="zeros" if mode == "zero" else "reflection",
        align_corners=False,
    )
    return warped.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _surface(shifts_B2GG: Tensor, size: Sequence[int]) -> Tensor:
    """Return (B, 2, H, W): the control points' shifts, interpolated to a mean square of 1."""
    height, width = size
    surface = F.interpolate(shifts_B2GG, (height, width), mode="bicubic", align_corners=True)
    return surface / _root_mean_square(height, width)


@lru_cache(maxsize=64)
def _root_mean_square(height: int, width: int) -> float:
    """Of an interpolated surface of independent standard normal control points."""
    count = CONTROL_POINTS**2
    each = torch.eye(count).view(1, count, CONTROL_POINTS, CONTROL_POINTS)
    weights = F.interpolate(each, (height, width), mode="bicubic", align_corners=True)
    return float(weights.square().sum(dim=1).mean().sqrt())

"""What changes a batch before the network sees it: per image, vectorised, on the batch's device.

In this order, as in timm: crop, flip, rotation and distortion, size, normalisation, a part cut out
or erased, and mixing. Colours come between size and normalisation, and only where images are read
from files (photo.py).

Shapes: B images, H rows, W columns, C = 3 channels last (NHWC), K classes. uint8 comes in; float32
goes out as NCHW. NHWC inside, because a crop then copies whole pixels and channels_last is free.

No function here draws from a global generator. `Draws` holds all random numbers of one batch, save
erasing's noise; they are drawn by numpy on the CPU, so that a GPU sees the same crops as a CPU, and
are functions of the seed they were drawn from alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from fieldmark.config import AugmentConfig
from fieldmark.data.erase import Boxes, draw_erase_boxes, erase
from fieldmark.data.labelled import Labels
from fieldmark.data.mixing import Share, cut_mix, draw_mix, mix_up
from fieldmark.data.mixing import draw_mixup as draw_mixup
from fieldmark.data.order import mix64
from fieldmark.data.sizes import Size, check_sizes, resize, scaled_px
from fieldmark.data.transfer import to_device
from fieldmark.data.warp import (
    Angles,
    Shifts,
    check_elastic,
    draw_angles,
    draw_shifts,
    warp,
)
from fieldmark.errors import ConfigError
from fieldmark.runtime.seed import derive_seed

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Draws:
    """The random numbers of B images; a field is None where the configuration needs none."""

    crop_yx: Labels | None = None  # (B, 2): top left corner in the padded image
    is_flipped: Flags | None = None  # (B,)
    angle_deg: Angles | None = None  # (B,)
    shifts: Shifts | None = None  # (B, 2, G, G): of control points, in units of elastic_px
    cutout_yx: Labels | None = None  # (B, 2): top left corner in the image
    erase_boxes: Boxes | None = None  # (B, 4)
    mix_share: Share | None = None  # (B,): the share an image keeps
    mix_partner: Labels | None = None  # (B,): position in the micro-batch
    mix_boxes: Boxes | None = None  # (B, 4): what cutmix takes from the partner
    noise_seed: int = 0  # of what fills erased parts

    def part(self, positions: slice, noise_seed: int) -> "Draws":
        """Return the draws of a micro-batch."""
        taken: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                taken[field.name] = value[positions]
        return replace(self, noise_seed=noise_seed, **taken)


def generator(*parts: int | str) -> np.random.Generator:
    """Return a generator that is a function of `parts`, such as ("batch", seed, epoch, step)."""
    return np.random.Generator(np.random.PCG64(derive_seed(*parts)))


def check_augment(config: AugmentConfig, height_px: int, width_px: int) -> None:
    """Raise ConfigError if the augmentation does not fit images of this size."""
    side = min(height_px, width_px)
    if config.cutout_px > side:
        raise ConfigError(
            f"augment.cutout_px must be at most the image's {side} px. Got {config.cutout_px}. "
            "Lower it."
        )
    if config.crop_pad_mode == "reflect" and config.crop_pad_px >= side:
        raise ConfigError(
            f"augment.crop_pad_px must be below the image's {side} px to reflect. Got "
            f"{config.crop_pad_px}. Lower it, or set augment.crop_pad_mode=zero."
        )
    check_elastic(config.elastic_px, height_px, width_px)
    check_sizes(config.sizes, height_px, width_px)


def draw(
    config: AugmentConfig,
    rng: np.random.Generator,
    indices: Labels,
    height_px: int,
    width_px: int,
    *,
    seed: int,
    epoch: int,
    step: int = 0,
    copies: Labels | int = 0,
    size: Size | None = None,
    num_parts: int = 1,
) -> Draws:
    """Return the draws of an update.

    Args:
        indices: each image's position in the training split; alternating flips depend on it.
        seed: of the run: alternating flips are the same in each even epoch.
        copies: which copy of its image each is; alternating flips alternate over them.
        size: (height, width) that the images are brought to; default: as they are.
        num_parts: micro-batches, within which images are mixed.
    """
    count, full = len(indices), (height_px, width_px)
    size = size or full
    crop = flip = angle = shifts = cutout = boxes = None
    if config.crop_pad_px:
        crop = rng.integers(0, 2 * config.crop_pad_px + 1, (count, 2))
    if config.flip == "random":
        flip = rng.random(count) < 0.5
    elif config.flip == "alternating":
        flip = alternating_flips(seed, indices, epoch + copies)
    if config.rotation_deg:
        angle = draw_angles(rng, count, config.rotation_deg)
    if config.elastic_px:
        shifts = draw_shifts(rng, count)
    if config.cutout_px:
        cutout_px = scaled_px(config.cutout_px, size, full)
        cutout = rng.integers(0, [size[0] - cutout_px + 1, size[1] - cutout_px + 1], (count, 2))
    if config.erase_prob:
        boxes = draw_erase_boxes(rng, count, config.erase_prob, *size)
    mixed = draw_mix(config, rng, count, *size, seed=seed, step=step, num_parts=num_parts)
    return Draws(crop, flip, angle, shifts, cutout, boxes, *mixed)


def noise_seed(seed: int, epoch: int, step: int, part: int) -> int:
    """Return the seed of the noise that fills the erased parts of a micro-batch."""
    return derive_seed("erase", seed, epoch, step, part)


def alternating_flips(seed: int, indices: Labels, epoch: Labels | int) -> Flags:
    """Return which images are mirrored: half of them in even epochs, the other half in odd ones.

    So each image is seen both ways in any two consecutive epochs. Which half an image is in is a
    hash of the seed and its index.

    Source: Jordan 2024, arXiv:2404.00498, section 3.6; the mixing constants are splitmix64's.
    """
    # The products wrap at 64 bits, as they are meant to.
    mixed = indices.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = mix64(mixed + np.uint64(derive_seed("flip", seed)))
    is_first_half = (mixed >> np.uint64(63)).astype(np.bool_)
    return is_first_half ^ (np.asarray(epoch) % 2).astype(np.bool_)


def apply(
    config: AugmentConfig,
    images_BHWC: Tensor,
    labels_B: Tensor,
    draws: Draws,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    num_classes: int,
    size: Size | None = None,
    full: Size | None = None,
) -> tuple[Tensor, Tensor]:
    """Return float32 images (B, 3, H, W), and labels (B,) or, where images are mixed, (B, K).

    The images are channels_last in memory. `images_BHWC` is uint8 and is not changed.

    Args:
        size: (height, width) to bring the images to; default: as they are.
        full: (height, width) that augment.cutout_px is of; default: that of `images_BHWC`.
    """
    full = full or (images_BHWC.shape[1], images_BHWC.shape[2])
    if draws.crop_yx is not None or draws.is_flipped is not None:
        images_BHWC = crop_and_flip(
            images_BHWC,
            draws.crop_yx,
            draws.is_flipped,
            pad_px=config.crop_pad_px if draws.crop_yx is not None else 0,
            mode=config.crop_pad_mode,
        )
    if draws.angle_deg is not None or draws.shifts is not None:
        images_BHWC = warp(
            images_BHWC,
            draws.angle_deg,
            draws.shifts,
            elastic_px=config.elastic_px,
            mode=config.crop_pad_mode,
        )
    if size is not None and size != (images_BHWC.shape[1], images_BHWC.shape[2]):
        images_BHWC = resize(images_BHWC, size)
    x_BHWC = normalise(images_BHWC, mean, std)
    if draws.cutout_yx is not None:
        here = (x_BHWC.shape[1], x_BHWC.shape[2])
        cut_out(x_BHWC, draws.cutout_yx, scaled_px(config.cutout_px, here, full))
    if draws.erase_boxes is not None:
        is_noise = config.erase_mode == "pixel"
        rng = np.random.Generator(np.random.PCG64(draws.noise_seed)) if is_noise else None
        erase(x_BHWC, draws.erase_boxes, rng)
    targets = labels_B
    if draws.mix_share is not None and draws.mix_partner is not None:
        shares, partners, boxes = draws.mix_share, draws.mix_partner, draws.mix_boxes
        if boxes is None:
            x_BHWC, targets = mix_up(x_BHWC, labels_B, shares, partners, num_classes)
        else:
            x_BHWC, targets = cut_mix(x_BHWC, labels_B, shares, partners, boxes, num_classes)
    return x_BHWC.permute(0, 3, 1, 2), targets


def crop_and_flip(
    images_BHWC: Tensor,
    crop_yx_B2: Labels | None,
    flip_B: Flags | None,
    *,
    pad_px: int,
    mode: str,
) -> Tensor:
    """Return each image padded by `pad_px`, cut to its old size at its own place, and mirrored.

    One gather does both, which is cheaper than indexing by image, row and column, and than
    cropping first and mirroring after it.

    Args:
        mode: "zero" pads with black as torchvision's RandomCrop does, "reflect" mirrors at the
            edge without repeating it.
    """
    B, H, W, C = images_BHWC.shape
    device = images_BHWC.device
    y_BH = torch.arange(H, device=device).repeat(B, 1)
    x_BW = torch.arange(W, device=device).repeat(B, 1)
    if flip_B is not None:
        flip = to_device(flip_B, device)
        x_BW = torch.where(flip[:, None], W - 1 - x_BW, x_BW)
    if crop_yx_B2 is not None:
        corner = to_device(crop_yx_B2, device)
        y_BH, x_BW = y_BH + corner[:, :1], x_BW + corner[:, 1:]
    if mode == "reflect":
        y_BH, x_BW = _reflect(y_BH - pad_px, H), _reflect(x_BW - pad_px, W)
    elif pad_px:
        images_BHWC = F.pad(images_BHWC, (0, 0, pad_px, pad_px, pad_px, pad_px))
    rows, columns = images_BHWC.shape[1:3]
    first_B = torch.arange(B, device=device)[:, None] * rows
    pixel_BHW = (first_B + y_BH)[:, :, None] * columns + x_BW[:, None, :]
    flat = images_BHWC.reshape(-1, C).index_select(0, pixel_BHW.view(-1))
    return flat.view(B, H, W, C)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Mirror positions outside of 0 .. size - 1 back into it."""
    return (size - 1) - ((size - 1) - index.abs()).abs()


def normalise(images_BHWC: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return (image / 255 - mean) / std per channel, float32; images that are float are changed."""
    B, H, W, C = images_BHWC.shape
    mean_C = torch.tensor(mean, dtype=torch.float64)
    std_C = torch.tensor(std, dtype=torch.float64)
    # One multiply and add per element over rows of W * C: on a CPU much cheaper than
    # broadcasting over a last dimension of 3.
    scale = to_device((1 / (255 * std_C)).float().repeat(W), images_BHWC.device)
    shift = to_device((-mean_C / std_C).float().repeat(W), images_BHWC.device)
    rows = images_BHWC.reshape(B, H, W * C).float()
    return rows.mul_(scale).add_(shift).view(B, H, W, C)


def cut_out(x_BHWC: Tensor, corner_yx_B2: Labels, size_px: int) -> None:
    """Set a square of each normalised image to 0, the data's mean, in place.

    Source: DeVries and Taylor 2017, arXiv:1708.04552; here the square lies wholly inside.
    """
    _, H, W, _ = x_BHWC.shape
    corner = to_device(corner_yx_B2, x_BHWC.device)
    y_BH = torch.arange(H, device=x_BHWC.device) - corner[:, :1]
    x_BW = torch.arange(W, device=x_BHWC.device) - corner[:, 1:]
    inside_BH = (y_BH >= 0) & (y_BH < size_px)
    inside_BW = (x_BW >= 0) & (x_BW < size_px)
    x_BHWC.masked_fill_((inside_BH[:, :, None] & inside_BW[:, None, :])[..., None], 0.0)

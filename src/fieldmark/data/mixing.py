"""Images mixed with another of their micro-batch, and their labels with its label.

Shapes: B images, H rows, W columns, C = 3 channels last (NHWC), K classes.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from fieldmark.config import AugmentConfig
from fieldmark.data.erase import Boxes, inside_boxes
from fieldmark.data.labelled import Labels
from fieldmark.data.transfer import to_device
from fieldmark.runtime.seed import derive_seed

Share = npt.NDArray[np.float32]


class Mix(NamedTuple):
    """How each of B images is mixed; all None where images never are.

    An update that is left out of mixing keeps all of each image.
    """

    share: Share | None  # (B,): what an image keeps of itself, 0 to 1
    partner: Labels | None  # (B,): position in the micro-batch
    boxes: Boxes | None  # (B, 4), of cutmix: what comes from the partner


def is_mixing(config: AugmentConfig) -> bool:
    """Return whether targets are soft: in every update then, mixed or not."""
    return bool((config.mixup_alpha or config.cutmix_alpha) and config.mix_prob)


def draw_mix(
    config: AugmentConfig,
    rng: np.random.Generator,
    count: int,
    height_px: int,
    width_px: int,
    *,
    seed: int,
    step: int,
    num_parts: int = 1,
) -> Mix:
    """Return how `count` images are mixed, each with one of its own micro-batch.

    Whether an update is mixed at all, and by which of the two, is drawn once for the update. Then
    each image has its own share. Partners are drawn within each of the `num_parts` micro-batches,
    because a rank of several holds no others; each micro-batch is permuted.
    """
    if not is_mixing(config):
        return Mix(None, None, None)
    kind = _draw_kind(config, seed, step)
    if kind == "none":
        itself = np.arange(count) % (count // num_parts)
        return Mix(np.ones(count, dtype=np.float32), itself, None)
    alpha = config.mixup_alpha if kind == "mixup" else config.cutmix_alpha
    share, partner = draw_mixup(alpha, rng, count // num_parts, num_parts)
    if kind == "mixup":
        return Mix(share, partner, None)
    boxes = draw_cutmix_boxes(share, rng, height_px, width_px)
    area = boxes[:, 2] * boxes[:, 3] / (height_px * width_px)
    return Mix((1 - area).astype(np.float32), partner, boxes)


def _draw_kind(config: AugmentConfig, seed: int, step: int) -> str:
    """Return "none", "mixup" or "cutmix" for an update."""
    seed = derive_seed("kind of mix", seed, step)
    is_mixed, is_cutmix = np.random.Generator(np.random.PCG64(seed)).random(2)
    if is_mixed >= config.mix_prob:
        return "none"
    if not (config.mixup_alpha and config.cutmix_alpha):
        return "cutmix" if config.cutmix_alpha else "mixup"
    return "cutmix" if is_cutmix < config.cutmix_prob else "mixup"


def draw_mixup(
    alpha: float, rng: np.random.Generator, count: int, num_parts: int = 1
) -> tuple[Share, Labels]:
    """Return the share of `num_parts` times `count` images, and partners within each part.

    Shares are of Beta(alpha, alpha).
    """
    share = rng.beta(alpha, alpha, count * num_parts).astype(np.float32)
    return share, np.concatenate([rng.permutation(count) for _ in range(num_parts)])


def draw_cutmix_boxes(
    share_B: Share, rng: np.random.Generator, height_px: int, width_px: int
) -> Boxes:
    """Return rectangles in the image's proportion around a random pixel, cut at the edge.

    Before it is cut, a rectangle covers 1 - share of the image.

    Source: Yun et al. 2019, arXiv:1905.04899, section 3.1.
    """
    side = np.sqrt(1 - share_B.astype(np.float64))
    size = np.stack([side * height_px, side * width_px], axis=1).astype(np.int64)
    centre = rng.integers(0, [height_px, width_px], (len(share_B), 2))
    start = np.maximum(centre - size // 2, 0)
    end = np.minimum(centre + size // 2, [height_px, width_px])
    return np.concatenate([start, end - start], axis=1)


def cut_mix(
    x_BHWC: Tensor,
    labels_B: Tensor,
    share_B: Share,
    partner_B: Labels,
    boxes_B4: Boxes,
    num_classes: int,
) -> tuple[Tensor, Tensor]:
    """Return each image with its partner's pixels in a rectangle, and targets (B, K).

    Args:
        share_B: 1 - the rectangle's area over the image's.
    """
    _, H, W, _ = x_BHWC.shape
    partner = to_device(partner_B, x_BHWC.device)
    inside = to_device(inside_boxes(boxes_B4, H, W), x_BHWC.device)
    mixed = torch.where(inside[..., None], x_BHWC.index_select(0, partner), x_BHWC)
    return mixed, mixed_targets(labels_B, share_B, partner, num_classes)


def mix_up(
    x_BHWC: Tensor, labels_B: Tensor, share_B: Share, partner_B: Labels, num_classes: int
) -> tuple[Tensor, Tensor]:
    """Return each image blended with its partner, and targets (B, K) blended alike.

    Source: Zhang et al. 2017, arXiv:1710.09412; the share is drawn per image, not per batch.
    """
    share = to_device(share_B, x_BHWC.device)
    partner = to_device(partner_B, x_BHWC.device)
    mixed = torch.lerp(x_BHWC.index_select(0, partner), x_BHWC, share[:, None, None, None])
    return mixed, mixed_targets(labels_B, share_B, partner, num_classes)


def mixed_targets(labels_B: Tensor, share_B: Share, partner: Tensor, num_classes: int) -> Tensor:
    """Return (B, K): the share for an image's own class, the rest for its partner's."""
    share = to_device(share_B, labels_B.device)
    one_hot_BK = F.one_hot(labels_B, num_classes).float()
    return torch.lerp(one_hot_BK.index_select(0, partner), one_hot_BK, share[:, None])

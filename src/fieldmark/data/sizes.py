"""The size of training images, where it changes in the course of a run."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from fieldmark.errors import ConfigError

SMALLEST_PX = 8
LARGEST_FACTOR = 4  # times the size that evaluation uses

Size = tuple[int, int]  # height, width


def image_px_at(
    sizes: Sequence[tuple[float, int]], step: int, total_steps: int, default_px: int
) -> int:
    """Return the side in px of an update's images, a pure function of the update.

    Args:
        sizes: augment.sizes, [from this fraction of the run, px], rising from 0.
        step: from 0.
        default_px: without any sizes.
    """
    px = default_px
    for start, side in sizes:
        if step >= start * total_steps - 1e-6:  # 0.1 * 30 is above 3, but the third is meant
            px = side
    return px


def size_at(px: int | None, height_px: int, width_px: int) -> Size:
    """Return (height, width) whose short side is `px`, in the given proportion; None: as given."""
    short = min(height_px, width_px)
    if px is None or px == short:
        return height_px, width_px
    return round(height_px * px / short), round(width_px * px / short)


def scaled_px(length_px: int, size: Size, full: Size) -> int:
    """Return a length of images of size `full` in images of `size`; at least 1 px unless 0."""
    if size == full or not length_px:
        return length_px
    return max(1, round(length_px * min(size) / min(full)))


def check_sizes(sizes: Sequence[tuple[float, int]], height_px: int, width_px: int) -> None:
    """Raise ConfigError for a size that images of this size should not be brought to."""
    most = LARGEST_FACTOR * min(height_px, width_px)
    for _, px in sizes:
        if not SMALLEST_PX <= px <= most:
            raise ConfigError(
                f"augment.sizes must be from {SMALLEST_PX} px to {most} px, {LARGEST_FACTOR} times "
                f"the size of evaluation. Got {px}. Change it."
            )


def resize(images_BHWC: Tensor, size: Size) -> Tensor:
    """Return uint8 or float images (B, H, W, C) at (height, width), float32, values 0 to 255.

    Bilinear, and averaged over what an output pixel covers when it is made smaller. In float:
    there is no such kernel for uint8 on a GPU. Resizing before normalising is cheaper than after
    it, at 16, 24 and 48 px from 32 (10 %, 0 %, 10 %); the result is the same.
    """
    x_BCHW = images_BHWC.permute(0, 3, 1, 2).float()
    resized = F.interpolate(x_BCHW, size, mode="bilinear", antialias=True, align_corners=False)
    return resized.permute(0, 2, 3, 1).contiguous()

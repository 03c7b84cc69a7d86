"""What a training costs, counted: images and floating-point operations."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fieldmark.model import Freeze, set_train_mode

_IMAGES = 2  # one alone has no variance for a batch norm over 1x1 pixels


def flops_per_image(
    network: nn.Module, image_shape: Sequence[int], *, freeze: Freeze = "none"
) -> float:
    """Return the operations of a forward and a backward pass, for one image.

    A multiplication and an addition are two. Convolutions and matrix products are counted, as
    torch does; what is element by element, and the optimizer's step, are not. Nothing is computed:
    a copy of the network is traced without data.

    Args:
        image_shape: (3, H, W).
    """
    twin = copy.deepcopy(network).to("meta")
    set_train_mode(twin, freeze)
    images = torch.empty(_IMAGES, *image_shape, device="meta")
    with FlopCounterMode(display=False) as counter:
        logits: Tensor = twin(images)
        logits.sum().backward()
    return float(counter.get_total_flops()) / _IMAGES


def training_flops(
    network: nn.Module,
    sizes: Sequence[tuple[float, tuple[int, int]]],
    *,
    num_images: int,
    freeze: Freeze = "none",
) -> float:
    """Return the operations of a training that shows `num_images` in all.

    Args:
        sizes: [from this fraction of the training, (height, width)], rising from 0.
    """
    ends = [*(start for start, _ in sizes[1:]), 1.0]
    per_image = sum(
        (end - start) * flops_per_image(network, (3, *size), freeze=freeze)
        for (start, size), end in zip(sizes, ends, strict=True)
    )
    return per_image * num_images

"""The training loop of airbench94 with Muon, written out in plain torch: the race's rival.

Settings are the published ones (Jordan 2024, arXiv:2404.00498, and Jordan et al. 2024 on Muon):
updates of 2,000 images of 32 px in channels_last, whole updates at once; in float32, or with the
network in bfloat16 by torch's autocast. Images lie in memory, normalised, and are shifted and
mirrored as tensors, so that data cost next to nothing. The network is the airnet, with the
initialisation that the recipe gives it.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.model.airnet import AirNet

BATCH_SIZE = 2_000
EPOCHS = 8
UPDATES = EPOCHS * 50_000 // BATCH_SIZE
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
PAD_PX = 2
STEM_EPOCHS = 3
RATE, HEAD_RATE = 0.053, 0.67
DECAY = 2e-6 * BATCH_SIZE


def updates(
    images: np.ndarray, labels: np.ndarray, dtype: torch.dtype = torch.float32
) -> Iterator[int]:
    """Yield after each of the updates the number of images that it took.

    Args:
        images: uint8 (N, 32, 32, 3).
        labels: int64 (N,).
        dtype: in which the network computes; bfloat16 by autocast.
    """
    pixels = (torch.from_numpy(images) / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    pixels = pixels.permute(0, 3, 1, 2)
    targets = torch.from_numpy(labels).long()
    network = _network(pixels[:5_000])
    filters = [p for p in network.parameters() if p.ndim == 4 and p.requires_grad]
    momenta = [torch.zeros_like(p) for p in filters]
    sgd = _sgd_of_the_rest(network)
    num_batches = len(pixels) // BATCH_SIZE
    stem_updates = STEM_EPOCHS * num_batches
    mirrored = torch.rand(len(pixels)) < 0.5
    padded = F.pad(pixels, (PAD_PX,) * 4, mode="reflect")
    for step in range(UPDATES):
        place = step % num_batches
        if place == 0:
            order = torch.randperm(len(pixels))
            mirrored = ~mirrored
        chosen = order[place * BATCH_SIZE : (place + 1) * BATCH_SIZE]
        inputs = _shift_and_mirror(padded[chosen], mirrored[chosen])
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            logits = network(inputs.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(
            logits.float(), targets[chosen], label_smoothing=0.2, reduction="sum"
        )
        loss.backward()
        factor = 1 - step / UPDATES
        for group in sgd.param_groups:
            group["lr"] = group["first_lr"] * factor
        sgd.param_groups[0]["lr"] = RATE * max(0.0, 1 - step / stem_updates)
        sgd.step()
        _move_filters(filters, momenta, lr=0.24 * factor)
        network.zero_grad(set_to_none=True)
        network.whiten.bias.requires_grad_(step + 1 < stem_updates)
        yield len(chosen)


def _network(first: Tensor) -> AirNet:
    network = AirNet(head_scale=1 / 256, head_std=1.0, stem_bias="uniform")
    network.init_from_images(first)
    return network.to(memory_format=torch.channels_last).train()


def _sgd_of_the_rest(network: AirNet) -> torch.optim.Optimizer:
    """Return SGD of the stem's bias, the norms' biases and the head, in this order."""
    norms = [p for n, p in network.named_parameters() if "norm" in n and p.requires_grad]
    groups = [
        {"params": params, "lr": rate, "first_lr": rate, "weight_decay": DECAY / rate}
        for params, rate in (
            ([network.whiten.bias], RATE),
            (norms, RATE),
            (list(network.head.parameters()), HEAD_RATE),
        )
    ]
    return torch.optim.SGD(groups, momentum=0.85, nesterov=True)


def _shift_and_mirror(padded: Tensor, mirrored: Tensor) -> Tensor:
    """Return each image (B, 3, H, W) out of its padded one, at an offset of its own."""
    size = padded.shape[-1] - 2 * PAD_PX
    offsets = torch.randint(0, 2 * PAD_PX + 1, (len(padded), 2))
    shifted = padded.new_empty(len(padded), 3, size, size)
    for top in range(2 * PAD_PX + 1):
        for left in range(2 * PAD_PX + 1):
            here = (offsets == torch.tensor([top, left])).all(dim=1)
            shifted[here] = padded[here, :, top : top + size, left : left + size]
    return torch.where(mirrored[:, None, None, None], shifted.flip(3), shifted)


@torch.no_grad()
def _move_filters(filters: list[nn.Parameter], momenta: list[Tensor], lr: float) -> None:
    """Muon: move each filter by its orthogonalised momentum, at a Frobenius norm of its own."""
    for weight, momentum in zip(filters, momenta, strict=True):
        assert weight.grad is not None
        momentum.mul_(0.6).add_(weight.grad)
        direction = weight.grad.add(momentum, alpha=0.6)
        weight.mul_(len(weight) ** 0.5 / weight.norm())
        flat = direction.reshape(len(weight), -1)
        weight.add_(_orthogonalised(flat).view_as(weight), alpha=-lr)


def _orthogonalised(matrix: Tensor) -> Tensor:
    """Three Newton-Schulz iterations with Muon's coefficients."""
    is_tall = matrix.shape[0] > matrix.shape[1]
    found = matrix.T if is_tall else matrix
    found = found / (found.norm() + 1e-7)
    for _ in range(3):
        gram = found @ found.T
        found = 3.4445 * found + (-4.7750 * gram + 2.0315 * gram @ gram) @ found
    return found.T if is_tall else found

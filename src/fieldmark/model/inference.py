"""The module that is measured, exported and served: uint8 pixels in, logits out."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fieldmark.measure import Predict


class InferenceModule(nn.Module):
    """A network with its normalisation in front: uint8 (B, H, W, 3) -> float32 logits (B, K).

    The arithmetic is that of torchvision's ToTensor and Normalize, in their order.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.eval()

    def normalised(self, images: Tensor) -> Tensor:
        """Return the network's input, float32 (B, 3, H, W), of images uint8 (B, H, W, 3)."""
        x_BCHW = images.permute(0, 3, 1, 2).to(torch.float32) / 255.0
        return (x_BCHW - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, K), float32."""
        logits_BK: Tensor = self.network(self.normalised(images))
        return logits_BK.to(torch.float32)


def eager_predict(module: InferenceModule, device: torch.device | str = "cpu") -> Predict:
    """Return a Predict that runs `module` in eval mode on `device`, moving it there."""
    module = module.to(device).eval()

    @torch.inference_mode()
    def predict(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        # A copy, because torch warns of arrays it may not write to (slices of a memory map).
        batch = torch.from_numpy(np.array(images, copy=True)).to(device, non_blocking=True)
        module.eval()
        logits: npt.NDArray[np.float32] = module(batch).cpu().numpy()
        return logits

    return predict

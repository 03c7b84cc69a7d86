"""The model as its users load it: timm, torch in eager mode, its own transforms on Pillow."""

import io
import sys

import timm
import torch
from PIL import Image


class TorchModel:
    """timm's network and transforms; `where` is what timm.create_model takes."""

    def __init__(self, where: str) -> None:
        self.network = timm.create_model(where, pretrained=True).eval()
        config = timm.data.resolve_model_data_config(self.network)
        self.transform = timm.data.create_transform(**config, is_training=False)

    def decode(self, data: bytes) -> torch.Tensor:
        """Return the network's input, float32 (3, H, W)."""
        return self.transform(Image.open(io.BytesIO(data)).convert("RGB"))

    @torch.inference_mode()
    def predict(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits of (B, 3, H, W)."""
        return self.network(images)


def model_named() -> str:
    """Return the third argument: what timm.create_model takes."""
    return sys.argv[3]

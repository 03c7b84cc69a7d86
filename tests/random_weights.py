"""Stand-ins for pretrained weights: timm's folder format, without a download."""

import json
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file


def save_weights(folder: Path, name: str = "test_resnet", seed: int = 0) -> Path:
    """Write a network of random weights for 32 px images, with five unrelated classes."""
    torch.manual_seed(seed)
    network = timm.create_model(name, num_classes=5)
    folder.mkdir(exist_ok=True)
    save_file(network.state_dict(), folder / "model.safetensors")
    cfg = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.25] * 3, "crop_pct": 1.0}
    config = {"architecture": name, "num_classes": 5, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    return folder

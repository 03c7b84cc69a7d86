"""From a name to a network, with weights where they are given."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from fieldmark.errors import ModelError, UnknownName, suggestion


@dataclass(frozen=True, slots=True)
class Architecture:
    """What rebuilds a network: a name that timm (with our builders) knows, classes, arguments."""

    name: str
    num_classes: int
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Weights:
    """Where weights come from: a file or folder on this disk, or a tag of timm's."""

    num_classes: int
    path: Path | None = None
    tag: str = ""


def build(architecture: Architecture, weights: Weights | None = None) -> nn.Module:
    """Return the network; with weights of another number of classes the head is new.

    Raises:
        UnknownName: no such architecture.
        ModelError: an argument it does not take, or weights that do not fit.
    """
    name = architecture.name
    if not timm.is_model(name):
        raise UnknownName(f"model {name!r} does not exist.{suggestion(name, timm.list_models())}")
    options: dict[str, Any] = {"pretrained": False}
    if weights is not None:
        options["pretrained"] = True
        if weights.path is not None:
            options["pretrained_cfg_overlay"] = {
                "file": str(_weight_file(weights.path)),
                "num_classes": weights.num_classes,
                "custom_load": False,
            }
        elif weights.tag:
            name = f"{name}.{weights.tag}"
    logging.getLogger("timm").setLevel(logging.ERROR)
    try:
        network: nn.Module = timm.create_model(
            name, num_classes=architecture.num_classes, **options, **architecture.args
        )
    except TypeError as error:
        shown = ", ".join(f"{key}={value!r}" for key, value in architecture.args.items())
        raise ModelError(
            f"model.args must be arguments of {name}. Got {shown or 'none'}. {error}."
        ) from error
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        raise ModelError(_build_sentence(name, weights, error)) from error
    return network


def takes_img_size(name: str) -> bool:
    """Return whether the network is built for one input size, given as its argument img_size."""
    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return bool(cfg is not None and cfg.fixed_input_size)


def check_image_size(network: nn.Module, image_px: int) -> None:
    """Raise ModelError, naming the smallest size that works, if the size is too small."""
    problem = _forward_problem(network, image_px)
    if problem is None:
        return
    sizes = [*range(image_px + 1, 65), *range(72, 513, 8)]
    smallest = next((px for px in sizes if _forward_problem(network, px) is None), None)
    kind = type(network).__name__
    if smallest is None:
        raise ModelError(f"{kind} cannot take {image_px} px images: {problem}.")
    raise ModelError(
        f"{kind} is too deep for {image_px} px images. The smallest size that works is "
        f"{smallest} px. Set model.image_px={smallest}."
    )


def num_parameters(network: nn.Module) -> int:
    """Return the number of weights, trained or not; buffers are not counted."""
    return sum(p.numel() for p in network.parameters())


def _forward_problem(network: nn.Module, image_px: int) -> str | None:
    device = next(network.parameters()).device
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            network(torch.zeros(1, 3, image_px, image_px, device=device))
    except (RuntimeError, AssertionError, ValueError, IndexError) as error:
        return " ".join(str(error).split())[:160]
    finally:
        network.train(was_training)
    return None


def _weight_file(path: Path) -> Path:
    if path.is_file():
        return path
    for name in ("model.safetensors", "pytorch_model.bin", "model.pth"):
        if (path / name).is_file():
            return path / name
    found = sorted([*path.glob("*.safetensors"), *path.glob("*.pth"), *path.glob("*.bin")])
    if found:
        return found[0]
    raise ModelError(f"{path} must hold weights such as model.safetensors. Found none.")


def _build_sentence(name: str, weights: Weights | None, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300]
    if weights is None:
        return f"{name} cannot be built: {reason}."
    if weights.path is None:
        return (
            f"weights {weights.tag or 'default'!r} of {name} cannot be loaded: {reason}. "
            "Without a connection, give a folder: model.pretrained=local-dir:PATH."
        )
    return f"weights in {weights.path} do not fit {name}: {reason}."

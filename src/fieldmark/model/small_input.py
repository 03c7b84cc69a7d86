"""Stems for images of up to 64 px, where a stock ImageNet stem throws most of the image away.

ResNets and EfficientNets need another stem, which their arguments cannot express: they are built
under names of our own (`small_resnet18`), never under a stock name, which would open elsewhere
with the wrong stride. ViTs and ConvNeXts take a smaller patch as an argument and keep their name.
"""

from collections.abc import Callable
from typing import Any

import timm
from timm.models import register_model
from timm.models._builder import load_pretrained, resolve_pretrained_cfg
from timm.models._registry import _model_to_module
from torch import nn

from fieldmark.errors import ModelError
from fieldmark.model.build import Architecture

MAX_SMALL_PX = 64
PREFIX = "small_"
_STEM_FAMILIES = ("resnet", "efficientnet")
_PATCH_FAMILIES = ("vision_transformer", "deit", "convnext")


def adapt_architecture(
    architecture: Architecture, image_px: int, wanted: str
) -> tuple[Architecture, str]:
    """Return the architecture to build for inputs of `image_px`, and a sentence on what was done.

    Args:
        wanted: "auto" adapts up to 64 px where the family is known, "always" insists, "never".

    Raises:
        ModelError: `wanted` is "always" and the family is not one of those we can adapt.
    """
    name = architecture.name
    family = _model_to_module.get(name, "")
    if wanted == "never" or name == "airnet" or name.startswith(PREFIX):
        return architecture, ""
    if wanted == "auto" and image_px > MAX_SMALL_PX:
        return architecture, ""
    if family in _STEM_FAMILIES and PREFIX + name in timm.list_models(PREFIX + "*"):
        adapted = Architecture(PREFIX + name, architecture.num_classes, architecture.args)
        return adapted, f"{name} gets a stride-1 stem for {image_px} px inputs ({adapted.name})"
    if family in _PATCH_FAMILIES:
        args = _patch_args(family, image_px)
        adapted = Architecture(name, architecture.num_classes, {**args, **architecture.args})
        shown = ", ".join(f"{key}={value}" for key, value in args.items())
        return adapted, f"{name} is built with {shown} for {image_px} px inputs"
    if wanted == "always":
        raise ModelError(
            "model.small_input=always needs a ResNet, EfficientNet, ViT or ConvNeXt. "
            f"Got {name!r}. Set model.small_input=never."
        )
    return architecture, (
        f"{name} keeps its stock stem at {image_px} px: its family has no small-input form"
    )


def opens_in(name: str) -> str:
    """Return "timm" when plain timm knows the name, else "fieldmark"."""
    return "fieldmark" if name == "airnet" or name.startswith(PREFIX) else "timm"


def register_small_builders() -> None:
    """Register a `small_` builder with timm for each ResNet and EfficientNet."""
    for name in timm.list_models():
        if _model_to_module[name] in _STEM_FAMILIES and not name.startswith(PREFIX):
            register_model(_small_builder(name))


def _small_builder(stock: str) -> Callable[..., nn.Module]:
    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        given = kwargs.pop("pretrained_cfg", None)
        overlay = kwargs.pop("pretrained_cfg_overlay", None)
        # The stock configuration without its weights: those belong to the stock stem.
        stock_cfg = resolve_pretrained_cfg(stock).to_dict()
        for source in ("url", "file", "hf_hub_id", "tag"):
            stock_cfg.pop(source, None)
        cfg = resolve_pretrained_cfg(
            PREFIX + stock,
            pretrained_cfg={**stock_cfg, **_as_dict(given)},
            pretrained_cfg_overlay=overlay,
        ).to_dict()
        kwargs.setdefault("num_classes", cfg["num_classes"])
        network: nn.Module = timm.models.model_entrypoint(stock)(pretrained=False, **kwargs)
        _shrink_stem(network)
        network.pretrained_cfg = network.default_cfg = cfg
        if pretrained:
            load_pretrained(
                network,
                pretrained_cfg=cfg,
                num_classes=kwargs["num_classes"],
                in_chans=kwargs.get("in_chans", 3),
            )
        return network

    build.__name__ = build.__qualname__ = PREFIX + stock
    build.__doc__ = f"Return {stock} with a stride-1 stem."
    return build


def _as_dict(cfg: Any) -> dict[str, Any]:
    if not cfg:
        return {}
    values: dict[str, Any] = cfg if isinstance(cfg, dict) else cfg.to_dict()
    return {key: value for key, value in values.items() if value is not None}


def _shrink_stem(network: Any) -> None:
    """Let the first convolution keep the size: 3x3 at stride 1, and no pooling after it.

    Source: He et al. 2015, arXiv:1512.03385, section 4.2, for the 3x3 stem on CIFAR-10.
    """
    stem: Any = getattr(network, "conv_stem", None)
    if stem is not None:  # EfficientNet
        stem.stride = (1, 1)
        return
    first: Any = network.conv1
    if isinstance(first, nn.Sequential):  # the deep stem of ResNet-D: three 3x3 convolutions
        strided: Any = first[0]
        strided.stride = (1, 1)
    else:
        network.conv1 = nn.Conv2d(first.in_channels, first.out_channels, 3, 1, 1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()


def _patch_args(family: str, image_px: int) -> dict[str, Any]:
    if family == "convnext":
        return {"patch_size": 1 if image_px <= 32 else 2}
    # About eight patches a side: the divisor of the size that is nearest to an eighth of it.
    divisors = [p for p in range(1, image_px + 1) if image_px % p == 0]
    patch = min(divisors, key=lambda p: abs(p - image_px / 8))
    return {"img_size": image_px, "patch_size": patch}

"""Whether pretrained batch norms go on with the statistics they came with (model.freeze=auto).

In training a batch norm uses mean and variance of what it sees at once. Of few small images that is
little: the last ones of a network that shrinks images 32 times see 144 values of a channel in 16
images of 96 px. Then the statistics of the pretrained weights were the better ones; of 784 values
those of the new images seemed to be (docs/decisions/0014-fine-tuning.md).
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fieldmark.config import ModelConfig, TrainConfig
from fieldmark.errors import ConfigError
from fieldmark.model import Freeze
from fieldmark.runtime.log import say

FEW_VALUES = 500


def settle_freeze(
    model: ModelConfig,
    train: TrainConfig,
    network: nn.Module,
    *,
    height_px: int,
    width_px: int,
    num_ranks: int,
    decide_once: Callable[[str, Callable[[], tuple[str, str]]], str],
) -> ModelConfig:
    """Return the section with `freeze` settled, said and recorded; as it was if it is not auto.

    Args:
        network: the one that is trained, on any device.
        height_px, width_px: of an image in training.
    """
    if model.freeze != "auto":
        return model

    def find() -> tuple[str, str]:
        if not model.pretrained:
            return "none", "as there are no statistics to keep"
        positions = fewest_positions(network, height_px, width_px)
        if positions is None:
            return "none", "as there is no batch norm"
        if train.batch_size == "auto":
            # Of few images that is one or two; kept statistics suit every number.
            return "statistics", "as train.batch_size=auto is not a number yet"
        at_once = train.batch_size // (train.accumulation_steps * num_ranks)
        values = at_once * positions
        seen = f"{at_once} images at once give a batch norm {values} values of a channel"
        if values < FEW_VALUES:
            return "statistics", f"as {seen}, fewer than {FEW_VALUES}"
        return "none", f"as {seen}, {FEW_VALUES} or more"

    freeze = decide_once("freeze", find)
    say(f"model.freeze=auto: {freeze}")
    return model.model_copy(update={"freeze": freeze})


def settled(model: ModelConfig) -> Freeze:
    """Return what is frozen, once that is settled."""
    if model.freeze == "auto":
        raise AssertionError("model.freeze=auto is settled before anything is trained")
    return model.freeze


def check_norms(
    freeze: Freeze, network: nn.Module, *, num_images: int, height_px: int, width_px: int
) -> None:
    """Refuse an update in which a batch norm would see a single value of a channel.

    Args:
        num_images: that pass at once.
        height_px, width_px: of the smallest image in training.

    Raises:
        ConfigError: there is such a batch norm; one value has no variance.
    """
    if num_images > 1 or freeze != "none":
        return
    if fewest_positions(network, height_px, width_px) == 1:
        raise ConfigError(
            "train.batch_size must give a process 2 images at once or more, as this network ends "
            f"in batch norms over a single pixel of {height_px} x {width_px} px images. Got 1. "
            "Set a larger one, or model.freeze=statistics for pretrained weights."
        )


def fewest_positions(network: nn.Module, height_px: int, width_px: int) -> int | None:
    """Return height times width of the smallest map that a batch norm sees; None without one.

    The network stays as it is, its mode included.
    """
    found: list[int] = []

    def look(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        found.append(inputs[0][0, 0].numel())

    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    hooks = [module.register_forward_pre_hook(look) for module in norms]
    modes = {module: module.training for module in network.modules()}
    try:
        if norms:
            parameter = next(network.parameters())
            image = torch.zeros(1, 3, height_px, width_px, device=parameter.device)
            with torch.inference_mode():
                network.eval()(image)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return min(found, default=None)

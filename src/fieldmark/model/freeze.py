"""The head and the backbone: which part learns, and in which mode each runs."""

from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

Freeze = Literal["none", "statistics", "backbone"]


def head_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the classifier head."""
    return list(_heads(network, "parameters"))


def freeze_backbone(network: nn.Module) -> None:
    """Leave only the head's parameters trainable."""
    head = {id(p) for p in head_parameters(network)}
    for parameter in network.parameters():
        parameter.requires_grad = id(parameter) in head


def set_train_mode(network: nn.Module, freeze: Freeze) -> None:
    """Put the network in training mode, but for what is frozen.

    A frozen backbone stays as it is evaluated: in training mode it would still move its norm
    statistics and drop features. With frozen statistics, batch norms learn scale and shift but
    normalise with the means and variances they came with, which small batches would only blur.
    """
    network.train(freeze != "backbone")
    if freeze == "backbone":
        for module in _heads(network, "modules"):
            module.train()
    elif freeze == "statistics":
        for module in network.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


def _heads(network: nn.Module, method: str):
    classifier = network.get_classifier()  # type: ignore[operator]
    # Distilled ViTs return one head for each token.
    for head in classifier if isinstance(classifier, tuple) else (classifier,):
        yield from getattr(head, method)()

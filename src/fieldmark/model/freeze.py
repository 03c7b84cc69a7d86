"""The head and the backbone: which part learns, and in which mode each runs."""

from torch import nn


def head_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the classifier head."""
    return list(_heads(network, "parameters"))


def freeze_backbone(network: nn.Module) -> None:
    """Leave only the head's parameters trainable."""
    head = {id(p) for p in head_parameters(network)}
    for parameter in network.parameters():
        parameter.requires_grad = id(parameter) in head


def set_train_mode(network: nn.Module, *, frozen_backbone: bool) -> None:
    """Put the network in training mode; a frozen backbone stays as it is evaluated.

    A frozen backbone in training mode would still move its norm statistics and drop features.
    """
    network.train(not frozen_backbone)
    if frozen_backbone:
        for module in _heads(network, "modules"):
            module.train()


def _heads(network: nn.Module, method: str):
    classifier = network.get_classifier()  # type: ignore[operator]
    # Distilled ViTs return one head for each token.
    for head in classifier if isinstance(classifier, tuple) else (classifier,):
        yield from getattr(head, method)()

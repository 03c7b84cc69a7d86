"""A module that also gives its last feature map, from which exact class maps follow."""

from typing import Any

import torch
from torch import Tensor, nn

from fieldmark.errors import ModelError
from fieldmark.model.inference import InferenceModule

_TOLERANCE = 1e-4  # of the largest logit: two orders of summation differ by about 1e-6


class FeatureModule(nn.Module):
    """An InferenceModule with a second output: logits (B, K) and features (B, C, h, w).

    It is made only of networks whose logits are the mean of the features over h and w, through
    one linear layer, `head`. Then each class has an exact map: head weight (K, C) times features,
    plus the head's bias, whose mean over h and w is the logit.

    Raises:
        ModelError: the network is not of that form; the sentence says why.
    """

    def __init__(self, module: InferenceModule, images: Tensor) -> None:
        """Wrap `module`; `images`, uint8 (B, H, W, 3), are what its form is measured on."""
        super().__init__()
        self.module = module
        self.eval()
        network: Any = module.network
        head = network.get_classifier() if hasattr(network, "get_classifier") else None
        if not isinstance(head, nn.Linear) or not hasattr(network, "forward_head"):
            raise ModelError(_sentence(network, "its head is no single linear layer"))
        self._channels_last = False
        with torch.no_grad():
            features = network.forward_features(module.normalised(images))
            if not isinstance(features, Tensor) or features.ndim != 4:
                raise ModelError(_sentence(network, "its last features are no map"))
            if features.shape[1] != head.in_features:  # as Swin's are
                self._channels_last = features.shape[3] == head.in_features
                if not self._channels_last:
                    raise ModelError(_sentence(network, "layers lie between the map and the head"))
            logits, features = self(images)
            expected, mapped = module(images), head(features.mean(dim=(2, 3)))
        allowed = _TOLERANCE * float(expected.abs().max()) + 1e-7
        if not all((found - expected).abs().max() <= allowed for found in (logits, mapped)):
            raise ModelError(
                _sentence(network, "its logits are not the mean of the map through the head")
            )
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        self.weight_name = names[id(head.weight)]
        self.bias_name = "" if head.bias is None else names[id(head.bias)]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits (B, K) and features (B, C, h, w), float32, of uint8 (B, H, W, 3)."""
        return self.run(self.module.normalised(images))

    def run(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same of the network's own input."""
        network: Any = self.module.network
        found = network.forward_features(x_BCHW)
        logits = network.forward_head(found)
        features = found.permute(0, 3, 1, 2) if self._channels_last else found
        return logits.to(torch.float32), features.to(torch.float32)


def _sentence(network: nn.Module, reason: str) -> str:
    return (
        "class maps must come from a network that averages its last feature map and applies one "
        f"linear layer. Got {type(network).__name__}: {reason}. Export without --features."
    )

"""airnet: a small, fast network for images of about 32 px.

A 2x2 whitening convolution with frozen weights, then three groups of two 3x3 convolutions, each
halving the size once. Convolutions start as identities, so that a signal passes from the start.
Source: Jordan 2024, "94% on CIFAR-10 in 3.29 seconds on a single GPU", arXiv:2404.00498.
"""

from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional as F

MIN_INPUT_PX = 9  # one pixel is lost to the whitening layer, then the size is halved three times


class AirNet(nn.Module):
    """Whitening stem, three groups, global max pooling, a scaled linear head without bias."""

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        widths: tuple[int, int, int] = (64, 256, 256),
        head_scale: float = 1 / 9,
        bn_momentum: float = 0.4,
        drop_rate: float = 0.0,
        depth: int = 2,
        stem_bias: str = "zeros",
        head_std: float = 0.0,
    ) -> None:
        """Make the network.

        Args:
            depth: convolutions in a group, 2 or 3; the third is passed by a shortcut.
            stem_bias: "zeros", or "uniform" between -1 / sqrt(F) and 1 / sqrt(F), F the inputs of
                a stem filter, as torch sets a convolution's bias.
            head_std: of the head's weights, which are scaled to it; 0: as torch sets them.
        """
        super().__init__()
        if depth not in (2, 3) or stem_bias not in ("zeros", "uniform") or head_std < 0:
            raise ValueError(
                "airnet takes depth 2 or 3, stem_bias zeros or uniform, head_std from 0. "
                f"Got {depth}, {stem_bias!r}, {head_std}."
            )
        self.head_std = head_std
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = widths[-1]
        self.head_scale = head_scale
        self.drop_rate = drop_rate
        patch = in_chans * 4
        self.whiten = nn.Conv2d(in_chans, 2 * patch, kernel_size=2)
        self.whiten.weight.requires_grad = False
        if stem_bias == "zeros":
            nn.init.zeros_(self.whiten.bias)  # type: ignore[arg-type]
        sizes = [2 * patch, *widths]
        self.groups = nn.Sequential(
            *(_Group(sizes[i], sizes[i + 1], bn_momentum, depth) for i in range(len(widths)))
        )
        self.head = self._make_head()

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map (B, C, h, w)."""
        features: Tensor = self.groups(F.gelu(self.whiten(x)))
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, K), or pooled features (B, C) with `pre_logits`."""
        x = x.amax(dim=(2, 3))
        if self.drop_rate:
            x = F.dropout(x, self.drop_rate, self.training)
        if pre_logits:
            return x
        logits: Tensor = self.head(x)
        return logits * self.head_scale if self.num_classes else logits

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, K) of normalised images (B, 3, H, W)."""
        return self.forward_head(self.forward_features(x))

    def stem_parameters(self) -> list[nn.Parameter]:
        """Return what learns in the stem: the whitening filters' biases."""
        return [p for name, p in self.whiten.named_parameters() if name == "bias"]

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Return what tells the layers apart, as timm asks for it: layer-wise rates."""
        return {"stem": r"^whiten", "blocks": r"^groups\.(\d+)"}

    def get_classifier(self) -> nn.Module:
        """Return the head, as timm asks for it."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one."""
        if global_pool not in (None, "max"):
            raise ValueError(f"global_pool must be 'max' in airnet. Got {global_pool!r}.")
        self.num_classes = num_classes
        self.head = self._make_head()

    @torch.no_grad()
    def init_from_images(self, x_BCHW: Tensor, eps: float = 5e-4) -> None:
        """Set the whitening filters from normalised training images (B, C, H, W).

        Filters are the eigenvectors of the uncentred covariance of all 2x2 patches, each divided
        by the root of its eigenvalue + eps, and their negatives.
        """
        count = 0
        size = self.whiten.weight[0].numel()
        covariance = torch.zeros(size, size, dtype=torch.float64)
        at_once = max(1, 500 * 32 * 32 // x_BCHW[0, 0].numel())  # patches are 12 doubles a pixel
        for images in x_BCHW.split(at_once):
            patches = F.unfold(images.float(), kernel_size=2)  # (b, C*4, L)
            flat = patches.permute(0, 2, 1).reshape(-1, size).double().cpu()
            covariance += flat.T @ flat
            count += len(flat)
        values, vectors = torch.linalg.eigh(covariance / count)
        filters = vectors.T / torch.sqrt(values + eps)[:, None]
        # eigh leaves the sign open: fix it, so that the same images give the same filters.
        filters = filters * torch.where(filters.sum(1, keepdim=True) < 0, -1.0, 1.0)
        both = torch.cat([filters, -filters]).view_as(self.whiten.weight)
        self.whiten.weight.copy_(both)

    def _make_head(self) -> nn.Module:
        if self.num_classes <= 0:
            return nn.Identity()
        head = nn.Linear(self.num_features, self.num_classes, bias=False)
        if self.head_std:
            with torch.no_grad():
                head.weight *= self.head_std / head.weight.std()
        return head


class _Group(nn.Module):
    def __init__(self, width_in: int, width_out: int, bn_momentum: float, depth: int) -> None:
        super().__init__()
        self.conv1 = _dirac_conv(width_in, width_out)
        self.norm1 = _bias_norm(width_out, bn_momentum)
        self.conv2 = _dirac_conv(width_out, width_out)
        self.norm2 = _bias_norm(width_out, bn_momentum)
        self.is_deep = depth == 3
        if self.is_deep:
            self.conv3 = _dirac_conv(width_out, width_out)
            self.norm3 = _bias_norm(width_out, bn_momentum)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = F.gelu(self.norm1(F.max_pool2d(self.conv1(x), 2)))
        x = F.gelu(self.norm2(self.conv2(shortcut)))
        return F.gelu(self.norm3(self.conv3(x)) + shortcut) if self.is_deep else x


def _dirac_conv(width_in: int, width_out: int) -> nn.Conv2d:
    conv = nn.Conv2d(width_in, width_out, kernel_size=3, padding=1, bias=False)
    same = min(width_in, width_out)
    nn.init.dirac_(conv.weight.data[:same])
    return conv


def _bias_norm(width: int, momentum: float) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(width, eps=1e-12, momentum=momentum)
    norm.weight.requires_grad = False  # the scale stays 1; only the bias is trained
    return norm


default_cfgs = generate_default_cfgs(
    {
        "airnet": {
            "input_size": (3, 32, 32),
            "pool_size": (3, 3),
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": (0.4914, 0.4822, 0.4465),
            "std": (0.2470, 0.2435, 0.2616),
            "num_classes": 10,
            "first_conv": None,
            "classifier": "head",
        }
    }
)


@register_model
def airnet(pretrained: bool = False, **kwargs: Any) -> AirNet:
    """Return an airnet; `widths` sets the three groups' channels."""
    if "widths" in kwargs:
        kwargs["widths"] = tuple(kwargs["widths"])
    network: AirNet = build_model_with_cfg(AirNet, "airnet", pretrained, **kwargs)
    return network

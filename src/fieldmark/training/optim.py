"""Optimizers and their parameter groups."""

from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from timm.models import group_parameters
from timm.optim import get_optimizer_class, get_optimizer_info, list_optimizers
from torch import nn

from fieldmark.config import OptimConfig
from fieldmark.errors import ConfigError, UnknownName
from fieldmark.model import head_parameters
from fieldmark.training.muon import Muon

Groups = list[dict[str, Any]]

# What a group says for itself, so that the same name in optim.args would be ignored.
_OF_GROUPS = ("lr", "weight_decay", "params")
_NO_MOMENTUM = OptimConfig.model_fields["momentum"].default  # what the key says when nobody set it


def make_optimizer(network: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimizer over the parameters that require a gradient.

    Each group carries `initial_lr`, which the schedule multiplies.

    Raises:
        UnknownName: neither sgd, adamw nor a name of timm.optim.
        ConfigError: a setting that the optimizer does not take, or a layer-wise rate of a network
            whose layers are not known.
    """
    name = config.name.lower()
    doubled = [key for key in (*_OF_GROUPS, "momentum") if key in config.args]
    if doubled:
        raise ConfigError(
            f"optim.args must not hold what has a key of its own. Got {doubled[0]!r}. "
            f"Set optim.{doubled[0]}."
        )
    groups = parameter_groups(network, config)
    try:
        optimizer = _make(name, groups, config)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optim.args must be arguments of {name}. {error}.") from error
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def parameter_groups(network: nn.Module, config: OptimConfig) -> Groups:
    """Return groups of one rate and one decay each, named after what they hold, none empty.

    - The head learns at lr * head_lr_factor.
    - Below it, norms and biases (vectors, scalars) learn at lr * bias_lr_factor, and each layer at
      `layer_decay` times the rate of the layer after it; the layer under the head is the first
      that is slowed. Layers are those of timm's `group_matcher` (Clark et al. 2020,
      arXiv:2003.10555, use such rates in fine-tuning; Bao et al. 2021, arXiv:2106.08254, for
      images).
    - With `decay_norm_and_bias` off, weight decay leaves out vectors and scalars, and what the
      network itself names in `no_weight_decay` (position embeddings).
    - With `stem_epochs`, the network's stem is a group with "stem": True, at lr.
    - With `decay_follows_lr` off, a group's decay is divided by what its rate is times lr.
    - For muon, convolution filters below the head are groups with "filters": True, which learn at
      filter_lr and are not decayed: that optimizer fixes their norm.

    Raises:
        ConfigError: a layer_decay below 1 for a network without a `group_matcher`, or stem_epochs
            for one that does not name its stem.
    """
    stem = {id(p) for p in stem_parameters(network)} if config.stem_epochs else set()
    head = {id(p) for p in head_parameters(network)}
    exempt: set[str] = set(getattr(network, "no_weight_decay", set)())
    depths = _depths(network) if config.layer_decay < 1 else {}
    num_layers = max(depths.values(), default=0)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        is_head, is_vector = id(parameter) in head, parameter.ndim <= 1
        is_stem = id(parameter) in stem
        is_filter = (
            config.name.lower() == "muon" and parameter.ndim == 4 and not is_head and not is_stem
        )
        is_exempt = is_vector or any(fnmatchcase(name, pattern) for pattern in exempt)
        decays = not is_filter and (config.decay_norm_and_bias or not is_exempt)
        depth = 0 if is_head else depths.get(name, 0)
        lr = (config.filter_lr if is_filter else config.lr) * config.layer_decay**depth
        if is_head:
            lr *= config.head_lr_factor
        elif is_vector and not is_stem:
            lr *= config.bias_lr_factor
        is_apart = is_vector and not is_head and not is_stem and config.bias_lr_factor != 1
        title = (
            "head"
            if is_head
            else "stem"
            if is_stem
            else f"layer {num_layers - depth}"
            if depths
            else "backbone"
        )
        title += ", filters" if is_filter else ", norms and biases" if is_apart else ""
        title += "" if decays or is_filter else ", no decay"
        group = groups.setdefault(
            title,
            {
                "name": title,
                "params": [],
                "lr": lr,
                "weight_decay": _decay(config, lr) if decays else 0.0,
                **({"filters": True} if is_filter else {}),
                **({"stem": True} if is_stem else {}),
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def stem_parameters(network: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of the network's stem that learn.

    Raises:
        ConfigError: the network does not say which they are.
    """
    find = getattr(network, "stem_parameters", None)
    if find is None:
        raise ConfigError(
            "optim.stem_epochs needs a network that names its stem, as airnet does. "
            f"Got {type(network).__name__}. Set optim.stem_epochs=0."
        )
    return list(find())


def _decay(config: OptimConfig, lr: float) -> float:
    """Return the decay of a group that learns at `lr`; optimizers multiply one by the other."""
    return config.weight_decay * (1 if config.decay_follows_lr else config.lr / lr)


def _depths(network: nn.Module) -> dict[str, int]:
    """Return parameter name -> number of layers between it and the output, 0 for the head."""
    matcher = getattr(network, "group_matcher", None)
    if matcher is None:
        raise ConfigError(
            f"optim.layer_decay must be 1 for {type(network).__name__}, which does not say what "
            "its layers are. Got less. Set optim.layer_decay=1."
        )
    layers: dict[str, int] = group_parameters(network, matcher(coarse=False), reverse=True)
    last = max(layers.values())
    return {name: last - layer for name, layer in layers.items()}


def _make(name: str, groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    make = _OWN.get(name) or partial(_make_timm, name)
    return make(groups, config)


def _make_sgd(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        groups, momentum=config.momentum, nesterov=config.nesterov, **config.args
    )


def _make_adamw(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    _refuse_momentum("adamw", config)
    # On CUDA as one kernel, and with the count of its steps there, which the guard can take back.
    is_on_cuda = all(parameter.is_cuda for group in groups for parameter in group["params"])
    return torch.optim.AdamW(groups, **{"fused": True if is_on_cuda else None, **config.args})


def _make_muon(groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    if config.args:
        raise ConfigError(
            f"optim.args is not a setting of muon. Got {config.args}. Its settings are "
            "optim.momentum, nesterov, filter_lr and filter_momentum."
        )
    for group in groups:
        if "filters" in group:
            group["momentum"] = config.filter_momentum
    return Muon(groups, config.lr, config.momentum, config.nesterov)


def _make_timm(name: str, groups: Groups, config: OptimConfig) -> torch.optim.Optimizer:
    """Return an optimizer of timm, from its class: timm's factory drops what does not fit."""
    known = [str(known) for known in list_optimizers()]
    if name not in known:
        raise UnknownName.among("optimizer", config.name, [*_OWN, *known])
    info = get_optimizer_info(name)
    if info.second_order:
        raise ConfigError(
            f"optim.name must be an optimizer of first derivatives. Got {name!r}. "
            "Choose another, such as adamw."
        )
    given = {"lr": config.lr, **config.args}
    if info.has_momentum:
        given["momentum"] = config.momentum
    else:
        _refuse_momentum(name, config)
    try:
        make = get_optimizer_class(name)
    except (AssertionError, ImportError) as error:
        raise ConfigError(
            f"optim.name={name} needs a library or a device that is not here. {error}. "
            "Choose another, such as adamw or lamb."
        ) from error
    optimizer: torch.optim.Optimizer = make(groups, **given)
    return optimizer


def _refuse_momentum(name: str, config: OptimConfig) -> None:
    """Raise ConfigError if a momentum was set that the optimizer would ignore."""
    if config.momentum != _NO_MOMENTUM:
        raise ConfigError(
            f"optim.momentum is not a setting of {name}. Got {config.momentum:g}. "
            f"Leave it at {_NO_MOMENTUM:g}; optim.args.betas may be what you want."
        )


# The optimizers that are not timm's, by name.
_OWN: dict[str, Callable[[Groups, OptimConfig], torch.optim.Optimizer]] = {
    "sgd": _make_sgd,
    "adamw": _make_adamw,
    "muon": _make_muon,
}

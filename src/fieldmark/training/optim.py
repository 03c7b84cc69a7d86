"""Optimizers and their parameter groups."""

from typing import Any

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from fieldmark.config import OptimConfig
from fieldmark.errors import ConfigError, UnknownName
from fieldmark.model import head_parameters


def make_optimizer(network: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """Return the optimizer over the parameters that require a gradient.

    Each group carries `initial_lr`, which the schedule multiplies.

    Raises:
        UnknownName: neither sgd, adamw nor a name of timm.optim.
        ConfigError: an argument in optim.args that the optimizer does not take.
    """
    groups = parameter_groups(network, config)
    name = config.name.lower()
    try:
        optimizer = _make(name, groups, config)
    except TypeError as error:
        raise ConfigError(f"optim.args must be arguments of {name}. {error}.") from error
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


def parameter_groups(network: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Return groups by rate (backbone, head) and decay, without empty ones.

    With `decay_norm_and_bias` off, weight decay leaves out vectors and scalars (norms, biases)
    and what the network itself names in `no_weight_decay` (position embeddings).
    """
    head = {id(p) for p in head_parameters(network)}
    exempt = set(getattr(network, "no_weight_decay", set)())
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        is_head = id(parameter) in head
        decays = config.decay_norm_and_bias or (parameter.ndim > 1 and name not in exempt)
        group = groups.setdefault(
            (is_head, decays),
            {
                "name": ("head" if is_head else "backbone") + ("" if decays else ", no decay"),
                "params": [],
                "lr": config.lr * (config.head_lr_factor if is_head else 1.0),
                "weight_decay": config.weight_decay if decays else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def _make(name: str, groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(
            groups, momentum=config.momentum, nesterov=config.nesterov, **config.args
        )
    if name == "adamw":
        return torch.optim.AdamW(groups, **config.args)
    known = [str(known) for known in list_optimizers()]
    if name not in known:
        raise UnknownName.among("optimizer", config.name, ["adamw", *known])
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        groups, opt=name, lr=config.lr, momentum=config.momentum, **config.args
    )
    return optimizer

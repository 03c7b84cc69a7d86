"""Muon: against its definition by a decomposition, and against SGD for what is no filter."""

import pytest
import torch
from torch import nn

from fieldmark.config import OptimConfig
from fieldmark.errors import ConfigError
from fieldmark.model import Architecture, build
from fieldmark.training.muon import Muon, orthogonal
from fieldmark.training.optim import make_optimizer

OPTIM = OptimConfig(
    name="muon", lr=0.1, filter_lr=0.2, filter_momentum=0.6, momentum=0.85, nesterov=True
)


@pytest.mark.parametrize("shape", [(8, 30), (30, 8), (16, 16)])
def test_singular_values_come_near_1_and_vectors_stay(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    made = orthogonal(matrix, iterations=8)
    turned = u.mT @ made @ vh.mT
    # The coefficients are chosen for speed: they end between 0.7 and 1.2, not at 1.
    assert torch.allclose(turned, turned.diagonal().diag(), atol=1e-6)
    assert turned.diagonal().min() > 0.6
    assert turned.diagonal().max() < 1.3


def test_a_filter_takes_a_step_of_its_rate_from_a_fixed_norm() -> None:
    weight = nn.Parameter(torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(1)))
    optimizer = Muon(
        [{"params": [weight], "lr": 0.2, "momentum": 0.6, "filters": True}], 0.1, 0.85, True
    )
    scaled = weight.detach() * 2 / weight.detach().norm()  # the root of 4 filters
    gradient = torch.randn_like(weight)
    weight.grad = gradient.clone()
    optimizer.step()
    wanted = scaled - 0.2 * orthogonal(gradient.flatten(1)).view_as(weight)
    assert torch.allclose(weight, wanted, atol=1e-5)
    assert torch.equal(weight.grad, gradient)


def test_the_rest_moves_as_sgd_moves_it() -> None:
    def biases() -> nn.Parameter:
        return nn.Parameter(torch.arange(5.0))

    ours, theirs = biases(), biases()
    settings = {"lr": 0.1, "momentum": 0.85, "weight_decay": 0.01}
    muon = Muon([{"params": [ours], **settings}], 0.1, 0.85, True)
    sgd = torch.optim.SGD([theirs], nesterov=True, **settings)
    for step in range(4):
        for parameter, optimizer in ((ours, muon), (theirs, sgd)):
            parameter.grad = torch.sin(torch.arange(5.0) + step)
            optimizer.step()
    assert torch.equal(ours, theirs)


def test_airnets_filters_are_muons_and_all_else_is_not() -> None:
    network = build(Architecture("airnet", 10))
    groups = make_optimizer(network, OPTIM).param_groups
    filters = [group for group in groups if group["filters"]]
    assert {(g["lr"], g["momentum"], g["weight_decay"]) for g in filters} == {(0.2, 0.6, 0.0)}
    assert all(p.ndim == 4 for group in filters for p in group["params"])
    assert sum(len(group["params"]) for group in filters) == 6
    assert all(g["momentum"] == 0.85 for g in groups if not g["filters"])


def test_a_filter_rate_and_muon_need_each_other() -> None:
    from fieldmark.config import override
    from fieldmark.cookbook import find_recipe

    with pytest.raises(ConfigError, match="belongs to optim.name=muon"):
        override(find_recipe("digits"), ["optim.filter_lr=0.2"])
    with pytest.raises(ConfigError, match="belongs to optim.name=muon"):
        override(find_recipe("digits"), ["optim.name=muon"])

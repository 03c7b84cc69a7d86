"""The fast recipes against literals from their source, and against the rule written out."""

import sys
from pathlib import Path

import pytest
import torch

from fieldmark.config import override
from fieldmark.cookbook import find_recipe
from fieldmark.model import Architecture, build
from fieldmark.training.cost import training_flops
from fieldmark.training.hardest import PROXY_SHARE, proxy_network
from fieldmark.training.optim import make_optimizer
from fieldmark.training.schedule import lr_factor, total_steps, warmup_steps

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
import fast_rules
import race

# By part: rate, decay. Per update of 1,024 examples and a loss that is their sum.
PUBLISHED = {
    "cifar10-fast95": {
        "stem": (1.2738e-3, 1.5667),
        "backbone": (1.2738e-3, 1.5667),
        "backbone, norms and biases": (8.1521e-2, 2.4480e-2),
        "head": (1.2738e-3, 1.5667),
    },
    "cifar10-fast96": {
        "stem": (1.1464e-3, 1.3653),
        "backbone": (1.1464e-3, 1.3653),
        "backbone, norms and biases": (7.3369e-2, 2.1333e-2),
        "head": (1.1464e-3, 1.3653),
    },
}
RATES = {  # at fractions of the run
    "cifar10-fast95": {0.0: 0.2, 0.115: 0.6, 0.23: 1.0, 0.615: 0.535, 1.0: 0.07},
    "cifar10-fast96": {0.0: 0.2, 0.05: 0.6, 0.1: 1.0, 0.55: 0.5, 1.0: 0.0},
}
PFLOP = {"cifar10-fast95": 1.4, "cifar10-fast96": 3.1}


@pytest.mark.parametrize("name", PUBLISHED)
def test_groups_and_rates_are_the_published_ones(name: str) -> None:
    config = find_recipe(name)
    network = build(Architecture(config.model.arch, 10, config.model.args))
    groups = make_optimizer(network, config.optim).param_groups
    found = {group["name"]: (group["lr"], group["weight_decay"]) for group in groups}
    assert found.keys() == PUBLISHED[name].keys()
    for part, (lr, decay) in PUBLISHED[name].items():
        assert found[part] == pytest.approx((lr, decay), rel=1e-3), part
    assert all((group["momentum"], group["nesterov"]) == (0.85, True) for group in groups)
    total = total_steps(config.train, 48)
    warmup = warmup_steps(config.schedule, total=total, steps_per_epoch=48, batch_size=1024)
    for where, factor in RATES[name].items():
        found_factor = lr_factor(
            config.schedule, round(where * total), total=total, warmup=warmup, steps_per_epoch=48
        )
        assert found_factor == pytest.approx(factor, abs=0.01)


@pytest.mark.parametrize("name", PFLOP)
def test_the_cost_is_the_published_one(name: str) -> None:
    config = find_recipe(name)
    network = build(Architecture(config.model.arch, 10, config.model.args))
    images = total_steps(config.train, 48) * 1024
    kept, sizes = config.data.keep_hardest_frac, [(0.0, (32, 32))]
    flops = training_flops(network, sizes, num_images=round(kept * images))
    if kept < 1:
        flops += PROXY_SHARE * training_flops(proxy_network(10, 0), sizes, num_images=images)
    assert flops / 1e15 == pytest.approx(PFLOP[name], rel=0.05)


def test_the_recipe_of_a_point_more_is_what_was_raced() -> None:
    raced = override(find_recipe("cifar10-fast94"), race.ARMS["wide"])
    recipe = find_recipe("cifar10-fast95-muon")
    assert recipe.model_copy(update={"name": raced.name}) == raced


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["cifar10-fast96", pytest.param("cifar10-fast95", marks=pytest.mark.long)]
)
def test_a_hundred_updates_are_those_of_the_rule_written_out(name: str) -> None:
    torch.set_num_threads(2)
    found = fast_rules.compare(name, "digits", 16, ["model.args.widths=[16,32,32]"])
    assert found["largest_difference"] < 1e-3
    assert found["last_loss"] < found["first_loss"]
    assert ("chosen_by_both" in found) == (name == "cifar10-fast96")
    assert found.get("chosen_by_both", 1) >= 0.99

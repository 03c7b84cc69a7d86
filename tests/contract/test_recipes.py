"""Every recipe builds, round-trips, and says how to run it, where it is from, what it gives."""

import sys
from pathlib import Path

import pytest

from fieldmark.config import RunConfig
from fieldmark.cookbook import RECIPES, find_recipe
from fieldmark.model import Architecture, adapt_architecture, build, num_parameters

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
import recipe_costs


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 5


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_is_complete(name: str) -> None:
    config = find_recipe(name)
    assert config.name == name
    assert RunConfig.model_validate_json(config.model_dump_json()) == config
    found = RECIPES[name]
    assert found.line("Run").startswith(f"fieldmark train {name}")
    assert found.line("Source")
    assert found.line("Result")
    if found.evidence is None:
        words = ("published", "expected", "depends on the data")
        assert any(word in found.line("Result") for word in words)


@pytest.mark.parametrize("name", [n for n in sorted(RECIPES) if find_recipe(n).model.arch])
def test_a_recipe_s_network_builds(name: str) -> None:
    config = find_recipe(name).model
    wanted = Architecture(config.arch, 10, config.args)
    network = build(adapt_architecture(wanted, config.image_px or 32, config.small_input)[0])
    assert num_parameters(network) > 1000


def test_the_baseline_has_the_textbook_settings() -> None:
    config = find_recipe("cifar10-resnet18")
    assert (config.optim.name, config.optim.lr) == ("sgd", 0.1)
    assert (config.optim.momentum, config.optim.weight_decay) == (0.9, 5e-4)
    assert (config.schedule.name, config.train.epochs) == ("cosine", 200)
    assert (config.augment.crop_pad_px, config.augment.flip) == (4, "random")
    assert (config.train.batch_size, config.loss.label_smoothing) == (128, 0)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_recipe_s_cost_is_what_its_settings_come_to(name: str) -> None:
    found = recipe_costs.cost(find_recipe(name))
    said = RECIPES[name].line("Cost")
    assert said == (recipe_costs.sentence(*found) if found else "depends on the data.")

"""Print what each recipe costs: images shown, and operations, for the data set of its name.

    .venv/bin/python scripts/recipe_costs.py

The recipes' docstrings say so in their line "Cost:", which tests/contract/test_recipes.py compares.
"""

import math

import torch

from fieldmark.config import RunConfig
from fieldmark.cookbook import RECIPES, find_recipe
from fieldmark.model import Architecture, adapt_architecture, build
from fieldmark.training.cost import training_flops
from fieldmark.training.hardest import PROXY_SHARE, proxy_network
from fieldmark.training.schedule import total_steps

DATA = {"cifar10": (50_000, 10, 32), "imagenet": (1_281_167, 1000, 224)}


def cost(config: RunConfig) -> tuple[int, float] | None:
    """Return (images, PFLOP) of a recipe, or None where they depend on the user's data."""
    name = config.name.split("-")[0]
    if name not in DATA or config.train.method != "gradient":
        return None
    num_images, num_classes, native_px = DATA[name]
    num_train = num_images - round(config.data.val_frac * num_images)
    batch_size = config.train.examples_per_update
    images = total_steps(config.train, num_train // batch_size) * batch_size
    px = config.model.image_px or native_px
    arch = config.model.arch or _arch_of_weights(config.model.pretrained)
    wanted = Architecture(arch, num_classes, dict(config.model.args))
    if not config.model.pretrained:
        wanted, _ = adapt_architecture(wanted, px, config.model.small_input)
    sizes = [(begin, (side, side)) for begin, side in config.augment.sizes or ((0.0, px),)]
    if "img_size" not in wanted.args and arch.startswith(("vit", "deit")):
        wanted = Architecture(arch, num_classes, {**wanted.args, "img_size": sizes[-1][1][0]})
    kept = config.data.keep_hardest_frac
    with torch.device("meta"):  # sizes are enough
        network = build(wanted)
    flops = kept * training_flops(network, sizes, num_images=images)
    if kept < 1:
        flops += PROXY_SHARE * training_flops(proxy_network(10, 0), sizes, num_images=images)
    return images, flops / 1e15


def _arch_of_weights(pretrained: str) -> str:
    """Return the network of timm:NAME.TAG, or of runs/NAME, made by the recipe imagenet-NAME."""
    if pretrained.startswith("runs/"):
        return find_recipe(f"imagenet-{pretrained.removeprefix('runs/')}").model.arch
    return pretrained.split(":")[-1].split(".")[0]


def sentence(images: int, pflop: float) -> str:
    """Return the cost as the docstrings have it: three digits."""
    digits = max(0, 2 - math.floor(math.log10(pflop)))
    return f"{round(pflop, digits):,.{digits}f} PFLOP, {images:,} images."


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in RECIPES:
        found = cost(find_recipe(name))
        print(f"{name:28} {sentence(*found) if found else 'depends on the data'}")

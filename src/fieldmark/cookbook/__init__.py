"""Recipes: functions that return a complete configuration, one file per data set."""

from fieldmark.cookbook import (  # noqa: F401  (they register themselves)
    cifar10,
    digits,
    fast,
    finetune,
    imagenet,
    imagenet_vit,
    probe,
)
from fieldmark.cookbook.registry import (
    RECIPES,
    Recipe,
    describe_recipes,
    find_recipe,
    load_recipe,
)

__all__ = ["RECIPES", "Recipe", "describe_recipes", "find_recipe", "load_recipe"]

"""Recipes: functions that return a complete configuration, one file per data set."""

from fieldmark.cookbook import cifar10, digits, finetune  # noqa: F401  (they register themselves)
from fieldmark.cookbook.registry import RECIPES, Recipe, find_recipe, load_recipe

__all__ = ["RECIPES", "Recipe", "find_recipe", "load_recipe"]

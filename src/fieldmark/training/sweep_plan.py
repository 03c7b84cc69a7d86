"""What a sweep tries, as it is stored in its folder."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fieldmark.config import RunConfig
from fieldmark.config.load import from_json, override
from fieldmark.config.space import FORMS, Space, parse_space, split_settings
from fieldmark.cookbook import load_recipe
from fieldmark.errors import ConfigError, RunError
from fieldmark.runtime.files import read_json, write_json

Metric = Literal["val_top1_accuracy", "val_loss"]
PLAN_FILE = "plan.json"

# Other values of these would measure trials on other images.
_SPLIT_KEYS = {"data.source", "data.val_frac", "data.test_frac", "data.split_seed"}
_COLUMNS = {"data.image_column", "data.label_column"}
# Runs of different length are not at the same point of their schedule after the same epoch.
_LENGTH_KEYS = {"train.epochs", "train.steps", "train.examples", "train.max_minutes"}
_LENGTH_KEYS |= {"train.min_steps"}


@dataclass(frozen=True)
class Plan:
    """What all trials share, and what they differ in."""

    recipe: str
    fixed: tuple[str, ...]  # settings over the recipe
    config: RunConfig  # the recipe with them
    spaces: tuple[Space, ...]
    metric: Metric
    num_trials: int

    @property
    def prunes(self) -> bool:
        """Whether trials can be compared while they run."""
        is_fitted = self.config.train.max_minutes > 0  # each to a number of updates of its own
        return not is_fitted and not any(space.key in _LENGTH_KEYS for space in self.spaces)

    @property
    def larger_is_better(self) -> bool:
        """Of the metric."""
        return self.metric == "val_top1_accuracy"

    def save(self, folder: Path) -> None:
        """Write the plan into the sweep's folder."""
        content = {
            "recipe": self.recipe,
            "fixed": list(self.fixed),
            "spaces": {space.key: space.text for space in self.spaces},
            "metric": self.metric,
            "num_trials": self.num_trials,
            "config": self.config.model_dump(mode="json"),
        }
        write_json(folder / PLAN_FILE, content)

    @classmethod
    def load(cls, folder: Path, num_trials: int | None) -> "Plan":
        """Return the plan of a sweep to go on with, for another number of trials where given.

        Raises:
            RunError: there is no sweep in the folder.
        """
        if not (folder / PLAN_FILE).is_file():
            raise RunError(f"{folder} must be a sweep to resume. Found no {PLAN_FILE} in it.")
        content: dict[str, Any] = read_json(folder / PLAN_FILE)
        found = [parse_space(key, text) for key, text in content["spaces"].items()]
        return cls(
            recipe=content["recipe"],
            fixed=tuple(content["fixed"]),
            config=from_json(content["config"]),
            spaces=tuple(space for space in found if space is not None),
            metric=content["metric"],
            num_trials=num_trials or content["num_trials"],
        )


def new_plan(recipe: str, texts: Sequence[str], num_trials: int | None, metric: Metric) -> Plan:
    """Return the plan of a new sweep.

    Raises:
        ConfigError: no space, no number of trials, no validation split, or a key that would
            change it.
    """
    if num_trials is None:
        raise ConfigError("a sweep needs the number of its trials. Give it with --trials N.")
    base = load_recipe(recipe)
    fixed, spaces = split_settings(base, texts)
    if not spaces:
        raise ConfigError(
            f"a sweep needs a key with a space, as KEY=SPACE. Got none. Write {FORMS}."
        )
    for space in spaces:
        if space.key in _SPLIT_KEYS | _COLUMNS:
            raise ConfigError(
                f"{space.key} must be the same in all trials, which are compared on one validation "
                f"split. Got {space.text!r}. Give it one value."
            )
        if space.key == "train.method":
            raise ConfigError("train.method must be the same in all trials. Give it one value.")
    config = override(base, fixed)
    if config.train.method != "gradient":
        raise ConfigError(
            f"train.method must be gradient in a sweep. Got {config.train.method}, which chooses "
            "its penalty itself."
        )
    if not config.data.val_frac:
        raise ConfigError(
            "data.val_frac must be above 0 in a sweep, which compares trials on the validation "
            "split. Got 0. Set data.val_frac=0.1."
        )
    return Plan(recipe, tuple(fixed), config, tuple(spaces), metric, num_trials)

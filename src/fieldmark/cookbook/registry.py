"""The names of recipes."""

import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from fieldmark.config import RunConfig, load_toml, override
from fieldmark.errors import ConfigError, UnknownName

Build = Callable[[], RunConfig]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A named configuration and where its result was measured."""

    name: str
    build: Build
    evidence: str | None  # a results file in benchmarks/results; None: published or expected

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return (self.build.__doc__ or "").strip().splitlines()[0]

    def line(self, label: str) -> str:
        """Return what the docstring says after `label`, such as "Result"."""
        lines = (self.build.__doc__ or "").splitlines()
        for number, text in enumerate(lines):
            if text.strip().startswith(f"{label}:"):
                rest = [text.strip().removeprefix(f"{label}:").strip()]
                for more in lines[number + 1 :]:
                    if not more.strip() or more.strip().split(":")[0].istitle():
                        break
                    rest.append(more.strip())
                return " ".join(rest)
        return ""


RECIPES: dict[str, Recipe] = {}


def recipe(name: str, *, evidence: str | None = None) -> Callable[[Build], Build]:
    """Register the decorated function under `name`; a second use of a name is an error."""

    def register(build: Build) -> Build:
        if name in RECIPES:
            owner = RECIPES[name].build.__module__
            raise ValueError(f"recipe {name!r} is already defined in {owner}.")
        RECIPES[name] = Recipe(name, build, evidence)
        return build

    return register


def find_recipe(name: str) -> RunConfig:
    """Return the configuration of a recipe, carrying its name.

    Raises:
        UnknownName: no such recipe; the message has the nearest name.
    """
    if name not in RECIPES:
        raise UnknownName.among("recipe", name, RECIPES)
    return RECIPES[name].build().model_copy(update={"name": name})


def load_recipe(name: str, settings: Iterable[str] = ()) -> RunConfig:
    """Return a recipe, or the configuration in a TOML file, with settings over it.

    A file may say `recipe = "NAME"` to start from a recipe; otherwise it must be complete.

    Raises:
        UnknownName, ConfigError: no such recipe or file, or a setting that cannot be.
    """
    if not name:
        raise ConfigError("a recipe must be named. See: fieldmark recipes.")
    path = Path(name)
    if path.suffix != ".toml":
        return override(find_recipe(name), settings)
    if not path.is_file():
        raise ConfigError(f"{name} must be a TOML file. It does not exist.")
    try:
        base_name = tomllib.loads(path.read_text(encoding="utf-8")).get("recipe")
    except (UnicodeDecodeError, tomllib.TOMLDecodeError):
        base_name = None  # load_toml says what is wrong with the file
    base = None if base_name is None else find_recipe(str(base_name))
    config = load_toml(path, base).model_copy(update={"name": path.stem})
    return override(config, settings)


def describe_recipes() -> list[dict[str, str]]:
    """Return name, summary, cost, result and evidence of every recipe, by name."""
    return [
        {
            "name": name,
            "summary": found.summary,
            "cost": found.line("Cost"),
            "result": found.line("Result"),
            "evidence": found.evidence or "",
        }
        for name, found in sorted(RECIPES.items())
    ]

"""Train the models that other benchmarks need, once, and keep them in the user's cache folder.

    .venv/bin/python benchmarks/models.py NAME --data hf:PATH_OF_CIFAR10 [--weights local-dir:PATH]

cifar10            an airnet of the recipe cifar10-fast94
cifar10-lite0      tf_efficientnet_lite0 from --weights, fine-tuned at 128 px in an hour
member-0,1,2       three smaller airnets of different seeds, for an ensemble

Prints the run's folder, which is a PACKAGE to every verb. A run that was cut short is resumed.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import finetune
import subsets

import fieldmark
from fieldmark.config import RunConfig
from fieldmark.cookbook import load_recipe
from fieldmark.errors import CheckFailed, ConfigError, FieldmarkError, UnknownName

NEEDS_WEIGHTS = ("cifar10-lite0",)
LEAST = {"cifar10": 0.89, "cifar10-lite0": 0.91}  # top-1 accuracy, on the JPEG copy too
MEMBER = ["train.epochs=2", "augment.sizes=[]"]
MODELS: dict[str, tuple[str, list[str]]] = {
    "cifar10": ("cifar10-fast94", []),
    "cifar10-lite0": finetune.JOBS["finetune"],
    **{f"member-{n}": ("cifar10-fast94", [*MEMBER, f"train.seed={n}"]) for n in range(3)},
}


def cache_folder() -> Path:
    """Return where the models are kept."""
    return subsets.cache_folder() / "models"


def model(name: str, data: str, weights: str = "") -> Path:
    """Return the run of a model, trained now if it is not there.

    Raises:
        UnknownName: no such model.
        ConfigError: what is in the cache was trained in another way.
        CheckFailed: it is worse than what needs it counts on.
    """
    if name not in MODELS:
        raise UnknownName.among("model", name, MODELS)
    recipe, settings = MODELS[name]
    settings = [f"data.source={data}", *settings]
    if name in NEEDS_WEIGHTS:
        settings.append(f"model.pretrained={weights or 'timm:tf_efficientnet_lite0.in1k'}")
    out = cache_folder() / name
    if not (out / "config.json").is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        fieldmark.train(recipe, settings, out=out)
    else:
        must_be(out, load_recipe(recipe, settings))
        if not (out / "metrics.json").is_file():
            fieldmark.train(out=out, resume=True)
    found = json.loads((out / "metrics.json").read_text())["top1_accuracy"]["value"]
    if found < LEAST.get(name, 0.0):
        raise CheckFailed(
            f"{out} must have a top-1 accuracy of {LEAST[name]:.0%}. Got {found:.2%}. Remove it, "
            "and train it anew."
        )
    return out


def must_be(run: Path, wanted: RunConfig) -> None:
    """Raise ConfigError where a run in the cache was trained in another way, as of older code.

    Where the data and the weights lie is not looked at.
    """
    stored = flat(json.loads((run / "config.json").read_text()))
    asked = flat(wanted.model_dump(mode="json"))
    keys = {*stored, *asked} - {"data.source", "model.pretrained"}
    other = sorted(key for key in keys if stored.get(key) != asked.get(key))
    if other:
        raise ConfigError(
            f"{run} must be a run of {wanted.name} as it is now. Got one with another "
            f"{', '.join(other[:5])}. Remove it, and train it anew."
        )


def flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values under dotted names."""
    found: dict[str, Any] = {}
    for key, value in content.items():
        inner = flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        found |= inner
    return found


def main() -> None:
    """Train what is asked for, and print where it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("--data", default="cifar10", help="CIFAR-10 as a data source")
    parser.add_argument("--weights", default="", help="of tf_efficientnet_lite0, as a MODEL")
    options = parser.parse_args()
    try:
        print(model(options.name, options.data, options.weights))
    except FieldmarkError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

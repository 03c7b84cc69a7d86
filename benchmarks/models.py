"""Train the models that other benchmarks need, once, and keep them in the user's cache folder.

    .venv/bin/python benchmarks/models.py NAME --data hf:PATH_OF_CIFAR10 [--weights local-dir:PATH]

cifar10            an airnet of the recipe cifar10-fast94
cifar10-lite0      tf_efficientnet_lite0 from --weights, fine-tuned at 128 px in an hour
member-0,1,2       three smaller airnets of different seeds, for an ensemble

Prints the run's folder, which is a PACKAGE to every verb. A run that was cut short is resumed.
"""

import argparse
import os
import sys
from pathlib import Path

import finetune

import fieldmark
from fieldmark.errors import FieldmarkError, UnknownName

NEEDS_WEIGHTS = ("cifar10-lite0",)
MEMBER = ["train.epochs=2", "augment.sizes=[]"]
MODELS: dict[str, tuple[str, list[str]]] = {
    "cifar10": ("cifar10-fast94", []),
    "cifar10-lite0": finetune.JOBS["finetune"],
    **{f"member-{n}": ("cifar10-fast94", [*MEMBER, f"train.seed={n}"]) for n in range(3)},
}


def cache_folder() -> Path:
    """Return where the models are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "fieldmark" / "benchmarks" / "models"


def model(name: str, data: str, weights: str = "") -> Path:
    """Return the run of a model, trained now if it is not there.

    Raises:
        UnknownName: no such model.
        ConfigError: it needs weights, and none were given.
    """
    if name not in MODELS:
        raise UnknownName.among("model", name, MODELS)
    recipe, settings = MODELS[name]
    out = cache_folder() / name
    if (out / "metrics.json").is_file():
        return out
    if (out / "config.json").is_file():
        fieldmark.train(out=out, resume=True)
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    settings = [f"data.source={data}", *settings]
    if name in NEEDS_WEIGHTS:
        settings.append(f"model.pretrained={weights or 'timm:tf_efficientnet_lite0.in1k'}")
    fieldmark.train(recipe, settings, out=out)
    return out


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

"""Which answer to unequal classes helps: CIFAR-10-LT, each method with the same number of updates.

    .venv/bin/python benchmarks/imbalance.py --data hf:PATH_OF_CIFAR10
    .venv/bin/python benchmarks/imbalance.py --data hf:PATH_OF_CIFAR10 --methods plain focal
    .venv/bin/python benchmarks/imbalance.py --show

Class c keeps 5000 * 100^(-c/9) of its images (Cao et al. 2019, arXiv:1906.07413, section 4):
12,406 images, the largest class 100 times the smallest. The test split is the original one, 10,000
images in equal parts, so that its top-1 accuracy is the mean recall of the classes.

Methods take turns within a seed, so that a drift of the machine meets all, and differences are
taken seed by seed. Each finished run is added to benchmarks/results/imbalance.json at once:
started again, it goes on with the runs that are missing.
"""

import argparse
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import results_file
import subsets
from results_file import Row
from subsets import split_of

import fieldmark
from fieldmark.data.source import Source, open_source
from fieldmark.errors import DataError, FieldmarkError
from fieldmark.runtime.log import say
from fieldmark.runtime.seed import derive_seed

NAME = "imbalance"
COMMAND = "benchmarks/imbalance.py --data hf:PATH_OF_CIFAR10"
RECIPE = "cifar10-smoke"
LARGEST, FACTOR = 5_000, 100
SELECTION_SEED = 0


def class_sizes(num_classes: int = 10) -> list[int]:
    """Return how many images each class keeps."""
    return [int(LARGEST * FACTOR ** (-c / (num_classes - 1))) for c in range(num_classes)]


def _root_weights() -> list[float]:
    """1 / root of the size, with a mean of 1 over images that are drawn by the root of the size."""
    roots = [math.sqrt(size) for size in class_sizes()]
    return [round(sum(roots) / len(roots) / root, 4) for root in roots]


# Of all methods. Half the recipe's batch, whose 500 would leave 24 updates an epoch, and a lower
# rate with it. No smoothing, which all methods would have to share and which some take as a loss
# of contrast to the small classes. Flips at random: the recipe's alternate between epochs, and an
# image that a sampler draws several times in one epoch would be the same each time.
SETTINGS = [
    "data.val_frac=0",
    "train.batch_size=250",
    "optim.lr=1.0",
    "loss.label_smoothing=0",
    "augment.crop_pad_px=4",
    "augment.flip=random",
    "augment.cutout_px=8",
    "package.golden=synthetic",
]

METHODS: dict[str, list[str]] = {
    "plain": [],
    "sampler-balanced": ["data.sampler=balanced"],
    "sampler-sqrt": ["data.sampler=sqrt"],
    "weights-inverse": ["loss.class_weights=inverse"],
    "weights-effective": ["loss.class_weights=effective"],
    "focal": ["loss.name=focal"],
    # Its gradient is a mean over the ten classes, so that the rate of the others would be a tenth.
    "bce": ["loss.name=bce", "optim.lr=10"],
    "logit-adjusted": ["loss.name=logit-adjusted"],
    # Half by drawing and half by weighing: the whole correction, with neither the many copies of
    # the first nor the large steps of the second.
    "sampler-and-weights": ["data.sampler=sqrt", f"loss.class_weights={_root_weights()}"],
}


def main() -> None:
    """Train what is missing, method by method within each seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="cifar10", help="CIFAR-10 as a data source")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=8, help="of the 12,406 images")
    parser.add_argument("--show", action="store_true", help="print the summary, train nothing")
    options = parser.parse_args()
    try:
        if not options.show:
            source = f"hf:{long_tailed(open_source(options.data))}"
            for seed in range(options.seeds):
                for method in options.methods:
                    run_if_missing(method, seed, options.epochs, source)
    except FieldmarkError as error:
        sys.exit(f"error: {error}")
    show(results_file.rows(NAME))


def settings_of(method: str, epochs: float) -> list[str]:
    """Return what is set over the recipe, beside the data and the seed."""
    return [*SETTINGS, f"train.epochs={epochs:g}", *METHODS[method]]


def run_if_missing(method: str, seed: int, epochs: float, source: str) -> None:
    """Train one method with one seed and add its row, unless the row is there."""
    settings = settings_of(method, epochs)
    key: Row = {"method": method, "seed": seed, "epochs": epochs, "settings": settings}
    if results_file.has_row(results_file.rows(NAME), key):
        return
    say(f"{method}, seed {seed}, {epochs:g} epochs")
    row = key | train([f"data.source={source}", f"train.seed={seed}", *settings])
    results_file.append_row(NAME, COMMAND, row, summarise)


def train(settings: list[str]) -> Row:
    """Return the figures of one run on the test images."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        facts = fieldmark.train(RECIPE, settings, out=Path(folder, "run")).facts
    recalls = {name: rate["value"] for name, rate in facts["per_class_accuracy"].items()}
    worst = min(recalls, key=lambda name: recalls[name])
    return {
        "balanced_accuracy": round(facts["balanced_accuracy"]["value"], 6),
        "worst_recall": recalls[worst],
        "worst_class": worst,
        "recalls": recalls,
        "updates": facts["selected_by"]["step"],
        "images_per_s": round(facts["images_per_s"], 1),
        "wall_s": round(time.monotonic() - started, 1),
    }


def summarise(rows: list[Row]) -> dict[str, Any]:
    """Return for each length and method the spread over seeds, and of the difference to plain.

    Rows of other settings than the present ones stay in the file and out of the summary.
    """
    present = [r for r in rows if r["settings"] == settings_of(r["method"], r["epochs"])]
    by_epochs: dict[str, Any] = {}
    for epochs in sorted({row["epochs"] for row in present}):
        found = {
            method: {
                r["seed"]: r for r in present if (r["method"], r["epochs"]) == (method, epochs)
            }
            for method in METHODS
        }
        by_epochs[f"{epochs:g} epochs"] = {
            method: {name: _figures(name, of_seed, found["plain"]) for name in FIGURES}
            for method, of_seed in found.items()
            if of_seed
        }
    return {
        "what": f"CIFAR-10-LT, factor {FACTOR}, {RECIPE}: recall on the 10,000 test images",
        "train_images": class_sizes(),
        "summary": by_epochs,
    }


FIGURES = ("balanced_accuracy", "worst_recall")


def _figures(name: str, of_seed: dict[int, Row], plain: dict[int, Row]) -> dict[str, Any]:
    spread = results_file.spread([row[name] for row in of_seed.values()])
    paired = [row[name] - plain[seed][name] for seed, row in of_seed.items() if seed in plain]
    if not paired or of_seed is plain:
        return dict(spread)
    return spread | {"minus_plain": results_file.spread([round(value, 6) for value in paired])}


def show(rows: list[Row]) -> None:
    """Print the summary, one line for each method: medians, and the range in brackets."""
    for epochs, methods in summarise(rows)["summary"].items():
        print(f"\n{epochs:<22}{'balanced accuracy':>24}{'worst class':>24}{'minus plain':>26}")
        for method, figures in methods.items():
            cells = [_text(figures[name]) for name in FIGURES]
            minus = figures["balanced_accuracy"].get("minus_plain")
            print(f"{method:<22}{cells[0]:>24}{cells[1]:>24}{_text(minus) if minus else '':>26}")


def _text(spread: dict[str, Any]) -> str:
    return f"{spread['median']:.2%} ({spread['min']:.2%}, {spread['max']:.2%})"


def long_tailed(source: Source) -> Path:
    """Return a folder of parquet files with the chosen train images and all test images.

    It is made once, under its final name only when it is whole, in the user's cache.

    Raises:
        DataError: the source has no test split, or too few images of a class.
    """
    # Named by what it was made from, so that another copy of the images makes another folder.
    made_from = f"{LARGEST}-{FACTOR}-{SELECTION_SEED}-{source.fingerprint[:12]}"
    train = split_of(source, "train")
    test = split_of(source, "test")
    chosen = {"train": train.subset(choose(source), "train"), "test": test}
    return subsets.written(f"long-tailed-{made_from}", chosen, source.class_names)


def choose(source: Source) -> "np.ndarray[Any, np.dtype[np.int64]]":
    """Return the indices of the train images that stay, rising; a function of the seed alone."""
    labels = split_of(source, "train").labels
    kept = []
    for label, size in enumerate(class_sizes(len(source.class_names))):
        members = np.flatnonzero(labels == label)
        if len(members) < size:
            raise DataError(
                f"{source.spec} must have {size} train images of {source.class_names[label]}. "
                f"Got {len(members)}. Give CIFAR-10 by --data."
            )
        # Raw bits and a stable sort, which numpy promises never to change.
        bits = np.random.PCG64(derive_seed("long-tailed", SELECTION_SEED, label))
        kept.append(members[np.argsort(bits.random_raw(len(members)), kind="stable")[:size]])
    return np.sort(np.concatenate(kept))


if __name__ == "__main__":
    main()

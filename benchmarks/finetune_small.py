"""What suits the recipe `finetune` on a few thousand images: its rates, statistics, augmentation.

    .venv/bin/python benchmarks/finetune_small.py --data hf:PATH_OF_CIFAR10 --weights local-dir:PATH
    .venv/bin/python benchmarks/finetune_small.py --show

Each seed draws 2,000 train images of CIFAR-10, as many of each class, and splits them anew; 3,000
other train images, the same for all, are what accuracy is measured on, so that the test split has
no part in choosing defaults. Arms take turns within a seed, and differences are taken seed by seed.
A finished run is added to benchmarks/results/finetune_small.json at once: started again, it goes
on with the runs that are missing.
"""

import argparse
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
from fieldmark.errors import FieldmarkError
from fieldmark.runtime.log import say
from fieldmark.runtime.seed import derive_seed

NAME = "finetune_small"
COMMAND = "benchmarks/finetune_small.py --data hf:PATH_OF_CIFAR10 --weights local-dir:PATH"
TRAIN_IMAGES, TEST_IMAGES = 2_000, 3_000

# Images of 32 px enlarged, whole: cropping their middle would lose a fifth.
SETTINGS = ["model.image_px=96", "eval.crop_frac=1", "package.golden=synthetic"]
# What the recipe was when the arms were compared, so that a change of it does not move them.
BEFORE = ["optim.layer_decay=1", "model.freeze=none", "augment.policy=custom"]
CROPS = ["augment.resized_crop=true", "augment.resized_crop_min_area_frac=0.35"]
CROPS += ["augment.flip=random"]
STATISTICS, FAST = ["model.freeze=statistics"], ["optim.lr=1e-3"]
ARMS: dict[str, list[str]] = {
    "before": [*BEFORE, *CROPS],
    "layer-decay-0.9": [*BEFORE, *CROPS, "optim.layer_decay=0.9"],
    "layer-decay-0.75": [*BEFORE, *CROPS, "optim.layer_decay=0.75"],
    "statistics": [*BEFORE, *CROPS, *STATISTICS],
    "policy-auto": [*BEFORE, "augment.policy=auto"],
    "statistics-fast": [*BEFORE, *CROPS, *STATISTICS, *FAST],
    "statistics-fast-decay-0.9": [*BEFORE, *CROPS, *STATISTICS, *FAST, "optim.layer_decay=0.9"],
    "statistics-decay-0.9": [*BEFORE, *CROPS, *STATISTICS, "optim.layer_decay=0.9"],
    "statistics-slow": [*BEFORE, *CROPS, *STATISTICS, "optim.lr=1.5e-4"],
    "statistics-auto": [*BEFORE, *STATISTICS, "augment.policy=auto"],
    "auto": ["augment.policy=auto"],
    "recipe": [],
}


def main() -> None:
    """Train what is missing, arm by arm within each seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="cifar10", help="CIFAR-10 as a data source")
    parser.add_argument("--weights", default="", help="pretrained weights, as a MODEL")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--show", action="store_true", help="print the summary, train nothing")
    options = parser.parse_args()
    try:
        if not options.show:
            if not options.weights:
                parser.error("give pretrained weights by --weights")
            source = open_source(options.data)
            for seed in range(options.seeds):
                for arm in options.arms:
                    run_if_missing(arm, seed, source, options.weights)
    except FieldmarkError as error:
        sys.exit(f"error: {error}")
    show(results_file.rows(NAME))


def settings_of(arm: str) -> list[str]:
    """Return what is set over the recipe, beside data, weights and seed; of two, the last holds."""
    last = {s.partition("=")[0]: s for s in [*SETTINGS, *ARMS[arm]]}
    return list(last.values())


def run_if_missing(arm: str, seed: int, source: Source, weights: str) -> None:
    """Train one arm with one seed and add its row, unless the row is there."""
    key: Row = {"arm": arm, "seed": seed, "recipe": fingerprint(arm)}
    if results_file.has_row(results_file.rows(NAME), key):
        return
    say(f"{arm}, seed {seed}")
    about = [f"data.source=hf:{chosen(source, seed)}", f"model.pretrained={weights}"]
    seeds = [f"train.seed={seed}", f"data.split_seed={seed}"]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        settings = [*about, *seeds, *settings_of(arm)]
        facts = fieldmark.train("finetune", settings, out=Path(folder, "run")).facts
    row = key | {
        "top1_accuracy": facts["top1_accuracy"]["value"],
        "loss": facts["loss"],
        "updates": facts["selected_by"]["step"],
        "wall_s": round(time.monotonic() - started, 1),
        "weights": Path(weights.rpartition(":")[2]).name,
    }
    results_file.append_row(NAME, COMMAND, row, summarise)


def fingerprint(arm: str) -> str:
    """Return what tells an arm's settings: rows of other settings are not of the comparison."""
    from fieldmark.cookbook import load_recipe
    from fieldmark.runtime.files import sha256_bytes

    config = load_recipe("finetune", ["model.pretrained=local-dir:any", *settings_of(arm)])
    return sha256_bytes(config.model_dump_json().encode())[:12]


def chosen(source: Source, seed: int) -> Path:
    """Return the drawn train images and the 3,000 that all are measured on, as a folder."""
    images = split_of(source, "train")
    num_classes = len(source.class_names)
    train, test = [], []
    for label in range(num_classes):
        members = np.flatnonzero(images.labels == label)
        kept = _shuffled(members, "finetune-small-test", 0, label)
        test.append(kept[: TEST_IMAGES // num_classes])
        rest = _shuffled(kept[TEST_IMAGES // num_classes :], "finetune-small-train", seed, label)
        train.append(rest[: TRAIN_IMAGES // num_classes])
    splits = {
        "train": images.subset(np.sort(np.concatenate(train)), "train"),
        "test": images.subset(np.sort(np.concatenate(test)), "test"),
    }
    made_from = f"{TRAIN_IMAGES}-{TEST_IMAGES}-{seed}-{source.fingerprint[:12]}"
    return subsets.written(f"finetune-small-{made_from}", splits, source.class_names)


def _shuffled(indices: Any, purpose: str, seed: int, label: int) -> Any:
    # Raw bits and a stable sort, which numpy promises never to change.
    bits = np.random.PCG64(derive_seed(purpose, seed, label))
    return indices[np.argsort(bits.random_raw(len(indices)), kind="stable")]


def summarise(rows: list[Row]) -> dict[str, Any]:
    """Return for each arm the spread of the accuracy, and of the difference to `before`."""
    of_arm = {
        arm: {
            row["seed"]: row["top1_accuracy"]
            for row in rows
            if (row["arm"], row["recipe"]) == (arm, fingerprint(arm))
        }
        for arm in ARMS
    }
    before = of_arm["before"]
    summary: dict[str, Any] = {}
    for arm, accuracies in of_arm.items():
        if accuracies:
            summary[arm] = {"top1_accuracy": results_file.spread(list(accuracies.values()))}
            paired = [round(a - before[s], 6) for s, a in accuracies.items() if s in before]
            if arm != "before" and paired:
                summary[arm]["minus_before"] = results_file.spread(paired)
    return {
        "what": f"recipe finetune on {TRAIN_IMAGES:,} train images of CIFAR-10 at 96 px: "
        f"top-1 accuracy on {TEST_IMAGES:,} other train images",
        "summary": summary,
    }


def show(rows: list[Row]) -> None:
    """Print the summary, a line for each arm: medians, and the range in brackets."""
    for arm, figures in summarise(rows)["summary"].items():
        cells = [f"{f['median']:+.2%} ({f['min']:.2%}, {f['max']:.2%})" for f in figures.values()]
        print(f"{arm:<20}" + "".join(f"{cell:>28}" for cell in cells))


if __name__ == "__main__":
    main()

"""What suits the recipe `finetune` on few images: its rates, statistics, augmentation.

    .venv/bin/python benchmarks/finetune_small.py --data hf:PATH_OF_CIFAR10 --weights local-dir:PATH
    .venv/bin/python benchmarks/finetune_small.py --photographs FOLDER --weights local-dir:PATH
    .venv/bin/python benchmarks/finetune_small.py --show

Of CIFAR-10 each seed draws 2,000 train images, as many of each class, and splits them anew; 3,000
other train images, the same for all, are what accuracy is measured on, so that the test split has
no part in choosing defaults. Photographs (scripts/superclasses.py makes such a folder) are split
anew by each seed, and the recipe's own test part, a few dozen, is what accuracy is measured on.

Arms take turns within a seed, and differences are taken seed by seed. A finished run is added to
benchmarks/results/finetune_small.json at once: started again, it goes on with the runs that are
missing.
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

CIFAR10, PHOTOGRAPHS = "cifar10", "photographs"
# Images of 32 px enlarged, whole: cropping their middle would lose a fifth.
SETTINGS = {
    CIFAR10: ["model.image_px=96", "eval.crop_frac=1", "package.golden=synthetic"],
    PHOTOGRAPHS: ["package.golden=synthetic"],
}
# What the recipe was when the arms were compared, so that a change of it does not move them.
BEFORE = ["optim.layer_decay=1", "optim.lr=3e-4", "model.freeze=none", "augment.policy=custom"]
CROPS = ["augment.resized_crop=true", "augment.resized_crop_min_area_frac=0.35"]
CROPS += ["augment.flip=random"]
AUTO, DECAY = [*BEFORE, "model.freeze=auto", "augment.policy=auto"], "optim.layer_decay=0.9"
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
    "auto": AUTO,
    "auto-decay-0.9": [*AUTO, DECAY],
    "auto-decay-0.95": [*AUTO, "optim.layer_decay=0.95"],  # the recipe as it is
    "auto-faster-decay-0.9": [*AUTO, DECAY, "optim.lr=6e-4"],
    "auto-crops-0.5": [*AUTO, "augment.resized_crop_min_area_frac=0.5"],
}


def main() -> None:
    """Train what is missing, arm by arm within each seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    images = parser.add_mutually_exclusive_group()
    images.add_argument("--data", default="cifar10", help="CIFAR-10 as a data source")
    images.add_argument("--photographs", type=Path, help="a folder of photographs, in classes")
    parser.add_argument("--weights", default="", help="pretrained weights, as a MODEL")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--show", action="store_true", help="print the summary, train nothing")
    options = parser.parse_args()
    try:
        if not options.show:
            if not options.weights:
                parser.error("give pretrained weights by --weights")
            for seed in range(options.seeds):
                if options.photographs:
                    images, data = PHOTOGRAPHS, f"folder:{options.photographs}"
                else:
                    images, data = CIFAR10, f"hf:{chosen(open_source(options.data), seed)}"
                for arm in options.arms:
                    run_if_missing(images, arm, seed, data, options.weights)
    except FieldmarkError as error:
        sys.exit(f"error: {error}")
    show(results_file.rows(NAME))


def settings_of(images: str, arm: str) -> list[str]:
    """Return what is set over the recipe, beside data, weights and seed; of two, the last holds."""
    last = {s.partition("=")[0]: s for s in [*SETTINGS[images], *ARMS[arm]]}
    return list(last.values())


def run_if_missing(images: str, arm: str, seed: int, data: str, weights: str) -> None:
    """Train one arm with one seed and add its row, unless the row is there."""
    key: Row = {"images": images, "arm": arm, "seed": seed, "recipe": fingerprint(images, arm)}
    if results_file.has_row(results_file.rows(NAME), key):
        return
    say(f"{images}, {arm}, seed {seed}")
    about = [f"data.source={data}", f"model.pretrained={weights}"]
    seeds = [f"train.seed={seed}", f"data.split_seed={seed}"]
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        settings = [*about, *seeds, *settings_of(images, arm)]
        facts = fieldmark.train("finetune", settings, out=Path(folder, "run")).facts
    row = key | {
        "top1_accuracy": facts["top1_accuracy"]["value"],
        "test_images": facts["top1_accuracy"]["n"],
        "loss": facts["loss"],
        "updates": facts["selected_by"]["step"],
        "wall_s": round(time.monotonic() - started, 1),
        "weights": Path(weights.rpartition(":")[2]).name,
    }
    results_file.append_row(NAME, COMMAND, row, summarise)


def fingerprint(images: str, arm: str) -> str:
    """Return what tells an arm's settings: rows of other settings are not of the comparison."""
    from fieldmark.cookbook import load_recipe
    from fieldmark.runtime.files import sha256_bytes

    config = load_recipe("finetune", ["model.pretrained=local-dir:any", *settings_of(images, arm)])
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
    """Return for each arm the accuracy and the loss, and their differences to arm `auto`."""
    return {
        "what": f"recipe finetune on {TRAIN_IMAGES:,} train images of CIFAR-10 at 96 px, measured "
        f"on {TEST_IMAGES:,} others; and on photographs, measured on the recipe's test part",
        "summary": {images: _arms(rows, images) for images in SETTINGS},
    }


def _arms(rows: list[Row], images: str) -> dict[str, Any]:
    of_arm = {
        arm: {
            row["seed"]: row
            for row in rows
            if (row["images"], row["arm"], row["recipe"]) == (images, arm, fingerprint(images, arm))
        }
        for arm in ARMS
    }
    base = of_arm["auto"]
    summary: dict[str, Any] = {}
    for arm, of_seed in of_arm.items():
        if not of_seed:
            continue
        summary[arm] = {}
        for figure in ("top1_accuracy", "loss"):
            values = [row[figure] for row in of_seed.values()]
            summary[arm][figure] = results_file.spread(values)
            paired = [row[figure] - base[s][figure] for s, row in of_seed.items() if s in base]
            if arm != "auto" and paired:
                minus = results_file.spread([round(difference, 6) for difference in paired])
                summary[arm][f"{figure}_minus_auto"] = minus
    return summary


def show(rows: list[Row]) -> None:
    """Print the summary, a line for each arm: medians, and the range in brackets."""
    for images, arms in summarise(rows)["summary"].items():
        print(images)
        for arm, figures in arms.items():
            cells = [
                f"{name} {f['median']:.3f} ({f['min']:.3f}, {f['max']:.3f}; {f['n']})"
                for name, f in figures.items()
            ]
            print(f"  {arm:<26}" + "  ".join(cells))


if __name__ == "__main__":
    main()

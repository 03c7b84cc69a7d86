"""The race: CIFAR-10 from scratch on a CPU, our fast recipe against airbench's settings.

    .venv/bin/python benchmarks/race.py --data hf:PATH_OF_CIFAR10 --arms ours-12 plain-12 --seeds 3
    .venv/bin/python benchmarks/race.py --data hf:PATH_OF_CIFAR10 --arms ours --seeds 2
    .venv/bin/python benchmarks/race.py --data hf:PATH_OF_CIFAR10 --arms tutorial --seeds 1
    .venv/bin/python benchmarks/race.py --show

Arms: `ours` is the recipe cifar10-fast94 to its end and `plain` the settings of airbench94 with
Muon (Jordan 2024) in the same trainer: 8 epochs at 32 px in updates of 2,000. `ours-12` and
`plain-12` are both fitted to 12 minutes by train.max_minutes. `tutorial` is the loop that tutorials
teach (ResNet-18, batch 128, PIL and a DataLoader) timed over 200 updates: how long its 200 epochs
would take here is extrapolated, and its 94.5 % is the tutorial's figure for the original images.

Arms take turns within a seed, in turning order, so that a drift of the machine meets all. Test is
looked at once, at the end of each run. A finished run is added to benchmarks/results/race.json at
once: started again, the race goes on with the runs that are missing.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import results_file
import train_step
from results_file import Row

import fieldmark
from fieldmark.errors import FieldmarkError
from fieldmark.runtime.log import say

NAME = "race"
COMMAND = "benchmarks/race.py --data hf:PATH_OF_CIFAR10"
RECIPE = "cifar10-fast94"
PLAIN = [
    "train.batch_size=2000",
    "train.accumulation_steps=1",
    "augment.sizes=[]",
    f"optim.weight_decay={2e-6 * 2000 / 0.053!r}",
    "optim.filter_lr=0.24",
    "model.args.bn_momentum=0.4",
]
ARMS: dict[str, list[str]] = {
    "ours": [],
    "plain": [*PLAIN, "train.epochs=8"],
    "ours-12": ["train.max_minutes=12"],
    "plain-12": [*PLAIN, "train.max_minutes=12"],
}
TUTORIAL_UPDATES = 200
TUTORIAL_TOTAL = 200 * (50_000 // train_step.BATCH_SIZE)


def main() -> None:
    """Run what is missing, arm by arm within each seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="cifar10", help="CIFAR-10 as a data source")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, "tutorial"], default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--show", action="store_true", help="print the summary, run nothing")
    options = parser.parse_args()
    try:
        for seed in range(0 if options.show else options.seeds):
            turn = seed % len(options.arms)
            for arm in options.arms[turn:] + options.arms[:turn]:
                run_if_missing(arm, seed, options.data)
    except FieldmarkError as error:
        sys.exit(f"error: {error}")
    for arm, figures in summarise(results_file.rows(NAME))["summary"].items():
        print(arm, figures)


def run_if_missing(arm: str, seed: int, data: str) -> None:
    """Run one arm with one seed and add its row, unless the row is there."""
    settings = ARMS.get(arm, [])
    if results_file.has_row(_present(results_file.rows(NAME)), {"arm": arm, "seed": seed}):
        return
    say(f"{arm}, seed {seed}")
    row = time_tutorial(data) if arm == "tutorial" else train(data, seed, settings)
    row = {"arm": arm, "seed": seed, "recipe": fingerprint(arm)} | row
    results_file.append_row(NAME, COMMAND, row, summarise)


def fingerprint(arm: str) -> str:
    """Return what tells the settings of an arm: rows of other settings are not of the race."""
    if arm == "tutorial":
        return f"{TUTORIAL_UPDATES} updates"
    from fieldmark.cookbook import load_recipe
    from fieldmark.runtime.files import sha256_bytes

    told = load_recipe(RECIPE, ARMS[arm]).model_dump_json().encode()
    return sha256_bytes(told)[:12]


def train(data: str, seed: int, settings: list[str]) -> Row:
    """Return the figures of one run on the test images."""
    started = time.monotonic()
    settings = [
        f"data.source={data}",
        f"train.seed={seed}",
        "package.golden=synthetic",
        *settings,
    ]
    with tempfile.TemporaryDirectory() as folder:
        facts = fieldmark.train(RECIPE, settings, out=Path(folder, "run")).facts
    return {
        "top1_accuracy": facts["top1_accuracy"]["value"],
        "six_views": facts["six_views"]["top1_accuracy"]["value"],
        "train_s": round(facts["train_s"], 1),
        "wall_s": round(time.monotonic() - started, 1),
        "images": facts["cost"]["images"],
        "pflop": facts["cost"]["pflop"],
        "images_per_s": round(facts["images_per_s"], 1),
    }


def time_tutorial(data: str) -> Row:
    """Return the speed of the loop that tutorials teach, and how long its 200 epochs would take."""
    updates = train_step.textbook(*train_step.load(data))
    next(updates)
    started = time.perf_counter()
    for _ in range(TUTORIAL_UPDATES):
        next(updates)
    seconds = time.perf_counter() - started
    return {
        "update_s": round(seconds / TUTORIAL_UPDATES, 4),
        "images_per_s": round(TUTORIAL_UPDATES * train_step.BATCH_SIZE / seconds, 1),
        "extrapolated_hours": round(seconds / TUTORIAL_UPDATES * TUTORIAL_TOTAL / 3600, 1),
    }


def _present(rows: list[Row]) -> list[Row]:
    """The rows of the settings as they are now."""
    return [row for row in rows if row["recipe"] == fingerprint(row["arm"])]


def summarise(rows: list[Row]) -> dict[str, Any]:
    """Return for each arm the spread over seeds of what was measured."""
    present = _present(rows)
    summary: dict[str, Any] = {}
    for arm in [*ARMS, "tutorial"]:
        of_arm = [row for row in present if row["arm"] == arm]
        names = [n for n in FIGURES if of_arm and n in of_arm[0]]
        if of_arm:
            summary[arm] = {n: results_file.spread([row[n] for row in of_arm]) for n in names}
    return {
        "what": "CIFAR-10 from scratch on a CPU: accuracy on the 10,000 test images and time",
        "summary": summary,
    }


FIGURES = (
    "top1_accuracy",
    "six_views",
    "train_s",
    "wall_s",
    "images",
    "pflop",
    "images_per_s",
    "update_s",
    "extrapolated_hours",
)


if __name__ == "__main__":
    main()

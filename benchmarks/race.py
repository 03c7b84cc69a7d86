"""The race: CIFAR-10 from scratch on a CPU, our fast recipe against airbench's settings.

    .venv/bin/python benchmarks/race.py --data hf:PATH_OF_CIFAR10 --arms ours-12 plain-12 --seeds 3
    .venv/bin/python benchmarks/race.py --data hf:PATH_OF_CIFAR10 --arms ours rival --seeds 2
    .venv/bin/python benchmarks/race.py --data hf:PATH_OF_CIFAR10 --arms tutorial --seeds 1
    .venv/bin/python benchmarks/race.py --show

Arms: `ours` is the recipe cifar10-fast94 to its end and `plain` the settings of airbench94 with
Muon (Jordan 2024) in the same trainer: 8 epochs at 32 px in updates of 2,000. `wide` is the recipe
with a wider network for 14 epochs, twice its computation: the search for a point more. `ours-12`
and `plain-12` are both fitted to 12 minutes by train.max_minutes.

The recipe computes in bfloat16 where the processor has instructions for it, and in float32
elsewhere: rows say which, and rows of different machines are not one spread.

Three arms are timed and not run to their end; each in a process of its own, where glibc treats
memory as it does by default. `rival`: airbench94's settings in plain torch (airbench94.py) and
float32, timed over 10 of their 200 updates; `rival-bfloat16`: the same under torch's autocast.
`tutorial`: the loop that tutorials teach (ResNet-18, batch 128, PIL and a
DataLoader) timed over 200 updates; how long its 200 epochs would take here is extrapolated, and its
94.5 % is the tutorial's figure for the original images.

Arms take turns within a seed, in turning order, so that a drift of the machine meets all. Test is
looked at once, at the end of each run. A finished run is added to benchmarks/results/race.json at
once: started again, the race goes on with the runs that are missing.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import airbench94
import results_file
import torch
import train_step
from results_file import Row

import fieldmark
from fieldmark.errors import FieldmarkError
from fieldmark.runtime.cpu import num_cores
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
    "wide": ["model.args.widths=[96,320,320]", "train.epochs=14"],
    "ours-12": ["train.max_minutes=12"],
    "plain-12": [*PLAIN, "train.max_minutes=12"],
}
# Arms that are timed: updates before the clock, under it, and to the end; images of an update.
TIMED = {
    "rival": (2, 10, airbench94.UPDATES, airbench94.BATCH_SIZE),
    "rival-bfloat16": (2, 10, airbench94.UPDATES, airbench94.BATCH_SIZE),
    "tutorial": (1, 200, 200 * (50_000 // train_step.BATCH_SIZE), train_step.BATCH_SIZE),
}


def main() -> None:
    """Run what is missing, arm by arm within each seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="cifar10", help="CIFAR-10 as a data source")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS, *TIMED], default=list(ARMS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--keep", type=Path, help="keep runs in this folder, as ARM-SEED")
    parser.add_argument("--show", action="store_true", help="print the summary, run nothing")
    parser.add_argument("--time", choices=TIMED, help="time one arm in this process; print it")
    options = parser.parse_args()
    if options.time:
        print(json.dumps(time_updates(options.time, options.data)))
        return
    try:
        for seed in range(0 if options.show else options.seeds):
            turn = seed % len(options.arms)
            for arm in options.arms[turn:] + options.arms[:turn]:
                run_if_missing(arm, seed, options.data, options.keep)
    except FieldmarkError as error:
        sys.exit(f"error: {error}")
    for arm, figures in summarise(results_file.rows(NAME))["summary"].items():
        print(arm, figures)


def run_if_missing(arm: str, seed: int, data: str, keep: Path | None) -> None:
    """Run one arm with one seed and add its row, unless the row is there."""
    settings = ARMS.get(arm, [])
    if results_file.has_row(_present(results_file.rows(NAME)), {"arm": arm, "seed": seed}):
        return
    say(f"{arm}, seed {seed}")
    row = (
        timed_apart(arm, data)
        if arm in TIMED
        else train(data, seed, settings, keep and keep / f"{arm}-{seed}")
    )
    row = {"arm": arm, "seed": seed, "recipe": fingerprint(arm)} | row
    results_file.append_row(NAME, COMMAND, row, summarise)


def fingerprint(arm: str) -> str:
    """Return what tells the settings of an arm: rows of other settings are not of the race."""
    if arm in TIMED:
        return f"{TIMED[arm][1]} updates"
    from fieldmark.cookbook import load_recipe
    from fieldmark.runtime.files import sha256_bytes

    told = load_recipe(RECIPE, ARMS[arm]).model_dump_json().encode()
    return sha256_bytes(told)[:12]


def train(data: str, seed: int, settings: list[str], out: Path | None) -> Row:
    """Return the figures of one run on the test images; `out` None: the run is not kept."""
    started = time.monotonic()
    settings = [
        f"data.source={data}",
        f"train.seed={seed}",
        "package.golden=synthetic",
        *settings,
    ]
    with tempfile.TemporaryDirectory() as folder:
        facts = fieldmark.train(RECIPE, settings, out=out or Path(folder, "run")).facts
    return {
        "top1_accuracy": facts["top1_accuracy"]["value"],
        "six_views": facts["six_views"]["top1_accuracy"]["value"],
        "train_s": round(facts["train_s"], 1),
        "wall_s": round(time.monotonic() - started, 1),
        "images": facts["cost"]["images"],
        "pflop": facts["cost"]["pflop"],
        "images_per_s": round(facts["images_per_s"], 1),
        "precision": facts["precision"],
    }


def timed_apart(arm: str, data: str) -> Row:
    """Return what `time_updates` finds in a process of its own."""
    command = [sys.executable, __file__, "--time", arm, "--data", data]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: Row = json.loads(done.stdout.splitlines()[-1])
    return found


def time_updates(arm: str, data: str) -> Row:
    """Return the speed of a loop, and how long all its updates would take at that speed."""
    warm_up, timed, total, batch_size = TIMED[arm]
    updates: Iterator[object]
    if arm.startswith("rival"):
        torch.set_num_threads(num_cores())
        dtype = torch.bfloat16 if arm == "rival-bfloat16" else torch.float32
        updates = airbench94.updates(*train_step.load(data, limit=50_000), dtype=dtype)
    else:
        updates = train_step.textbook(*train_step.load(data))
    for _ in range(warm_up):
        next(updates)
    started = time.perf_counter()
    for _ in range(timed):
        next(updates)
    seconds = (time.perf_counter() - started) / timed
    return {
        "update_s": round(seconds, 4),
        "images_per_s": round(batch_size / seconds, 1),
        "extrapolated_s": round(seconds * total),
    }


def _present(rows: list[Row]) -> list[Row]:
    """The rows of the settings as they are now."""
    return [row for row in rows if row["recipe"] == fingerprint(row["arm"])]


def summarise(rows: list[Row]) -> dict[str, Any]:
    """Return for each arm the spread over seeds of what was measured."""
    present = _present(rows)
    summary: dict[str, Any] = {}
    for arm in [*ARMS, *TIMED]:
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
    "extrapolated_s",
)


if __name__ == "__main__":
    main()

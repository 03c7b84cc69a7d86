"""Real accidents on CIFAR-10: what a run makes of bad images, spoilt weights, and a wild rate.

    .venv/bin/python benchmarks/accidents.py --data hf:PATH_OF_CIFAR10

The recipe is cifar10-smoke (4 epochs of 90 updates), once for each arm:

clean    nothing happens
images   from the middle of the second epoch on, 20 updates have images overwritten with infinity
weights  in the middle of the third epoch all weights are overwritten with 1e38, once
rate     from update 300 on the rate is 1,000 times too high, again after each rollback

The first three must end with a package; their test accuracies are compared. The last must stop and
say what is wrong. A finished arm is added to benchmarks/results/accidents.json at once; rows of
another trainer's code stay there and out of the summary.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import results_file
from results_file import Row
from torch import Tensor

import fieldmark
from fieldmark.data.resident import ResidentBatches
from fieldmark.errors import FieldmarkError, NonFiniteLoss
from fieldmark.runtime.files import read_json, sha256_bytes
from fieldmark.runtime.log import say
from fieldmark.training import loop, plan

NAME = "accidents"
COMMAND = "benchmarks/accidents.py --data hf:PATH_OF_CIFAR10"
RECIPE = "cifar10-smoke"
BAD_IMAGES = range(136, 156)
SPOIL_AT = 226
WILD_FROM, WILD_FACTOR = 300, 1000


def main() -> None:
    """Run the arms that are missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="cifar10", help="CIFAR-10 as a data source")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for arm in options.arms:
        key = {"arm": arm, "seed": options.seed, "trainer": trainer()}
        if not results_file.has_row(results_file.rows(NAME), key):
            say(f"{arm}, seed {options.seed}")
            try:
                row = key | run(arm, options.seed, options.data)
            except FieldmarkError as error:
                sys.exit(f"error: {error}")
            results_file.append_row(NAME, COMMAND, row, summarise)
    print(summarise(results_file.rows(NAME))["summary"])


def trainer() -> str:
    """Return what tells the code that trains: rows of another are not of the present."""
    files = sorted(Path(loop.__file__).parent.glob("*.py"))
    return sha256_bytes(b"".join(path.read_bytes() for path in files))[:12]


def run(arm: str, seed: int, data: str) -> Row:
    """Return what one arm ended with."""
    settings = [f"data.source={data}", f"train.seed={seed}"]
    with tempfile.TemporaryDirectory() as folder, ARMS[arm]():
        out = Path(folder, "run")
        try:
            facts = fieldmark.train(RECIPE, settings, out=out).facts
        except NonFiniteLoss as error:
            found = read_json(out / "diagnosis.json")
            return {"stopped": str(error).replace(folder, "."), "cause": found["cause"]}
        lines = (out / "metrics.jsonl").read_text().splitlines()
    return {
        "top1_accuracy": facts["top1_accuracy"]["value"],
        "rollbacks": facts["rollbacks"],
        "skipped": sum('"skipped"' in line for line in lines),
    }


@contextmanager
def clean() -> Iterator[None]:
    """Let nothing happen."""
    yield


@contextmanager
def bad_images() -> Iterator[None]:
    """Overwrite the images of some updates with infinity."""
    batches = ResidentBatches.batches

    def and_spoil(self: ResidentBatches, start_step: int) -> Iterator[tuple[Tensor, Tensor]]:
        for step, (images, targets) in enumerate(batches(self, start_step), start_step + 1):
            yield (images.fill_(float("inf")) if step in BAD_IMAGES else images), targets

    with mock.patch.object(ResidentBatches, "batches", and_spoil):
        yield


@contextmanager
def spoilt_weights() -> Iterator[None]:
    """Overwrite all weights once."""
    set_rates, left = loop.set_rates, [1]

    def and_spoil(rule: loop.UpdateRule, step: int, factor: float) -> None:
        set_rates(rule, step, factor)
        if step + 1 == SPOIL_AT and left:
            left.clear()
            for parameter in rule.network.parameters():
                parameter.data.fill_(1e38)

    with mock.patch.object(loop, "set_rates", and_spoil):
        yield


@contextmanager
def wild_rate() -> Iterator[None]:
    """Raise the rate of all later updates."""
    lr_factor = plan.lr_factor

    def too_high(config: Any, step: int, **rest: Any) -> float:
        return lr_factor(config, step, **rest) * (WILD_FACTOR if step >= WILD_FROM else 1)

    with mock.patch.object(plan, "lr_factor", too_high):
        yield


ARMS = {"clean": clean, "images": bad_images, "weights": spoilt_weights, "rate": wild_rate}


def summarise(rows: list[Row]) -> dict[str, Any]:
    """Return each arm's figures, and its accuracy minus that of the clean run of its seed."""
    rows = [row for row in rows if row.get("trainer") == trainer()]
    clean_of = {row["seed"]: row["top1_accuracy"] for row in rows if row["arm"] == "clean"}
    summary = []
    for row in rows:
        shown = {name: row[name] for name in SHOWN if name in row}
        if "top1_accuracy" in row and row["seed"] in clean_of:
            shown["minus_clean"] = round(row["top1_accuracy"] - clean_of[row["seed"]], 4)
        summary.append(shown)
    return {"what": f"{RECIPE} with accidents: accuracy on the 10,000 test images"} | {
        "summary": summary
    }


SHOWN = ("arm", "seed", "top1_accuracy", "rollbacks", "skipped", "cause")


if __name__ == "__main__":
    main()

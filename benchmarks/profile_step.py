"""Where the time of a training update goes, by kind of operation.

    .venv/bin/python benchmarks/profile_step.py --data hf:PATH_OF_CIFAR10

Updates of the recipe cifar10-fast94 at the image sizes it uses, and at 32 px in updates of 2,000 as
airbench94 makes them, under torch's profiler; shares are of the processor time in operations, and
images per second are measured without the profiler. Each case in float32, and in bfloat16 where the
processor has instructions for it. Writes benchmarks/results/profile_step.json.
"""

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import race
import results_file
import torch
from torch.profiler import ProfilerActivity, profile

from fieldmark.cookbook import load_recipe
from fieldmark.training.device import multiplies_bfloat16
from fieldmark.training.loop import train_steps
from fieldmark.training.run_folder import RunFolder
from fieldmark.training.session import Session
from fieldmark.training.start import start_session

CASES: dict[str, list[str]] = {
    "32 px, 500 in parts of 250": ["augment.sizes=[]"],
    "24 px, 500 in parts of 250": ["augment.sizes=[[0.0,24]]"],
    "32 px, 500 at once": ["augment.sizes=[]", "train.accumulation_steps=1"],
    "32 px, 2,000 at once": race.PLAIN,
    "32 px, 2,000 in parts of 250": [*race.PLAIN, "train.accumulation_steps=8"],
}
# What an operation's name contains -> the kind it is counted as; the first that fits.
KINDS = {
    "convolution": ("convolution",),
    "batch norm": ("batch_norm",),
    "GELU": ("gelu",),
    "pooling": ("pool", "amax"),
    "matrix products (Muon, head)": ("mm", "addmm"),
    "augmentation": ("gather", "index", "flip", "where", "upsample", "grid", "pad"),
}
WARM_UP = 2


def main() -> None:
    """Profile each case and write the results file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="cifar10", help="CIFAR-10 as a data source")
    parser.add_argument("--images", type=int, default=10_000, help="timed images of each case")
    options = parser.parse_args()
    precisions = ["float32"]
    if multiplies_bfloat16(torch.device("cpu")):
        precisions.append("bfloat16")
    found = {
        f"{name}, {precision}": measure(
            options.data, [*told, f"train.precision={precision}"], options.images
        )
        for name, told in CASES.items()
        for precision in precisions
    }
    results_file.write(
        "profile_step",
        f"benchmarks/profile_step.py --images {options.images}",
        {"what": "cifar10-fast94: share of processor time by kind of operation", "cases": found},
    )
    for name, figures in found.items():
        print(name, figures)


def measure(data: str, settings: list[str], num_images: int) -> dict[str, Any]:
    """Return speed and shares of one case."""
    config = load_recipe(race.RECIPE, [*settings, f"data.source={data}"])
    with (
        tempfile.TemporaryDirectory() as folder,
        RunFolder.create(Path(folder, "run"), config) as run,
    ):
        session = start_session(run, config, lambda *_, **__: None).session
        size = session.train.examples_per_update
        num_steps = max(2, num_images // size)
        advance(session, 0, WARM_UP)
        started = time.perf_counter()
        advance(session, WARM_UP, num_steps)
        seconds = time.perf_counter() - started
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            advance(session, WARM_UP, 2)
    spent: dict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        spent[kind_of(event.key)] += event.self_cpu_time_total
    whole = sum(spent.values())
    shares = {kind: round(value / whole, 3) for kind, value in spent.items()}
    return {
        "images_per_s": round(num_steps * size / seconds, 1),
        "shares": dict(sorted(shares.items(), key=lambda item: -item[1])),
    }


def advance(session: Session, start: int, num_steps: int) -> None:
    """Make updates, and wait for them."""
    batches = session.data.batches(start)
    for step in train_steps(session.rule, batches, start_step=start, total_steps=start + num_steps):
        float(step.loss)


def kind_of(operation: str) -> str:
    """Return the kind that an operation's time is counted as."""
    name = operation.lower()
    found = (kind for kind, words in KINDS.items() if any(word in name for word in words))
    return next(found, "other")


if __name__ == "__main__":
    main()

"""Pretrained weights on CIFAR-10: a linear probe of the features, and training the whole network.

    .venv/bin/python benchmarks/finetune.py probe --data hf:PATH --weights local-dir:PATH
    .venv/bin/python benchmarks/finetune.py finetune --data hf:PATH --weights local-dir:PATH

Each appends a row to benchmarks/results/finetune.json: the settings over the recipe, the wall time
and CPU time of the command that a user types, and the accuracy on the source's own test split with
its 95 % interval. Fine-tuning is fitted to an hour with its evaluation, by train.max_minutes. One
run a row: the interval says nothing of the spread between seeds. Nothing is held out for
validation, so that all training images are used: cross-validation chooses the probe's penalty, and
nothing chooses among the fine-tuned weights, which are the last.

Further settings replace those below: benchmarks/finetune.py probe ... model.image_px=96
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import results_file

PROGRAM = str(Path(sys.executable).with_name("fieldmark"))
COMMAND = "benchmarks/finetune.py JOB --data SOURCE --weights MODEL [section.key=value]..."
KEPT = (
    "top1_accuracy",
    "loss",
    "measured_on",
    "probe",
    "images_per_s",
    "train_s",
    "cost",
    "six_views",
)

# An image of 32 px is enlarged whole: cropping its middle would lose a fifth of it.
SHARED = ["data.val_frac=0", "eval.crop_frac=1"]
JOBS = {
    "probe": ("linear-probe", [*SHARED, "model.image_px=128", "probe.views=mirrored"]),
    # The recipe for EfficientNet-B0, which lite0 is a simpler form of, cut to an hour: three epochs
    # need less noise and smaller updates than twelve.
    "finetune": (
        "cifar10-efficientnet-b0",
        [
            *SHARED,
            "train.max_minutes=51",
            "train.batch_size=64",
            "optim.lr=1.5e-3",
            "model.drop_path_rate=0.05",
            "model.drop_rate=0.1",
            "eval.views=six",
        ],
    ),
}


def main() -> None:
    """Run one job and append its row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", choices=list(JOBS))
    parser.add_argument("--data", required=True, help="the data source, with a test split")
    parser.add_argument("--weights", required=True, help="pretrained weights, as a MODEL")
    parser.add_argument("--out", type=Path, help="keep the run here [a temporary folder]")
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args()
    recipe, settings = JOBS[options.job]
    settings = replaced(settings, options.settings)
    about = [f"data.source={options.data}", f"model.pretrained={options.weights}"]
    with tempfile.TemporaryDirectory() as folder:
        out = options.out or Path(folder) / "run"
        figures = measure(["train", recipe, *about, *settings, "--out", str(out)])
    row = {
        "job": options.job,
        "recipe": recipe,
        "settings": settings,
        "weights": Path(options.weights.rpartition(":")[2]).name,
        "data": Path(options.data.rpartition(":")[2]).name,
        **figures,
    }
    append_row("finetune", COMMAND, row)


def replaced(settings: list[str], changes: list[str]) -> list[str]:
    """Return the settings, those that `changes` names again replaced."""
    names = {change.partition("=")[0] for change in changes}
    return [s for s in settings if s.partition("=")[0] not in names] + changes


def measure(arguments: list[str]) -> dict[str, Any]:
    """Run a command; return its wall and CPU time and its figures."""
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([PROGRAM, *arguments, "--json"], stdout=subprocess.PIPE, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    facts = json.loads(done.stdout)
    train_images = sum(row["train"] for row in facts["class_counts"])
    times = {"wall_s": round(time.monotonic() - started, 1), "cpu_s": round(cpu_s, 1)}
    return {**times, "train_images": train_images} | {k: facts[k] for k in KEPT if k in facts}


def append_row(name: str, command: str, row: dict[str, Any]) -> None:
    """Add a row to benchmarks/results/NAME.json, with the machine and the date."""
    path = results_file.RESULTS / f"{name}.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    row = {"date": time.strftime("%F"), "machine": results_file.machine(), **row}
    results_file.write(name, command, {"rows": [*rows, row]})


if __name__ == "__main__":
    main()

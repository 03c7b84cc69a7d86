"""The main job, timed and measured: from images to a verified package, by the commands users type.

    .venv/bin/python benchmarks/main_job.py digits
    .venv/bin/python benchmarks/main_job.py cifar10-smoke --data hf:PATH_OF_CIFAR10
    .venv/bin/python benchmarks/main_job.py finetune --data folder:PHOTOS --weights local-dir:PATH
    .venv/bin/python benchmarks/main_job.py imagenet --data folder:VAL --weights local-dir:PATH

Each writes its row into benchmarks/results/main_job.json. One run a row: times are what one machine
took once; accuracies carry their intervals, which say nothing of the spread between seeds.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import results_file

PROGRAM = str(Path(sys.executable).with_name("fieldmark"))
KEPT = ("top1_accuracy", "top5_accuracy", "loss", "num_examples", "measured_on", "images_per_s")


def main() -> None:
    """Run one job and write its row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", choices=["digits", "cifar10-smoke", "finetune", "imagenet"])
    parser.add_argument("--data", default="", help="the data source")
    parser.add_argument("--weights", default="", help="pretrained weights, as a MODEL")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.job == "imagenet":
            row = {"evaluate": job(["evaluate", options.weights, "--data", options.data])}
        else:
            out = str(Path(folder) / "run")
            settings = [f"data.source={options.data}"] if options.data else []
            settings += [f"model.pretrained={options.weights}"] if options.weights else []
            row = {
                "train": job(["train", options.job, *settings, "--out", out]),
                "export": job(["export", out]),
            }
    path = results_file.RESULTS / "main_job.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    command = "benchmarks/main_job.py JOB --data SOURCE --weights MODEL"
    row |= {"machine": results_file.machine(), "date": time.strftime("%F")}
    results_file.write("main_job", command, {"rows": rows | {options.job: row}})


def job(arguments: list[str]) -> dict[str, Any]:
    """Run a command and return its wall time and figures."""
    started = time.monotonic()
    done = subprocess.run([PROGRAM, *arguments, "--json"], stdout=subprocess.PIPE, check=True)
    facts = json.loads(done.stdout)
    found = {"wall_s": round(time.monotonic() - started, 1)}
    found |= {name: facts[name] for name in KEPT if name in facts}
    if "variants" in facts:
        onnx = facts["variants"]["onnx"]
        found |= {"deployable": onnx["deployable"], "bytes": onnx["bytes"]}
        found |= {"parity": {k: v for k, v in onnx["parity"].items() if k != "data"}}
    return found


if __name__ == "__main__":
    main()

"""Kill a training run with SIGKILL, again and again, and compare it with an undisturbed one.

    .venv/bin/python benchmarks/kill_test.py            # all three cases, about 7 minutes
    .venv/bin/python benchmarks/kill_test.py --path files

The run has everything that draws at random or carries state: drop-path, mixup, cutout, a moving
average, accumulation over 2 passes, 2 threads; once with the images in memory, once from files
read by 2 worker processes, once with 2 ranks of a thread each. In its second epoch all its weights
are overwritten, so that it has to go back to a checkpoint and on with a lower rate.

It is killed before its first checkpoint, in three or more different epochs, and at least twice
while a checkpoint is being written (its temporary file is there). Each time it is resumed. At the
end weights, moving average and optimizer state must have the SHA-256 of the undisturbed run, and
metrics.jsonl every update exactly once. Exit status 1 if not.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import results_file
import torch

from fieldmark.training.checkpoint import load_checkpoint

EPOCHS = 5
CHECKPOINT_STEPS = 6
SETTINGS = [
    "model.arch=test_resnet",
    "model.image_px=32",
    "model.drop_path_rate=0.3",
    "model.drop_rate=0.2",
    "augment.crop_pad_px=3",
    "augment.cutout_px=6",
    "augment.mixup_alpha=0.4",
    "train.ema_decay=0.95",
    "train.accumulation_steps=2",
    "train.threads=2",
    f"train.epochs={EPOCHS}",
    f"train.checkpoint_steps={CHECKPOINT_STEPS}",
]
LIMIT_S = 600
CASES = ("resident", "files", "ranks")
SPOIL_AT = 40


def main() -> int:
    """Run the test on the chosen paths; 0 if every digest agrees."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", choices=[*CASES, "all"], default="all")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--write", action="store_true", help="write the results file")
    options = parser.parse_args()
    paths = CASES if options.path == "all" else [options.path]
    with tempfile.TemporaryDirectory() as name:
        results = {path: run_path(path, Path(name)) for path in paths}
    passed = all(result["passed"] for result in results.values())
    if options.write:
        write_results({"passed": passed, **results})
    if options.json:
        print(json.dumps({"passed": passed, **results}))
    return 0 if passed else 1


def write_results(content: dict[str, Any]) -> None:
    """Write benchmarks/results/kill_test.json."""
    results_file.write("kill_test", "benchmarks/kill_test.py --write", content)


def run_path(path: str, work: Path) -> dict[str, Any]:
    """Train undisturbed and killed runs of one data path, and compare them."""
    settings = SETTINGS + source_settings(path, work)
    num_ranks = 2 if path == "ranks" else 1
    calm, killed = work / f"{path}-calm", work / f"{path}-killed"
    say(f"{path}: undisturbed run")
    finish(start(["digits", *settings], calm, num_ranks))
    say(f"{path}: killed run")
    kills = kill_and_resume(["digits", *settings], killed, num_ranks)
    report = compare(calm, killed) | {"kills": kills}
    inside = sum(kill["writing"] for kill in kills)
    epochs = {kill["epoch"] for kill in kills if kill["epoch"] is not None}
    early = sum(kill["epoch"] is None for kill in kills)
    report["passed"] = bool(
        report["equal"]
        and report["steps_once"]
        and report["rollbacks"] == 1
        and inside >= 2
        and len(epochs) >= 3
        and early
    )
    say(
        f"{path}: {len(kills)} kills, {early} before the first checkpoint, in epochs "
        f"{sorted(epochs)}, {inside} inside the writing of a checkpoint; "
        f"{'equal' if report['equal'] else 'DIFFERENT'} weights, average and optimizer; "
        f"steps {'once each' if report['steps_once'] else 'NOT once each'}"
    )
    return report


def source_settings(path: str, work: Path) -> list[str]:
    """Return the settings that choose the data path; writes the digits as files for one."""
    if path == "ranks":
        return ["data.storage=resident", "train.threads=1"]
    if path == "resident":
        return ["data.storage=resident"]
    folder = work / "digits"
    write_digits(folder)
    return [f"data.source=folder:{folder}", "data.storage=files", "data.num_workers=2"]


def write_digits(folder: Path) -> None:
    """Write scikit-learn's digits as PNG files in class folders."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        pixels = (image.reshape(8, 8) * 255 / 16).astype(np.uint8)
        target = folder / str(label) / f"{number:04d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(target)


def kill_and_resume(arguments: list[str], out: Path, num_ranks: int) -> list[dict[str, Any]]:
    """Kill the run at each planned moment; return what was seen at each kill."""
    steps_per_epoch = None
    kills: list[dict[str, Any]] = []
    plan: list[tuple[str, int]] = [("early", 0)]
    plan += [("writing", 1), ("epoch", 1), ("writing", 2), ("epoch", 2), ("epoch", 3)]
    for kind, epoch in plan:
        process = start(["--resume"] if kills else arguments, out, num_ranks)
        folder = out / "checkpoints"
        if kind == "early":
            # The network is built and the updates begin, but nothing has been saved yet.
            wait(process, lambda: total_steps(out) > 0)
            time.sleep(0.2)
        else:
            steps_per_epoch = steps_per_epoch or wait_for_epoch_length(process, out)
            target = epoch * steps_per_epoch + 1
            wait(process, partial(has_reached, folder, target))
            if kind == "writing":
                wait(process, partial(is_writing, folder))
        kill(process)
        step = newest_step(folder)
        kills.append(
            {
                "kind": kind,
                "writing": is_writing(folder),
                "checkpoint_step": step,
                "epoch": step // steps_per_epoch if step and steps_per_epoch else None,
            }
        )
    finish(start(["--resume"], out, num_ranks))
    return kills


def compare(calm: Path, killed: Path) -> dict[str, Any]:
    """Compare the last checkpoints and the metrics of two runs."""
    digests = {}
    for name, out in (("calm", calm), ("killed", killed)):
        newest = max((out / "checkpoints").glob("step-*.ckpt"))
        header, state = load_checkpoint(newest)
        digests[name] = {
            "step": header.step,
            **{part: digest(state[part]) for part in ("network", "ema", "optimizer")},
        }
    lines = [json.loads(line) for line in (killed / "metrics.jsonl").open()]
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    expected = list(range(1, digests["calm"]["step"] + 1))
    same_lines = (calm / "metrics.jsonl").read_bytes() == (killed / "metrics.jsonl").read_bytes()
    return {
        "digests": digests,
        "equal": digests["calm"] == digests["killed"] and same_lines,
        "steps_once": steps == expected,
        "rollbacks": (killed / "decisions.jsonl").read_text().count('"rollback '),
    }


def digest(value: Any) -> str:
    """Return the SHA-256 of nested tensors and plain values."""
    sha = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            sha.update(str((item.dtype, tuple(item.shape))).encode())
            sha.update(item.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(item, dict):
            for key in item:
                sha.update(repr(key).encode())
                add(item[key])
        elif isinstance(item, (list, tuple)):
            for part in item:
                add(part)
        else:
            sha.update(repr(item).encode())

    add(value)
    return sha.hexdigest()


def start(arguments: list[str], out: Path, num_ranks: int) -> "subprocess.Popen[bytes]":
    """Start a training process, or one that starts several ranks."""
    log = out.with_suffix(".log").open("ab")
    ranks = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    program = [sys.executable, *(ranks if num_ranks > 1 else [])]
    program.append(str(Path(__file__).with_name("spoiled.py")))
    command = [*program, "train", *arguments, "--out", str(out)]
    environment = {**os.environ, "SPOIL_AT": str(SPOIL_AT)}
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process and those that it started, all at once."""
    family = [process.pid, *children(process.pid)]
    for pid in family:
        os.kill(pid, signal.SIGKILL)
    process.wait()
    while any(Path("/proc", str(pid)).exists() for pid in family):  # until they let go of the run
        time.sleep(0.01)


def children(parent: int) -> list[int]:
    """Return the processes that a process started and that are still there."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:  # it has ended since
            continue
        if int(text.rsplit(")", 1)[1].split()[1]) == parent:
            found.append(int(text.split()[0]))
    return found


def finish(process: "subprocess.Popen[bytes]") -> None:
    """Wait for a process that should succeed."""
    if process.wait(timeout=LIMIT_S) != 0:
        raise SystemExit(f"training failed with status {process.returncode}: see its log")


def wait(process: "subprocess.Popen[bytes]", happened: Callable[[], bool]) -> None:
    """Poll tightly until something happens; the process must still be running."""
    limit = time.monotonic() + LIMIT_S
    while not happened():
        if process.poll() is not None:
            raise SystemExit(f"training ended (status {process.returncode}) before its kill")
        if time.monotonic() > limit:
            raise SystemExit("training did not come to the moment of its kill in time")


def wait_for_epoch_length(process: "subprocess.Popen[bytes]", out: Path) -> int:
    """Return the updates in an epoch, from the decision on the whole length."""
    wait(process, lambda: total_steps(out) > 0)
    return total_steps(out) // EPOCHS


def total_steps(out: Path) -> int:
    """Return the decided number of updates, or 0."""
    try:
        lines = [json.loads(line) for line in (out / "decisions.jsonl").open()]
    except (OSError, ValueError):
        return 0
    return next((line["value"] for line in lines if line["kind"] == "total_steps"), 0)


def has_reached(folder: Path, step: int) -> bool:
    """Return whether there is a checkpoint of this update or a later one."""
    return newest_step(folder) >= step


def is_writing(folder: Path) -> bool:
    """Return whether a checkpoint's temporary file is there."""
    return any(folder.glob(".*.tmp"))


def newest_step(folder: Path) -> int:
    """Return the update of the newest checkpoint, or 0."""
    names = sorted(path.name for path in folder.glob("step-*.ckpt"))
    return int(names[-1][5:13]) if names else 0


def say(text: str) -> None:
    """Print to stderr, so that --json can be piped."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

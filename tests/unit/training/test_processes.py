"""Two real processes over gloo against one: gradients, statistics, evaluation, errors."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import fieldmark
from fieldmark.training.checkpoint import load_newest

pytestmark = pytest.mark.slow  # each starts processes that import torch

PYTHON = sys.executable
TORCHRUN = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def run(command: list[str], spoil_at: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "SPOIL_AT": spoil_at}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, check=False, env=environment
    )


def without(settings: list[str], *keys: str) -> list[str]:
    return [s for s in settings if not s.startswith(keys)]


def train(settings: list[str], out: Path, *, resume: bool = False) -> list[dict[str, Any]]:
    """Train with two processes by torchrun; return the lines of metrics."""
    told = ["--resume"] if resume else ["digits", *settings]
    done = run([*TORCHRUN, "-m", "fieldmark", "train", *told, "--out", str(out)])
    assert done.returncode == 0, done.stderr
    return lines(out)


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").open()]


def losses(found: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in found if line["kind"] == "train"]


def weights(out: Path) -> dict[str, torch.Tensor]:
    newest = load_newest(out / "checkpoints")
    assert newest is not None
    state: dict[str, torch.Tensor] = newest[1]["network"]
    return state


VIT = [
    "model.arch=test_vit",
    "model.args.patch_size=8",
    "model.image_px=32",
    "train.steps=20",
    "train.threads=1",
    "data.val_frac=0.2",
    "optim.max_grad_norm=1",
]


@pytest.fixture
def vit(tiny_settings: list[str]) -> list[str]:
    return [*without(tiny_settings, "model.args", "model.arch", "train.epochs", "data.val"), *VIT]


@pytest.fixture
def resnet(tiny_settings: list[str]) -> list[str]:
    kept = without(tiny_settings, "model.args", "train.epochs", "data.val")
    return [
        *kept,
        "model.arch=small_test_resnet",
        "train.steps=12",
        "optim.lr=0.02",
        "train.threads=1",
        "train.ema_decay=0.9",
        "data.val_frac=0.2",
    ]


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["data.sampler=sqrt", "loss.class_weights=[0.5,2,1,0.25]"],
        ["loss.name=logit-adjusted"],
    ],
    ids=["plain", "sampler and weights", "adjusted"],
)
def test_without_batch_statistics_two_ranks_equal_one(
    tmp_path: Path, vit: list[str], more: list[str]
) -> None:
    """The same global batch, with clipping: losses within 1e-4 over 20 updates."""
    vit = [*vit, *more]
    fieldmark.train("digits", vit, out=tmp_path / "one")
    one, two = losses(lines(tmp_path / "one")), losses(train(vit, tmp_path / "two"))
    assert len(one) == len(two) == 20
    for a, b in zip(one, two, strict=True):
        assert b == pytest.approx(a, rel=1e-4)


@pytest.mark.parametrize("storage", ["files", pytest.param("resident", marks=pytest.mark.long)])
def test_with_batch_norm_two_ranks_equal_one_that_accumulates(
    tmp_path: Path, resnet: list[str], storage: str
) -> None:
    """The same half-batches, in the same order: norm statistics and averages too."""
    settings = [*resnet, f"data.storage={storage}", "data.num_workers=1"]
    one = [*settings, "train.accumulation_steps=2"]
    fieldmark.train("digits", one, out=tmp_path / "one")
    two = train(settings, tmp_path / "two")
    for a, b in zip(losses(lines(tmp_path / "one")), losses(two), strict=True):
        assert b == pytest.approx(a, rel=1e-4)
    mine, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-5, msg=name)
    # The validation split does not divide by two: every image counts once all the same.
    vals = [[v for v in lines(tmp_path / n) if v["kind"] == "val"] for n in ("one", "two")]
    assert vals[0][-1]["top1_accuracy"]["n"] == vals[1][-1]["top1_accuracy"]["n"]
    assert vals[0][-1]["loss"] == pytest.approx(vals[1][-1]["loss"], rel=1e-3)
    assert vals[0][-1]["top1_accuracy"]["n"] % 2


@pytest.mark.long
def test_accumulation_on_two_ranks_equals_one_with_as_many_parts(
    tmp_path: Path, resnet: list[str]
) -> None:
    fieldmark.train("digits", [*resnet, "train.accumulation_steps=4"], out=tmp_path / "one")
    two = train([*resnet, "train.accumulation_steps=2"], tmp_path / "two")
    for a, b in zip(losses(lines(tmp_path / "one")), losses(two), strict=True):
        assert b == pytest.approx(a, rel=1e-4)


def test_a_resumed_run_of_two_ranks_equals_the_undisturbed_one_bit_for_bit(
    tmp_path: Path, resnet: list[str]
) -> None:
    settings = [*resnet, "train.checkpoint_steps=4", "train.keep_checkpoints=9"]
    calm = train(settings, tmp_path / "calm")
    train(settings, tmp_path / "broken")
    for path in (tmp_path / "broken" / "checkpoints").iterdir():
        if int(path.name[5:13]) > 4:
            path.unlink()
    (tmp_path / "broken" / "metrics.json").unlink()
    assert train([], tmp_path / "broken", resume=True) == calm
    a, b = weights(tmp_path / "calm"), weights(tmp_path / "broken")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_fitted_to_a_time_makes_as_many_updates_on_each_rank(
    tmp_path: Path, resnet: list[str]
) -> None:
    """Updates are timed by one clock: with two, one rank would wait for an update that is none."""
    fitted = [
        *without(resnet, "train.steps"),
        "train.max_minutes=0.1",
        "augment.sizes=[[0,24],[0.5,32]]",
    ]
    found = train(fitted, tmp_path / "run")
    steps = [line["step"] for line in found if line["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1))
    assert steps


def test_devices_starts_the_processes_and_one_alone_writes_and_speaks(
    tmp_path: Path, resnet: list[str]
) -> None:
    out = tmp_path / "run"
    command = [PYTHON, "-m", "fieldmark", "train", "digits", *resnet]
    done = run([*command, "--devices", "2", "--out", str(out), "--json"])
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)  # one object: of one process
    assert facts["cost"]["images"] == 12 * 16
    assert json.loads((out / "environment.json").read_text())["ranks"] == 2
    assert done.stderr.count("validation top-1") == len(
        [line for line in lines(out) if line["kind"] == "val"]
    )
    steps = [line["step"] for line in lines(out) if line["kind"] == "train"]
    assert steps == list(range(1, 13))


def test_a_mistake_is_told_once_with_its_status(tmp_path: Path, resnet: list[str]) -> None:
    command = [PYTHON, "-m", "fieldmark", "train", "digits", *resnet, "train.sync_batch_norm=true"]
    done = run([*command, "--devices", "2", "--out", str(tmp_path / "run")])
    assert done.returncode == 2
    assert done.stderr.count("train.sync_batch_norm needs CUDA") == 1
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


CRASH = """
import sys
from fieldmark.__main__ import main
from fieldmark.errors import DataError
from fieldmark.training import loop

set_rates = loop.set_rates

def and_fail(rule, step, factor):
    set_rates(rule, step, factor)
    if rule.ranks.rank == 1 and step == 4:
        raise {error}

loop.set_rates = and_fail
main()
"""


@pytest.mark.parametrize(
    ("error", "told", "status"),
    [
        ("DataError('the disk of rank 1 is gone.')", "the disk of rank 1 is gone.", 2),
        pytest.param(
            "OSError(24, 'Too many open files')",
            "Too many open files",
            2,
            marks=pytest.mark.long,
        ),
    ],
)
def test_an_error_of_one_rank_is_told_by_it_alone(
    tmp_path: Path, resnet: list[str], error: str, told: str, status: int
) -> None:
    program = tmp_path / "crash.py"
    program.write_text(CRASH.format(error=error))
    done = run([*TORCHRUN, str(program), "train", "digits", *resnet, "--out", str(tmp_path / "r")])
    assert done.returncode == 1  # torchrun's own
    assert done.stderr.count(told) == 1
    assert "another process of the run ended" not in done.stderr
    assert f"exitcode  : {status} " in done.stderr  # in torchrun's table


def test_a_broken_file_of_one_rank_counts_as_an_empty_share(
    tmp_path: Path, tiny_images: Path, resnet: list[str]
) -> None:
    """Found in the middle of training; with one image a part, its part of the update is empty."""
    data = tmp_path / "images"
    shutil.copytree(tiny_images, data)
    settings = [
        *without(resnet, "data.source", "train.batch_size", "model.arch"),
        f"data.source=folder:{data}",
        "model.arch=test_vit",
        "model.image_px=32",
        "train.batch_size=4",
        "train.accumulation_steps=2",
        "data.storage=files",
        "data.num_workers=0",
        "data.max_broken_frac=0.5",
    ]
    broken = sorted((data / "train").glob("*/*.png"))[::7]
    for path in broken:
        path.write_bytes(path.read_bytes()[:200])
    found = train(settings, tmp_path / "two")
    assert len(losses(found)) == 12
    assert all(loss is not None for loss in losses(found))
    decided = (tmp_path / "two" / "decisions.jsonl").read_text()
    assert (
        decided.count('"broken ')
        == len({line for line in decided.splitlines() if "broken " in line})
        > 0
    )


def test_spoilt_weights_are_rolled_back_on_two_ranks(tmp_path: Path, resnet: list[str]) -> None:
    program = str(Path(__file__).parents[3] / "benchmarks" / "spoiled.py")
    out = tmp_path / "run"
    command = [*TORCHRUN, program, "train", "digits", *resnet, "train.checkpoint_steps=4"]
    done = run([*command, "--out", str(out)], spoil_at="7")
    assert done.returncode == 0, done.stderr
    kinds = [json.loads(line) for line in (out / "decisions.jsonl").open()]
    (rollback,) = [line for line in kinds if line["kind"] == "rollback 1"]
    assert rollback["value"]["to"] == 6  # the best of validation
    assert [line["step"] for line in lines(out) if line["kind"] == "train"] == list(range(1, 13))


def _start(resnet: list[str], out: Path) -> "subprocess.Popen[str]":
    settings = [*without(resnet, "train.steps"), "train.steps=100000"]
    command = [PYTHON, "-m", "fieldmark", "train", "digits", *settings]
    process = subprocess.Popen(
        [*command, "--devices", "2", "--out", str(out)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    limit = time.monotonic() + 120
    while not any((out / "checkpoints").glob("step-*.ckpt")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.1)
    return process


def _ranks_of(process: "subprocess.Popen[str]") -> list[int]:
    """The processes of the run: children of the launcher that run fieldmark."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            command = (folder / "cmdline").read_text()
        except (OSError, ValueError):
            continue
        if parent == process.pid and "fieldmark" in command:
            found.append(int(folder.name))
    return sorted(found)


def test_a_rank_that_is_killed_ends_the_run_and_does_not_hang(
    tmp_path: Path, resnet: list[str]
) -> None:
    process = _start(resnet, tmp_path / "run")
    ranks = _ranks_of(process)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL or process.returncode == 1
    assert "another process of the run ended" in told
    assert "Traceback" not in told
    assert not any(Path("/proc", str(rank)).exists() for rank in ranks)


@pytest.mark.parametrize(
    "sent", [signal.SIGUSR1, pytest.param(signal.SIGTERM, marks=pytest.mark.long)]
)
def test_a_signal_saves_a_checkpoint_and_says_resume_me(
    tmp_path: Path, resnet: list[str], sent: signal.Signals
) -> None:
    process = _start(resnet, tmp_path / "run")
    process.send_signal(sent)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 75
    assert told.count("its checkpoint is saved. Resume with") == 1
    assert load_newest(tmp_path / "run" / "checkpoints") is not None


FINALISED = """
import os, runpy, sys
from fieldmark import cli

class Finalised:
    def __del__(self, abort=os.abort):
        abort()

def main():
    print("told", end="")
    {ending}

cli.kept, cli.main = Finalised(), main
runpy.run_module("fieldmark", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("ending", "status"), [("pass", 0), ("sys.exit(75)", 75), ("raise ValueError(3)", 1)]
)
def test_a_rank_ends_with_its_status_and_without_finalisation(ending: str, status: int) -> None:
    """Where a thread of gloo would abort it."""
    done = subprocess.run(
        [PYTHON, "-c", FINALISED.format(ending=ending)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "WORLD_SIZE": "2"},
    )
    assert (done.returncode, done.stdout) == (status, "told"), done.stderr
    assert ("ValueError: 3" in done.stderr) == (status == 1)

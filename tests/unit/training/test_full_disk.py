"""A run whose disk is full, really, at one file or another: it ends clean and can be resumed."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small_disk import mounted

import fieldmark
from fieldmark.errors import DiskFull
from fieldmark.training.checkpoint import checkpoint_path, load_checkpoint

STEPS = 18


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", 8 * 2**20) as folder:
        yield folder


def fill(disk: Path, leave_bytes: int) -> None:
    free = shutil.disk_usage(disk).free
    (disk / "ballast").write_bytes(bytes(max(0, free - leave_bytes)))


def final_network(run: Path) -> dict[str, torch.Tensor]:
    state: dict[str, Any] = load_checkpoint(checkpoint_path(run / "checkpoints", STEPS))[1]
    return state["network"]


def check_clean(run: Path) -> None:
    assert not [path for path in run.rglob("*.tmp")]
    for path in run.rglob("*.jsonl"):
        data = path.read_bytes()
        assert not data or data.endswith(b"\n")
        for line in data.splitlines():
            json.loads(line)
    for path in (run / "checkpoints").glob("*.ckpt"):
        load_checkpoint(path)


def check_equal(run: Path, calm: Path) -> None:
    """Same weights, and every update's line exactly once."""
    ours, theirs = final_network(run), final_network(calm)
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert (run / "metrics.jsonl").read_bytes() == (calm / "metrics.jsonl").read_bytes()
    assert (run / "package" / "manifest.json").is_file()


@pytest.fixture(scope="module")
def settings(tiny_settings: list[str]) -> list[str]:
    return [*tiny_settings, "train.checkpoint_steps=1", "train.keep_checkpoints=50"]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> Path:
    out = tmp_path_factory.mktemp("calm") / "run"
    fieldmark.train("digits", settings, out=out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    "leave_kb", [40, 400, *(pytest.param(kb, marks=pytest.mark.long) for kb in (100, 130, 200))]
)
def test_a_disk_that_fills_while_training_leaves_a_run_that_is_resumed(
    disk: Path, settings: list[str], calm: Path, leave_kb: int
) -> None:
    fill(disk, leave_kb * 1000)
    with pytest.raises(DiskFull) as caught:
        fieldmark.train("digits", settings, out=disk / "run")
    text = str(caught.value)
    assert "No space left on device (" in text
    assert "needed" in text
    assert text.endswith(f"Make room. Resume with: fieldmark train --resume --out {disk / 'run'}")
    check_clean(disk / "run")
    (disk / "ballast").unlink()
    fieldmark.train(out=disk / "run", resume=True)
    check_equal(disk / "run", calm)


@pytest.mark.parametrize("leave_kb", [0, pytest.param(4, marks=pytest.mark.slow), 8])
def test_a_disk_that_is_full_from_the_start_is_said_so(
    disk: Path, settings: list[str], leave_kb: int
) -> None:
    fill(disk, leave_kb * 1024)
    with pytest.raises(DiskFull, match="No space left on device"):
        fieldmark.train("digits", settings, out=disk / "run")
    (disk / "ballast").unlink()
    resumable = (disk / "run" / "config.json").is_file()
    arguments = ("", ()) if resumable else ("digits", settings)
    fieldmark.train(*arguments, out=disk / "run", resume=resumable)
    assert (disk / "run" / "package" / "manifest.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "leave_kb", [0, 40, *(pytest.param(kb, marks=pytest.mark.long) for kb in (4, 12))]
)
def test_a_disk_that_fills_before_the_package_leaves_a_run_that_is_resumed(
    disk: Path,
    settings: list[str],
    calm: Path,
    leave_kb: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from fieldmark.evaluation import finish

    write_package = finish.write_package

    def write_when_full(*args: Any, **kwargs: Any) -> object:
        fill(disk, leave_kb * 1024)
        return write_package(*args, **kwargs)

    run = disk / "run"
    with monkeypatch.context() as patched:
        patched.setattr(finish, "write_package", write_when_full)
        with pytest.raises(DiskFull, match=f"No space left.*Resume with: .*{run}"):
            fieldmark.train("digits", settings, out=run)
    assert not (run / "metrics.json").exists()
    check_clean(run)
    (disk / "ballast").unlink()
    fieldmark.train(out=run, resume=True)
    check_equal(run, calm)


@pytest.mark.slow
def test_the_command_line_gives_status_2_and_one_sentence(disk: Path, settings: list[str]) -> None:
    """Not 75: a job that is put back into the queue by itself would find the disk as full."""
    import subprocess
    import sys

    fill(disk, 150_000)
    program = str(Path(sys.executable).with_name("fieldmark"))
    done = subprocess.run(
        [program, "train", "digits", *settings, "--out", str(disk / "run")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "Resume with: fieldmark train --resume" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="limits are of POSIX systems")
def test_a_limit_of_the_file_size_ends_the_run_in_the_same_way(
    tmp_path: Path, settings: list[str], calm: Path
) -> None:
    import subprocess
    import sys

    code = (
        "import resource, sys, fieldmark\n"
        "from fieldmark.errors import DiskFull\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3500, 3500))\n"
        "try:\n"
        "    fieldmark.train('digits', sys.argv[2:], out=sys.argv[1])\n"
        "except DiskFull as error:\n"
        "    print(error)\n"
    )
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", code, str(run), *settings],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "File too large (" in done.stdout
    check_clean(run)
    fieldmark.train(out=run, resume=True)
    check_equal(run, calm)

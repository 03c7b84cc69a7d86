"""Signals, really sent: to this process, to a run, to a run with its workers, by a terminal."""

import fcntl
import os
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import fieldmark
from fieldmark.errors import Interrupted, Preempted
from fieldmark.training.checkpoint import checkpoint_path, load_checkpoint
from fieldmark.training.signals import StopNow, stop_error, stop_requests

ROOT = Path(__file__).parents[3]
PROGRAM = str(Path(sys.executable).with_name("fieldmark"))
STOPS = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP]
EPOCHS = 120  # of 3 updates: seconds, so that a signal finds the run still going


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in STOPS]


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_is_noted_and_the_handlers_come_back(number: signal.Signals) -> None:
    before = handlers()
    outer: list[StopNow] = []
    try:
        with stop_requests(at_once=True), stop_requests() as asked:
            assert not asked.is_set()
            os.kill(os.getpid(), number)
            assert asked.is_set()
            kind = Interrupted if number == signal.SIGINT else Preempted
            assert isinstance(stop_error(asked.received, "x"), kind)
            assert stop_error(asked.received, "x").exit_status == (
                130 if number == signal.SIGINT else 75
            )
    except StopNow as stop:  # not acted on within, so it is the outer block's
        outer.append(stop)
    assert [stop.received for stop in outer] == [number]
    assert handlers() == before


def test_a_block_that_acts_on_the_signal_keeps_it_from_the_outer_one() -> None:
    def work() -> None:
        with stop_requests(at_once=True), stop_requests() as asked:
            os.kill(os.getpid(), signal.SIGTERM)
            raise stop_error(asked.received, "saved")

    with pytest.raises(Preempted, match="saved"):
        work()


def test_at_once_means_at_once_and_only_once() -> None:
    def work() -> None:
        with stop_requests(at_once=True):
            try:
                os.kill(os.getpid(), signal.SIGUSR1)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)  # must not break what cleans up

    with pytest.raises(StopNow) as caught:
        work()
    assert isinstance(stop_error(caught.value, "x"), Preempted)
    assert isinstance(stop_error(KeyboardInterrupt(), "x"), Interrupted)


def test_a_second_ctrl_c_does_not_wait() -> None:
    reached: list[signal.Signals] = []

    def work() -> None:
        with stop_requests():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGINT):
                reached.append(number)
                os.kill(os.getpid(), number)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert len(reached) == 3


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as asked:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not asked.is_set()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_has_no_signals_and_no_error() -> None:
    seen: list[bool] = []

    def work() -> None:
        with stop_requests() as asked:
            seen.append(asked.is_set())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


@pytest.fixture(scope="module")
def settings(tiny_settings: list[str]) -> list[str]:
    kept = [s for s in tiny_settings if not s.startswith("train.epochs")]
    return [*kept, f"train.epochs={EPOCHS}", "train.threads=1", "model.drop_rate=0"]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, settings: list[str]) -> Path:
    out = tmp_path_factory.mktemp("calm") / "run"
    fieldmark.train("digits", settings, out=out)
    return out


def check_equal(run: Path, calm: Path) -> None:
    name = checkpoint_path(Path("checkpoints"), 3 * EPOCHS)
    ours, theirs = (load_checkpoint(folder / name)[1]["network"] for folder in (run, calm))
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert (run / "metrics.jsonl").read_bytes() == (calm / "metrics.jsonl").read_bytes()


def start(out: Path, settings: Sequence[str], **options: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [PROGRAM, "train", "digits", *settings, "--out", str(out)],
        **{  # type: ignore[call-overload]
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            "preexec_fn": heed_hangup,
            **options,
        },
    )


def heed_hangup() -> None:
    """Under nohup, tests and what they start would ignore a lost terminal."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def wait_for_checkpoint(out: Path) -> None:
    limit = time.monotonic() + 120
    while not list(out.glob("checkpoints/*.ckpt")) and time.monotonic() < limit:
        time.sleep(0.01)


def newest(out: Path) -> int:
    return max(int(path.name[5:13]) for path in out.glob("checkpoints/*.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        signal.SIGUSR1,
        pytest.param(signal.SIGUSR2, marks=pytest.mark.long),
        pytest.param(signal.SIGHUP, marks=pytest.mark.long),
    ],
)
def test_a_preempted_run_ends_with_75_and_resumes_to_the_same_weights(
    tmp_path: Path, settings: list[str], calm: Path, number: signal.Signals
) -> None:
    run = tmp_path / "run"
    process = start(run, settings)
    wait_for_checkpoint(run)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 75, stderr
    assert f"Resume with: fieldmark train --resume --out {run}" in stderr
    assert "Traceback" not in stdout + stderr
    assert f"stopped after update {newest(run)} of {3 * EPOCHS}" in stderr
    fieldmark.train(out=run, resume=True)
    check_equal(run, calm)


@pytest.mark.slow
def test_a_signal_to_every_process_of_the_job_lets_the_workers_finish_the_update(
    tmp_path: Path, settings: list[str]
) -> None:
    run = tmp_path / "run"
    settings = [*settings, "data.storage=files", "data.num_workers=2"]
    process = start(run, settings, start_new_session=True)
    wait_for_checkpoint(run)
    os.killpg(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 75, stderr
    assert "Resume with" in stderr


@pytest.mark.slow
def test_a_lost_terminal_leaves_a_checkpoint(tmp_path: Path, settings: list[str]) -> None:
    run = tmp_path / "run"
    master, slave = os.openpty()

    def own_terminal() -> None:
        heed_hangup()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = start(
        run,
        settings,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=own_terminal,
    )
    os.close(slave)
    os.set_blocking(master, False)
    limit = time.monotonic() + 120
    while not list(run.glob("checkpoints/*.ckpt")) and time.monotonic() < limit:
        try:
            os.read(master, 65536)
        except BlockingIOError:
            time.sleep(0.01)
    os.close(master)  # the kernel sends SIGHUP, and writing to the terminal is an error from now on
    assert process.wait(timeout=120) == 75
    assert newest(run) < 3 * EPOCHS
    fieldmark.train(out=run, resume=True)


WHILE_PACKAGING = """
import os, signal, sys
import fieldmark
from fieldmark.errors import FieldmarkError
from fieldmark.evaluation import finish
write_package = finish.write_package

def write(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGTERM)
    return write_package(*args, **kwargs)

finish.write_package = write
try:
    fieldmark.train("digits", sys.argv[2:], out=sys.argv[1])
except FieldmarkError as error:
    print(error.exit_status, error)
"""


@pytest.mark.slow
def test_a_signal_while_the_package_is_written_is_obeyed_at_once(
    tmp_path: Path, settings: list[str], tiny_settings: list[str]
) -> None:
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", WHILE_PACKAGING, str(run), *tiny_settings],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("75 stopped before the run had ended. Resume with: ")
    assert not (run / "metrics.json").exists()
    fieldmark.train(out=run, resume=True)
    assert (run / "package" / "manifest.json").is_file()


@pytest.mark.slow
def test_messages_that_nobody_reads_do_not_end_the_run(
    tmp_path: Path, tiny_settings: list[str]
) -> None:
    run = tmp_path / "run"
    process = start(run, [*tiny_settings, "train.epochs=12"])
    assert process.stderr is not None
    process.stderr.close()  # as of `2>&1 | head`
    assert process.wait(timeout=120) == 0
    assert (run / "package" / "manifest.json").is_file()


@pytest.mark.slow
def test_the_slurm_script_of_the_page_requeues_until_the_run_has_ended(
    tmp_path: Path, settings: list[str], calm: Path
) -> None:
    """With srun and scontrol as Slurm's do: run the command; note the job."""
    page = (ROOT / "docs" / "how-to" / "preemption.md").read_text()
    (script,) = (
        block for block in re.findall(r"```sh\n(.*?)```", page, re.S) if "sbatch" in block.lower()
    )
    asked = 'srun fieldmark train "$recipe"'
    assert asked in script
    quoted = " ".join(f"'{setting}'" for setting in settings)
    job = tmp_path / "job.sh"
    job.write_text(
        script.replace("recipe=cifar10-resnet18", "recipe=digits").replace(
            asked, f"{asked} {quoted}"
        )
    )
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "srun").write_text('#!/bin/sh\nexec "$@"\n')
    (tools / "scontrol").write_text('#!/bin/sh\necho "$@" >> "$SLURM_SUBMIT_DIR/requeued"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    path = f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {
        **os.environ,
        "PATH": path,
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "42",
    }
    run = tmp_path / "runs" / "resnet18"
    for number in (signal.SIGUSR1, signal.SIGTERM):
        before = newest(run) if run.exists() else 0
        process = subprocess.Popen(["bash", str(job)], env=environment, start_new_session=True)
        limit = time.monotonic() + 120
        wait_for_checkpoint(run)
        while newest(run) <= before and time.monotonic() < limit:
            time.sleep(0.01)
        os.killpg(process.pid, number)
        assert process.wait(timeout=120) == 75
    assert (tmp_path / "requeued").read_text().splitlines() == ["requeue 42"] * 2
    assert subprocess.run(["bash", str(job)], env=environment, check=False).returncode == 0
    assert (tmp_path / "requeued").read_text().count("\n") == 2
    check_equal(run, calm)

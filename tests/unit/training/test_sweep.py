"""Sweeps: what is tried, what is compared, what is given up, and going on after a stop."""

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import fieldmark
from fieldmark.errors import ConfigError, Interrupted, MissingDependency, RunError, UnknownName
from fieldmark.evaluation.validation import make_validation
from fieldmark.measure import Rate, wilson
from fieldmark.training.sweep import sweep
from fieldmark.training.sweep_plan import new_plan

LR = "optim.lr=log:0.01..1"
EPOCHS = ("train.batch_size=16", "train.epochs=3")
ONE_UPDATE = ("train.batch_size=16", "train.steps=1")
COMMAND = [sys.executable, "-m", "fieldmark"]


@pytest.fixture
def fixed(tiny_settings: list[str]) -> list[str]:
    """The tiny images; with a batch of 16, three updates an epoch."""
    left_out = ("optim.lr", "train.epochs", "train.batch_size", "model.args.widths")
    kept = [setting for setting in tiny_settings if not setting.startswith(left_out)]
    return [*kept, "model.args.widths=[8,8,16]", "train.threads=1"]


def lines(run: Path, kind: str = "val") -> list[dict[str, Any]]:
    return [
        line for line in map(json.loads, (run / "metrics.jsonl").open()) if line["kind"] == kind
    ]


def without_minutes(facts: dict[str, Any]) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k != "minutes"} for row in facts["trials"]]


Validation = Callable[[nn.Module], tuple[Rate, float]]


def scripted(trials: Iterable[Iterable[int]]) -> Callable[..., Validation]:
    """For each trial in turn, the hits of its validations, of the 16 images."""
    scripts = iter(trials)

    def make(*_: object, **__: object) -> Validation:
        hits: Iterator[int] = iter(next(scripts))

        def validate(network: nn.Module) -> tuple[Rate, float]:
            rate = wilson(next(hits), 16)
            return rate, 1 - rate.value

        return validate

    return make


def stopping(at: int) -> Callable[..., Validation]:
    """The real validation, with Ctrl-C in the place of the validation number `at`."""
    seen: list[int] = []

    def make(*positional: Any, **named: Any) -> Validation:
        real = make_validation(*positional, **named)
        assert real is not None

        def validate(network: nn.Module) -> tuple[Rate, float]:
            seen.append(1)
            if len(seen) == at:
                raise KeyboardInterrupt
            return real(network)

        return validate

    return make


def run_sweep(texts: list[str], out: Path, trials: int, make: Callable[..., Any]) -> dict[str, Any]:
    return sweep(
        "digits", texts, out, num_trials=trials, metric=None, resume=False, make_validation=make
    )


def resume_sweep(out: Path, make: Callable[..., Any] = make_validation) -> dict[str, Any]:
    return sweep("", [], out, num_trials=None, metric=None, resume=True, make_validation=make)


@pytest.mark.parametrize(
    ("setting", "prunes"),
    [("train.epochs=3", True), ("train.steps=[10,20]", False), ("train.max_minutes=1", False)],
)
def test_trials_of_different_length_are_not_compared_while_they_run(
    setting: str, prunes: bool
) -> None:
    assert new_plan("digits", [LR, setting], 3, "val_top1_accuracy").prunes == prunes


@pytest.mark.slow
def test_a_sweep_compares_runs_on_val_and_never_looks_at_test(
    tmp_path: Path, fixed: list[str]
) -> None:
    out = tmp_path / "sweep"
    spaces = [
        LR,
        "train.epochs=3",
        "train.batch_size=[8,16]",
        "model.args.widths=choice:[[8,8,16],[8,8,8]]",
    ]
    result = fieldmark.sweep(
        "digits", [*(s for s in fixed if "widths" not in s), *spaces], out=out, trials=3
    )
    facts = result.facts
    assert [row["trial"] for row in facts["trials"]] == [1, 2, 3]
    for row in facts["trials"]:
        run = out / row["run"]
        assert row["state"] in ("complete", "pruned")
        assert 0.01 <= row["values"]["optim.lr"] <= 1
        config = json.loads((run / "config.json").read_text())
        assert config["optim"]["lr"] == row["values"]["optim.lr"]
        assert config["train"]["batch_size"] == row["values"]["train.batch_size"]
        assert config["model"]["args"]["widths"] == row["values"]["model.args.widths"]
        by_step = {line["step"]: line for line in lines(run)}
        assert row["val_top1_accuracy"] == by_step[row["step"]]["top1_accuracy"]
        assert row["val_loss"] == by_step[row["step"]]["loss"]
        assert row["val_top1_accuracy"]["n"] == 16
        best_accuracy = max(line["top1_accuracy"]["value"] for line in by_step.values())
        assert row["val_top1_accuracy"]["value"] == best_accuracy
        # Neither measured on test nor packaged.
        names = {path.name for path in run.iterdir()}
        assert not names & {"evaluations", "package", "metrics.json"}
    best = facts["best"]
    complete = [row for row in facts["trials"] if row["state"] == "complete"]
    assert best["val_top1_accuracy"]["value"] == max(
        row["val_top1_accuracy"]["value"] for row in complete
    )
    kept = {path.parent.parent.name for path in out.glob("trial-*/checkpoints/*.ckpt")}
    assert kept == {best["run"]}
    with (out / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["optim.lr"]) for row in rows] == [
        row["values"]["optim.lr"] for row in facts["trials"]
    ]
    assert json.loads((out / "sweep.json").read_text()) == facts

    # The command repeats the best, and its own run can be finished instead.
    program, verb, recipe, *settings = shlex.split(best["command"])
    assert (program, verb, recipe) == ("fieldmark", "train", "digits")
    again = fieldmark.train(recipe, settings, out=tmp_path / "again")
    assert lines(tmp_path / "again") == lines(out / best["run"])
    assert lines(tmp_path / "again", "train") == lines(out / best["run"], "train")
    finished = fieldmark.train(out=out / best["run"], resume=True)
    assert finished.facts["measured_on"] == "test"
    assert finished.facts["top1_accuracy"] == again.facts["top1_accuracy"]


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 2, 4, 6])
def test_a_stopped_sweep_goes_on_as_it_would_have(
    tmp_path: Path, fixed: list[str], at: int
) -> None:
    calm, stopped = tmp_path / "calm", tmp_path / "stopped"
    texts = [*fixed, *EPOCHS, LR, "optim.momentum=0.0..0.95"]
    expected = run_sweep(texts, calm, 3, make_validation)
    with pytest.raises(Interrupted, match=f"fieldmark sweep --resume --out {stopped}"):
        run_sweep(texts, stopped, 3, stopping(at))
    facts = resume_sweep(stopped)
    assert without_minutes(facts) == without_minutes(expected)
    for row in expected["trials"]:
        assert lines(stopped / row["run"], "train") == lines(calm / row["run"], "train")
    assert without_minutes(resume_sweep(stopped)) == without_minutes(expected)  # nothing is left


@pytest.mark.slow
def test_more_trials_may_be_added_and_draw_other_values(tmp_path: Path, fixed: list[str]) -> None:
    out = tmp_path / "sweep"
    texts = [*fixed, *ONE_UPDATE, LR]
    first = fieldmark.sweep("digits", texts, out=out, trials=2, metric="val_loss").facts
    more = fieldmark.sweep(out=out, trials=4, resume=True).facts
    assert without_minutes(more)[:2] == without_minutes(first)
    assert len({row["values"]["optim.lr"] for row in more["trials"]}) == 4
    losses = [row["val_loss"] for row in more["trials"] if row["state"] == "complete"]
    assert more["best"]["val_loss"] == min(losses)


@pytest.mark.slow
def test_a_trial_worse_than_the_median_is_given_up_after_its_second_epoch(
    tmp_path: Path, fixed: list[str]
) -> None:
    scripts = [[8, 10, 12], [15, 4, 4], [2, 5, 15], [2, 11, 12]]
    facts = run_sweep([*fixed, *EPOCHS, LR], tmp_path / "a", 4, scripted(scripts))
    states = [row["state"] for row in facts["trials"]]
    # The second was better in its first epoch, so its best is not below; the third's is.
    assert states == ["complete", "complete", "pruned", "complete"]
    pruned = facts["trials"][2]
    assert len(lines(tmp_path / "a" / pruned["run"])) == 2
    assert pruned["val_top1_accuracy"]["value"] == 5 / 16
    assert "median" in pruned["note"]
    assert facts["best"]["trial"] == 2
    # Of runs of different length, an epoch is not the same point: none is given up.
    longer = [*fixed, "train.batch_size=16", "train.epochs=[3,4]", LR]
    facts = run_sweep(longer, tmp_path / "b", 4, scripted([[*s, 0] for s in scripts]))
    assert [row["state"] for row in facts["trials"]] == ["complete"] * 4


@pytest.mark.slow
def test_a_trial_that_diverges_is_marked_and_the_sweep_goes_on(
    tmp_path: Path, fixed: list[str]
) -> None:
    texts = [*fixed, "train.batch_size=16", "train.steps=2", "optim.lr=[0.1,1e30]"]
    result = fieldmark.sweep("digits", texts, out=tmp_path / "sweep", trials=5)
    states = {row["values"]["optim.lr"]: row["state"] for row in result.facts["trials"]}
    assert states == {0.1: "complete", 1e30: "failed"}
    failed = next(row for row in result.facts["trials"] if row["state"] == "failed")
    assert "must be finite" in failed["note"]
    assert result.passed
    none = fieldmark.sweep(
        "digits", [*texts[:-1], "optim.lr=1e30..2e30"], out=tmp_path / "none", trials=2
    )
    assert not none.passed
    assert none.facts["best"] is None


@pytest.mark.slow
def test_values_that_do_not_fit_each_other_fail_their_trial_alone(
    tmp_path: Path, fixed: list[str]
) -> None:
    texts = [*fixed, "train.steps=1", "train.batch_size=[4,16]", "train.accumulation_steps=[1,16]"]
    facts = fieldmark.sweep("digits", texts, out=tmp_path / "sweep", trials=8).facts
    for row in facts["trials"]:
        fits = row["values"]["train.batch_size"] >= row["values"]["train.accumulation_steps"]
        assert (row["state"] == "failed") != fits
        assert fits or "must be a multiple of train.accumulation_steps" in row["note"]
    assert {row["state"] for row in facts["trials"]} >= {"failed", "complete"}


def test_what_the_first_trial_stumbles_over_is_said_and_leaves_nothing(
    tmp_path: Path, fixed: list[str]
) -> None:
    out = tmp_path / "sweep"
    with pytest.raises(ConfigError, match="train.batch_size must be at most"):
        fieldmark.sweep(
            "digits", [*fixed, "train.epochs=1", "train.batch_size=4000", LR], out=out, trials=2
        )
    with pytest.raises(UnknownName, match="Did you mean 'digits'"):
        fieldmark.sweep("digits", ["data.source=digts", LR], out=out, trials=2)
    assert not out.exists()


@pytest.mark.parametrize(
    ("texts", "trials", "message"),
    [
        ([LR], None, "number of its trials"),
        (["optim.lr=0.1"], 2, "Got none. Write"),
        ([LR, "data.val_frac=0"], 2, "data.val_frac must be above 0"),
        (["data.val_frac=0.1..0.3"], 2, "data.val_frac must be the same in all trials"),
        (["data.split_seed=int:0..9"], 2, "data.split_seed must be the same in all trials"),
        (["optim.lr=log:0..1"], 2, "begin above 0"),
    ],
)
def test_what_cannot_be_swept_is_one_sentence(
    in_empty_folder: Path, texts: list[str], trials: int | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        fieldmark.sweep("digits", texts, out="sweep", trials=trials)
    assert not Path("sweep").exists()


def test_folders_and_plans_are_guarded(tmp_path: Path, fixed: list[str]) -> None:
    out = tmp_path / "sweep"
    fieldmark.sweep("digits", [*fixed, *ONE_UPDATE, LR], out=out, trials=1)
    with pytest.raises(RunError, match="must not exist yet. Resume with: fieldmark sweep"):
        fieldmark.sweep("digits", [LR], out=out, trials=1)
    with pytest.raises(ConfigError, match="the sweep's own plan. Got 'digits'"):
        fieldmark.sweep("digits", out=out, resume=True)
    with pytest.raises(RunError, match="Found no plan.json"):
        fieldmark.sweep(out=tmp_path / "nothing", resume=True)
    (out / "study.db").write_bytes(b"not a database" * 100)
    with pytest.raises(RunError, match=r"study.db must be a study that can be read"):
        fieldmark.sweep(out=out, resume=True)


def test_without_optuna_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingDependency, match=r"pip install 'fieldmark\[sweep\]'"):
        fieldmark.sweep("digits", [LR], out="sweep", trials=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.long)],
    ids=lambda n: n.name,
)
def test_a_killed_sweep_ends_as_the_undisturbed_one(tmp_path: Path, number: signal.Signals) -> None:
    words = ["digits", LR, "train.batch_size=[32,64]", "train.epochs=4", "model.image_px=16"]
    words += ["model.args.widths=[8,8,8]", "train.checkpoint_steps=3", "train.threads=1"]
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    start = [*COMMAND, "sweep", *words, "--trials", "3", "--json", "--out"]
    undisturbed = subprocess.run([*start, str(calm)], capture_output=True, text=True, check=True)
    process = subprocess.Popen([*start, str(killed)], stderr=subprocess.PIPE, text=True)
    second = killed / "trial-0002" / "checkpoints"
    limit = time.monotonic() + 120
    while len(list(second.glob("*.ckpt"))) < 2 and time.monotonic() < limit:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert (f"fieldmark sweep --resume --out {killed}" in stderr) == (number == signal.SIGINT)
    study = json.loads((killed / "sweep.json").read_text())
    assert [row["trial"] for row in study["trials"]] == [1]
    resumed = subprocess.run(
        [*COMMAND, "sweep", "--resume", "--json", "--out", str(killed)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ,
    )
    assert resumed.returncode == 0, resumed.stderr
    assert "trial 2 of 3" in resumed.stderr
    assert "trial 1 of 3" not in resumed.stderr
    assert "resuming after update" in resumed.stderr
    a, b = json.loads(undisturbed.stdout), json.loads(resumed.stdout)
    assert without_minutes(a) == without_minutes(b)
    assert len(a["trials"]) == 3

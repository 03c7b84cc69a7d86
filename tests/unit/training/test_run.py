"""Runs on disk: locks, decisions, metrics, and resuming to the very same weights."""

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
from fieldmark.cookbook import find_recipe
from fieldmark.errors import ConfigError, DataError, NonFiniteLoss, RunError
from fieldmark.training import session
from fieldmark.training.checkpoint import checkpoint_path, load_checkpoint
from fieldmark.training.run_folder import RunFolder

PROGRAM = str(Path(sys.executable).with_name("fieldmark"))
# Everything that draws at random or carries state.
EVERYTHING = [
    "model.arch=small_test_resnet",
    "model.drop_path_rate=0.2",
    "augment.cutout_px=8",
    "augment.mixup_alpha=0.4",
    "augment.flip=alternating",
    "train.ema_decay=0.9",
    "train.accumulation_steps=2",
    "train.checkpoint_steps=2",
    "train.epochs=4",
    "train.threads=2",
    "train.keep_checkpoints=50",
]


def without(settings: list[str], *keys: str) -> list[str]:
    return [s for s in settings if not s.startswith(keys)]


@pytest.fixture
def settings(tiny_settings: list[str]) -> list[str]:
    return without(tiny_settings, "model.args", "train.epochs") + EVERYTHING


def states(run: Path, step: int) -> dict[str, torch.Tensor]:
    _, state = load_checkpoint(checkpoint_path(run / "checkpoints", step))
    flat: dict[str, torch.Tensor] = {}
    for part in ("network", "ema"):
        flat |= {f"{part}.{key}": value for key, value in state[part].items()}
    for index, entry in state["optimizer"]["state"].items():
        flat |= {f"optimizer.{index}.{key}": value for key, value in entry.items()}
    return flat


def lines(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["resident", "files"])
def test_a_resumed_run_equals_the_undisturbed_one_bit_for_bit(
    tmp_path: Path, settings: list[str], storage: str
) -> None:
    settings = [*settings, f"data.storage={storage}", "data.num_workers=0"]
    calm, broken = tmp_path / "calm", tmp_path / "broken"
    fieldmark.train("digits", settings, out=calm)
    shutil.copytree(calm, broken)
    # As if killed after update 4 of 12, with half of a later line and file written.
    for path in (broken / "checkpoints").iterdir():
        if int(path.name[5:13]) > 4:
            path.unlink()
    checkpoint_path(broken / "checkpoints", 6).write_bytes(b"half")
    with (broken / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "train", "st')
    (broken / "metrics.json").unlink()
    fieldmark.train(out=broken, resume=True)
    a, b = states(calm, 12), states(broken, 12)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert lines(calm) == lines(broken)
    steps = [line["step"] for line in lines(broken) if line["kind"] == "train"]
    assert steps == list(range(1, 13))


@pytest.mark.slow
def test_workers_change_nothing(tmp_path: Path, settings: list[str]) -> None:
    digests = []
    for workers in (0, 2):
        out = tmp_path / str(workers)
        changed = without(settings, "train.epochs") + ["data.storage=files", "train.epochs=1"]
        fieldmark.train("digits", [*changed, f"data.num_workers={workers}"], out=out)
        digests.append(states(out, 3))
    assert all(torch.equal(digests[0][key], digests[1][key]) for key in digests[0])


def test_a_run_records_what_decided_what(tiny_run: Path) -> None:
    decisions = {d["kind"]: d for d in map(json.loads, (tiny_run / "decisions.jsonl").open())}
    assert decisions["total_steps"]["value"] == 18
    assert decisions["storage"]["value"] == "resident"
    assert decisions["selection"]["value"]["split"] == "val"
    assert "stratified" in decisions["split val"]["why"]
    environment = json.loads((tiny_run / "environment.json").read_text())
    assert {"cpu", "threads", "ranks", "torch", "python"} <= environment.keys()
    metrics = json.loads((tiny_run / "metrics.json").read_text())
    assert metrics["measured_on"] == "test"
    assert metrics["top1_accuracy"]["n"] == 32
    assert (tiny_run / "evaluations" / "test" / "predictions.npz").is_file()


def test_without_a_validation_split_the_last_weights_are_taken(
    tmp_path: Path, tiny_settings: list[str]
) -> None:
    settings = without(tiny_settings, "data.val_frac", "train.epochs")
    result = fieldmark.train(
        "digits", [*settings, "data.val_frac=0", "train.steps=3"], out=tmp_path / "run"
    )
    assert result.facts["selected_by"] == {"split": None, "step": 3}
    assert "val" not in [line["kind"] for line in lines(tmp_path / "run")]


@pytest.mark.slow
def test_early_stopping_ends_the_run_and_a_resumed_one_stays_ended(
    tmp_path: Path, tiny_settings: list[str]
) -> None:
    out = tmp_path / "run"
    settings = [*tiny_settings, "optim.lr=1e-12", "train.epochs=9", "train.early_stop_epochs=2"]
    result = fieldmark.train("digits", [*settings, "optim.weight_decay=0"], out=out)
    last = lines(out)[-1]["step"]
    assert last < 27
    (out / "metrics.json").unlink()
    again = fieldmark.train(out=out, resume=True)
    assert lines(out)[-1]["step"] == last
    assert again.facts["selected_by"] == result.facts["selected_by"]


def test_an_existing_folder_is_refused_and_nothing_in_it_changes(tiny_run: Path) -> None:
    before = (tiny_run / "config.json").read_bytes()
    with pytest.raises(RunError, match="must not exist yet. Resume with"):
        fieldmark.train("digits", out=tiny_run)
    assert (tiny_run / "config.json").read_bytes() == before


def test_a_run_whose_folder_was_replaced_leaves_nothing_to_the_new_one(
    tmp_path: Path, tiny_settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, save = tmp_path / "run", session.save_checkpoint

    def replace_after(*arguments: Any, **named: Any) -> Path:
        path = save(*arguments, **named)
        shutil.rmtree(out)
        with RunFolder.create(out, find_recipe("digits")):
            pass
        return path

    monkeypatch.setattr(session, "save_checkpoint", replace_after)
    with pytest.raises(RunError, match=r"run must stay where it is .* removed or replaced"):
        fieldmark.train("digits", [*tiny_settings, "train.checkpoint_steps=2"], out=out)
    assert not list((out / "checkpoints").iterdir())


def test_resume_takes_the_run_s_own_configuration(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the run's own configuration. Got 'train.epochs=9'"):
        fieldmark.train(settings=["train.epochs=9"], out=tiny_run, resume=True)
    with pytest.raises(RunError, match="Found no config.json"):
        fieldmark.train(out=tmp_path / "nothing", resume=True)
    with pytest.raises(ConfigError, match="--out DIR"):
        fieldmark.train(resume=True)
    ended = fieldmark.train(out=tiny_run, resume=True)
    assert ended.facts["measured_on"] == "test"


@pytest.mark.slow
def test_a_second_process_is_told_who_holds_the_run(tmp_path: Path) -> None:
    with RunFolder.create(tmp_path / "run", find_recipe("digits")):
        done = subprocess.run(
            [PROGRAM, "train", "--resume", "--out", str(tmp_path / "run")],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 2
    assert f"is in use by process {os.getpid()}" in done.stderr


def test_data_that_changed_under_the_run_is_an_error(
    tmp_path: Path, tiny_settings: list[str], tiny_images: Path
) -> None:
    import shutil

    data = tmp_path / "data"
    shutil.copytree(tiny_images, data)
    out = tmp_path / "run"
    settings = without(tiny_settings, "train.epochs")
    settings += [f"data.source=folder:{data}", "train.steps=2"]
    fieldmark.train("digits", settings, out=out)
    (out / "metrics.json").unlink()
    shutil.copy(data / "train/red/00.png", data / "train/red/99.png")
    with pytest.raises(DataError, match="changed since the run began"):
        fieldmark.train(out=out, resume=True)


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_a_sound_checkpoint(
    tmp_path: Path, tiny_settings: list[str]
) -> None:
    out = tmp_path / "run"
    with pytest.raises(NonFiniteLoss, match="from update"):
        fieldmark.train("digits", [*tiny_settings, "optim.lr=1e30"], out=out)
    assert not (out / "metrics.json").exists()
    for path in (out / "checkpoints").glob("*.ckpt"):
        _, state = load_checkpoint(path)
        assert all(
            torch.isfinite(v).all() for v in state["network"].values() if v.is_floating_point()
        )


@pytest.mark.slow
def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_resume(
    tmp_path: Path, tiny_settings: list[str]
) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(
        [PROGRAM, "train", "digits", *tiny_settings, "train.epochs=3000", "--out", str(out)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    limit = time.monotonic() + 60
    while not list(out.glob("checkpoints/*.ckpt")) and time.monotonic() < limit:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"Resume with: fieldmark train --resume --out {out}" in stderr.replace("\n", " ")
    assert "Traceback" not in stdout + stderr
    assert list(out.glob("checkpoints/*.ckpt"))

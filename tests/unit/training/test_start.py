"""What is settled before the first update: sizes, batch size, memory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fieldmark
from fieldmark.model import AirNet
from fieldmark.training import start

PROGRAM = Path(sys.executable).with_name("fieldmark")


def without(settings: list[str], *keys: str) -> list[str]:
    return [s for s in settings if s.partition("=")[0] not in keys]


@pytest.mark.slow
def test_images_of_a_run_have_the_sizes_asked_for(
    tmp_path: Path, tiny_settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    forward = AirNet.forward

    def watched(self: AirNet, x: Tensor) -> Tensor:
        # Rehearsals run on copies with 2 or 4 images.
        if self.training and len(x) == 16:
            seen.append(x.shape[-1])
        return forward(self, x)

    monkeypatch.setattr(AirNet, "forward", watched)
    settings = without(tiny_settings, "train.epochs")
    settings += ["train.steps=5", "augment.sizes=[[0.0,16],[0.4,24],[0.8,32]]"]
    fieldmark.train("digits", settings, out=tmp_path / "run")
    assert seen == [16, 16, 24, 24, 32]


def test_an_automatic_batch_size_is_decided_once(tmp_path: Path, tiny_settings: list[str]) -> None:
    run = tmp_path / "run"
    settings = [*without(tiny_settings, "train.batch_size", "train.epochs"), "train.steps=3"]
    fieldmark.train("digits", [*settings, "train.batch_size=auto"], out=run)
    lines = [json.loads(line) for line in (run / "decisions.jsonl").read_text().splitlines()]
    (decided,) = [line for line in lines if line["kind"] == "batch_size"]
    assert decided["value"] == 2  # a 20th of 48 images
    assert "at most a 20th of 48 images" in decided["why"]


@pytest.mark.slow
def test_a_run_that_would_not_fit_is_refused_before_it_starts(
    tmp_path: Path, tiny_settings: list[str]
) -> None:
    settings = [*without(tiny_settings, "train.batch_size"), "train.batch_size=48"]
    settings += ["model.image_px=640", "data.storage=files", "data.num_workers=0"]
    command = [PROGRAM, "train", "digits", *settings, "--out", str(tmp_path / "run")]
    done = subprocess.run(
        ["bash", "-c", 'ulimit -v 9000000; exec "$@"', "bash", *command],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "must fit" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_weights_of_another_network_are_one_sentence(
    tmp_path: Path, tiny_settings: list[str]
) -> None:
    run = tmp_path / "run"
    fieldmark.train("digits", [*without(tiny_settings, "train.epochs"), "train.steps=2"], out=run)
    (run / "metrics.json").unlink()
    config = json.loads((run / "config.json").read_text())
    config["model"]["args"]["widths"] = [8, 8, 32]
    (run / "config.json").write_text(json.dumps(config))
    with pytest.raises(fieldmark.errors.CheckpointError, match="must fit the run's network"):
        fieldmark.train(out=run, resume=True)


@pytest.mark.slow
def test_the_estimate_leaves_the_first_update_alone(
    tmp_path: Path, tiny_settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*without(tiny_settings, "train.epochs"), "train.steps=3"]

    def weights(name: str) -> dict[str, Tensor]:
        result = fieldmark.train("digits", settings, out=tmp_path / name)
        assert result.path is not None
        from safetensors.torch import load_file

        return load_file(result.path / "package" / "model.safetensors")

    with_it = weights("with")
    monkeypatch.setattr("fieldmark.training.start.check_memory", lambda *_, **__: None)
    without_it = weights("without")
    assert all(torch.equal(with_it[name], without_it[name]) for name in with_it)


def test_operations_that_cannot_be_counted_are_said_so_and_the_run_goes_on(
    tmp_path: Path,
    tiny_settings: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object, **__: object) -> float:
        raise NotImplementedError("aten::odd on meta")

    monkeypatch.setattr(start, "training_flops", refuse)
    settings = [s for s in tiny_settings if not s.startswith("train.epochs")]
    result = fieldmark.train("digits", [*settings, "train.steps=2"], out=tmp_path / "run")
    assert result.facts["cost"] == {"images": 32, "pflop": None}
    assert "cannot be counted: aten::odd on meta" in capsys.readouterr().err


def test_what_workers_read_ahead_counts_as_memory_that_is_taken(
    tmp_path: Path, tiny_settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    check = start.check_memory

    def watched(*arguments: Any, **named: Any) -> int | None:
        seen.append(named["beside_bytes"])
        return check(*arguments, **named)

    monkeypatch.setattr(start, "check_memory", watched)
    settings = [*without(tiny_settings, "train.epochs"), "train.steps=1", "data.num_workers=2"]
    for name, more in (("files", ["data.storage=files"]), ("resident", [])):
        fieldmark.train("digits", [*settings, *more], out=tmp_path / name)
    copy = seen[1]  # of the weights
    assert copy > 10_000
    assert seen[0] - copy == 2 * 3 * 16 * 3 * 32 * 32  # workers, batches, images, bytes of each
    more = ["train.ema_decay=0.9", "optim.lookahead_steps=3"]
    fieldmark.train("digits", [*settings, *more], out=tmp_path / "averages")
    assert seen[2] == 5 * copy  # each average, and the network and each average to go back to

"""Only the hardest images train, and a resumed run keeps to the same ones."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fieldmark
from fieldmark.errors import ConfigError, RunError
from fieldmark.training import parts
from fieldmark.training.checkpoint import load_newest
from fieldmark.training.hardest import HardestBatches


class Counting:
    """Batches whose images are their own numbers."""

    steps_per_epoch = 10

    def batches(self, start_step):  # type: ignore[no-untyped-def]
        step = start_step
        while True:
            for part in (0, 4):
                yield torch.arange(step * 8 + part, step * 8 + part + 4), torch.arange(4)
            step += 1


def test_a_mask_goes_over_the_parts_of_an_update() -> None:
    masks = np.zeros((3, 8), dtype=bool)
    masks[1, [0, 3, 7]] = True
    masks[2, [4, 5, 6]] = True
    parts = list(HardestBatches(Counting(), masks, 2).batches(1))
    assert [images.tolist() for images, _ in parts] == [[8, 11], [15], [], [20, 21, 22]]
    assert [targets.tolist() for _, targets in parts] == [[0, 3], [3], [], [0, 1, 2]]


@pytest.fixture
def settings(tiny_settings: list[str]) -> list[str]:
    return [*tiny_settings, "data.keep_hardest_frac=0.5", "train.checkpoint_steps=3"]


def lines(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


@pytest.mark.slow
def test_the_small_network_freezes_its_stem_as_the_large_one_does(
    tmp_path: Path, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[nn.Module] = []
    real = parts.proxy_network

    def watched(*arguments: int) -> nn.Module:
        made.append(real(*arguments))
        return made[-1]

    monkeypatch.setattr(parts, "proxy_network", watched)
    settings = [s for s in settings if not s.startswith("train.epochs")] + ["train.steps=6"]
    for epochs, learns in ((1, False), (3, True)):
        fieldmark.train(
            "digits", [*settings, f"optim.stem_epochs={epochs}"], out=tmp_path / str(epochs)
        )
        assert made[-1].whiten.bias.requires_grad == learns


@pytest.mark.slow
def test_half_of_each_update_trains_and_it_is_the_harder_half(
    tmp_path: Path, settings: list[str]
) -> None:
    out = tmp_path / "run"
    fieldmark.train("digits", settings, out=out)
    masks = np.unpackbits(np.fromfile(out / "hardest.npy", dtype=np.uint8)).reshape(-1, 16)
    total = len([line for line in lines(out) if line["kind"] == "train"])
    assert masks.shape == (total, 16)
    assert (masks.sum(1) == 8).all()
    fieldmark.train("digits", settings[:-2] + settings[-1:], out=tmp_path / "all")
    hard, easy = (
        np.mean([line["loss"] for line in lines(run) if line["kind"] == "train"][:3])
        for run in (out, tmp_path / "all")
    )
    assert hard > easy


@pytest.mark.slow
def test_a_resumed_run_takes_the_same_images(tmp_path: Path, settings: list[str]) -> None:
    settings = [*settings, "train.keep_checkpoints=50"]
    for name in "ab":
        fieldmark.train("digits", settings, out=tmp_path / name)
    for path in (tmp_path / "b" / "checkpoints").iterdir():
        if int(path.name[5:13]) > 6:
            path.unlink()
    (tmp_path / "b" / "metrics.json").unlink()
    fieldmark.train(out=tmp_path / "b", resume=True)
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    a, b = (load_newest(tmp_path / name / "checkpoints") for name in "ab")
    assert a is not None
    assert b is not None
    for name, value in a[1]["network"].items():
        assert torch.equal(value, b[1]["network"][name])
    (tmp_path / "b" / "metrics.json").unlink()
    (tmp_path / "b" / "hardest.npy").write_bytes(b"others")
    with pytest.raises(RunError, match="was changed"):
        fieldmark.train(out=tmp_path / "b", resume=True)


@pytest.mark.parametrize("other", ["data.storage=files", "train.max_minutes=5"])
def test_what_cannot_be_looked_at_beforehand_is_refused(settings: list[str], other: str) -> None:
    settings = [s for s in settings if not s.startswith("train.epochs")]
    with pytest.raises(ConfigError, match="looks at every update beforehand"):
        fieldmark.train("digits", [*settings, other])

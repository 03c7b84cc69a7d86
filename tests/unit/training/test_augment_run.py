"""A run with a policy, a sampler and copies: what is recorded, and that resuming repeats it."""

import json
from pathlib import Path

import pytest
import torch

import fieldmark
from fieldmark.config import AugmentConfig, DataConfig
from fieldmark.data.source import open_source
from fieldmark.preprocess import Preprocess
from fieldmark.training.checkpoint import checkpoint_path, load_checkpoint
from fieldmark.training.prepare import decide_augment

SPEC = Preprocess(height_px=32, width_px=32, mean=(0, 0, 0), std=(1, 1, 1))


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return load_checkpoint(checkpoint_path(run / "checkpoints", step))[1]["network"]


@pytest.mark.parametrize("storage", ["resident", pytest.param("files", marks=pytest.mark.slow)])
def test_a_policy_is_recorded_and_a_resumed_run_equals_the_undisturbed_one(
    tmp_path: Path, tiny_settings: list[str], storage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [s for s in tiny_settings if not s.startswith(("train.epochs", "augment.flip"))]
    settings += [
        f"data.storage={storage}",
        "data.num_workers=0",
        "data.sampler=balanced",
        "data.repeats=2",
        "augment.policy=auto",
        "augment.cutmix_alpha=1",
        "augment.mixup_alpha=0.5",
        "train.accumulation_steps=2",
        "train.checkpoint_steps=2",
        "train.keep_checkpoints=9",
        "train.epochs=2",
    ]
    calm, broken = tmp_path / "calm", tmp_path / "broken"
    fieldmark.train("digits", settings, out=calm)
    assert "policy auto: strong, for 48 images in 4 classes" in capsys.readouterr().err
    decisions = {d["kind"]: d for d in map(json.loads, (calm / "decisions.jsonl").open())}
    decided = AugmentConfig.model_validate(decisions["augment"]["value"])
    assert (decided.policy, decided.cutout_px, decided.flip) == ("custom", 16, "random")
    assert decided.cutmix_alpha == 1
    assert "set by hand: cutmix_alpha, mixup_alpha" in decisions["augment"]["why"]

    fieldmark.train("digits", settings, out=broken)
    for path in (broken / "checkpoints").iterdir():
        if int(path.name[5:13]) > 2:
            path.unlink()
    (broken / "metrics.json").unlink()
    fieldmark.train(out=broken, resume=True)
    a, b = weights(calm, 6), weights(broken, 6)
    assert all(torch.equal(a[key], b[key]) for key in a)
    # What was recorded holds, not what the policy would say today.
    assert (broken / "decisions.jsonl").read_text().count('"kind": "augment"') == 1


def test_what_was_decided_holds() -> None:
    split = open_source("digits").splits["all"]
    before = AugmentConfig(crop_pad_px=7, flip="none", sizes=((0.0, 16), (0.5, 32)))
    stored = json.loads(json.dumps(before.model_dump(mode="json")))
    asked: list[str] = []

    def decide(kind: str, value: object, why: str) -> object:
        asked.append(kind)
        json.dumps(value)
        return stored

    config = AugmentConfig(policy="strong")
    assert decide_augment(config, split, SPEC, DataConfig(source="digits"), decide) == before
    assert asked == ["augment"]

"""Linear probes as runs: the package's logits, resuming, refusals."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

import fieldmark
from fieldmark.cookbook import load_recipe
from fieldmark.data.source import open_source
from fieldmark.data.split import make_splits
from fieldmark.errors import ConfigError, DataError, Interrupted, ModelError, Preempted
from fieldmark.evaluation.backends import open_reference
from fieldmark.packaging.resolve import resolve_model
from fieldmark.training import features, probe
from fieldmark.training.features import Features
from fieldmark.training.regression import fit
from random_weights import save_weights


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return save_weights(tmp_path / "weights")


@pytest.fixture
def settings(tiny_images: Path, weights: Path) -> list[str]:
    return [
        f"data.source=folder:{tiny_images}",
        "data.val_frac=0.25",
        f"model.pretrained=local-dir:{weights}",
        "train.threads=1",
        "probe.neighbours=3",
    ]


def kept_features(run: Path) -> Features:
    """Return the train features as the run stored them."""
    with np.load(run / "features" / "train-00000000.npz") as stored:
        config = json.loads((run / "config.json").read_text())["data"]
        splits = make_splits(
            open_source(config["source"]),
            val_frac=config["val_frac"],
            test_frac=config["test_frac"],
            split_seed=0,
        )
        return Features(stored["values"], splits.train.labels[stored["rows"]], 0.0)


def test_a_probe_is_measured_and_packaged_like_any_run(tmp_path: Path, settings: list[str]) -> None:
    out = tmp_path / "run"
    result = fieldmark.train("linear-probe", settings, out=out)
    assert result.facts["measured_on"] == "test"
    assert result.facts["top1_accuracy"]["n"] == 32
    assert result.facts["top1_accuracy"]["value"] >= 0.9  # chance is 0.25
    report = json.loads((out / "probe.json").read_text())
    assert report["test_top1_accuracy"] == result.facts["top1_accuracy"]
    assert report["val_top1_accuracy"]["n"] == report["knn_val_top1_accuracy"]["n"] == 16
    assert report["train_top1_accuracy"]["n"] == report["folds_images"] == 48
    assert [score["penalty"] for score in report["penalties"]] == [1e-3, 1e-2, 0.1, 1, 10]
    best = max(score["accuracy"] for score in report["penalties"])
    (chosen,) = [s for s in report["penalties"] if s["penalty"] == report["penalty"]]
    assert chosen["accuracy"] == best
    val = json.loads((out / "evaluations" / "val" / "metrics.json").read_text())
    assert report["val_top1_accuracy"] == val["top1_accuracy"]
    decisions = {d["kind"]: d for d in map(json.loads, (out / "decisions.jsonl").open())}
    assert decisions["probe.penalty"]["value"] == report["penalty"]
    assert decisions["probe.folds"]["value"] == 5
    manifest = json.loads((out / "package" / "manifest.json").read_text())
    assert manifest["training"]["probe"]["penalties"] == report["penalties"]
    assert manifest["architecture"]["name"] == "test_resnet"
    assert manifest["preprocess"]["std"] == [0.25] * 3


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_the_package_s_logits_are_the_regression_s_and_the_backbone_is_untouched(
    tmp_path: Path, settings: list[str], tiny_images: Path, name: str
) -> None:
    weights = save_weights(tmp_path / name, name)
    settings = [*settings, f"model.pretrained=local-dir:{weights}"]
    if name == "test_vit":  # built for 160 px: position embeddings are resampled
        settings.append("model.image_px=32")
    out = tmp_path / "run"
    fieldmark.train("linear-probe", settings, out=out)
    penalty = json.loads((out / "probe.json").read_text())["penalty"]
    kept = kept_features(out)
    regression, _ = fit(kept.values, kept.labels, 4, penalty)
    package = resolve_model(str(out))
    splits = make_splits(
        open_source(f"folder:{tiny_images}"), val_frac=0.25, test_frac=0.15, split_seed=0
    )
    images = [splits.train.images.encoded(index) for index in range(len(kept))]
    pixels = np.stack([package.preprocess(data) for data in images])
    logits = open_reference(package)(pixels)
    expected = regression.logits(kept.values[0])
    assert np.abs(logits - expected).max() < 1e-3 * max(1, np.abs(expected).max())
    before = timm.create_model(f"local-dir:{weights}", pretrained=True).state_dict()
    after = timm.create_model(f"local-dir:{out / 'package'}", pretrained=True).state_dict()
    changed = {
        key
        for key, value in after.items()
        if value.shape != before[key].shape or not torch.equal(value, before[key])
    }
    allowed = {"fc.weight", "fc.bias", "head.weight", "head.bias", "pos_embed"}
    assert changed <= allowed


@pytest.mark.parametrize(
    ("received", "error"), [(signal.SIGINT, Interrupted), (signal.SIGTERM, Preempted)]
)
def test_a_resumed_run_does_not_extract_again_and_ends_the_same(
    tmp_path: Path,
    settings: list[str],
    monkeypatch: pytest.MonkeyPatch,
    received: signal.Signals,
    error: type[Exception],
) -> None:
    calm, stopped = tmp_path / "calm", tmp_path / "stopped"
    expected = fieldmark.train("linear-probe", settings, out=calm).facts

    def interrupt(*_: object, **__: object) -> None:
        os.kill(os.getpid(), received)
        pytest.fail("the signal did not stop it")

    with monkeypatch.context() as during:
        during.setattr(probe, "cross_validate", interrupt)
        with pytest.raises(error, match="the features extracted so far are kept"):
            fieldmark.train("linear-probe", settings, out=stopped)
    assert not (stopped / "metrics.json").exists()

    def extract_again(*_: object) -> None:
        pytest.fail("features were there and are extracted again")

    monkeypatch.setattr(features, "_extract_part", extract_again)
    found = fieldmark.train(out=stopped, resume=True).facts
    for key in ("top1_accuracy", "loss", "confusion"):
        assert found[key] == expected[key]
    a, b = (json.loads((run / "probe.json").read_text()) for run in (calm, stopped))
    times = ("extract_s", "fit_s")
    assert {k: v for k, v in a.items() if k not in times} == {
        k: v for k, v in b.items() if k not in times
    }
    ended = fieldmark.train(out=stopped, resume=True)
    assert ended.facts["probe"]["penalty"] == a["penalty"]


def test_other_weights_on_resuming_are_refused(
    tmp_path: Path, settings: list[str], weights: Path
) -> None:
    out = tmp_path / "run"
    fieldmark.train("linear-probe", settings, out=out)
    (out / "metrics.json").unlink()
    save_weights(weights, seed=1)
    with pytest.raises(ModelError, match="changed since the run began: its weights are others"):
        fieldmark.train(out=out, resume=True)
    assert (out / "features").is_dir()


def test_broken_images_are_left_out_up_to_the_limit(
    tmp_path: Path, tiny_images: Path, settings: list[str]
) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(tiny_images, photos)
    for path in sorted((photos / "train" / "red").iterdir())[:12]:
        path.write_bytes(path.read_bytes()[:60])
    settings = [*settings, f"data.source=folder:{photos}", "data.val_frac=0"]
    with pytest.raises(DataError, match=r"at most 5\.0% of the train images may be broken"):
        fieldmark.train("linear-probe", settings, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    settings.append("data.max_broken_frac=0.5")
    facts = fieldmark.train("linear-probe", settings, out=tmp_path / "run").facts
    assert [name for name, _ in facts["broken"]] == [f"train/red/{n:02d}.png" for n in range(12)]
    assert facts["probe"]["train_images"] == 52
    assert facts["probe"]["folds"] == 4  # as many as red has images
    assert facts["probe"]["val_top1_accuracy"] is None
    assert facts["probe"]["knn_val_top1_accuracy"] is None
    assert facts["probe"]["knn_train_top1_accuracy"]["n"] == 52
    assert facts["probe"]["knn_train_top1_accuracy"]["value"] > 0.5  # chance is 0.25


def test_a_class_without_a_train_image_is_refused(
    tmp_path: Path, tiny_images: Path, settings: list[str]
) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(tiny_images, photos)
    for path in (photos / "train" / "red").iterdir():
        path.write_bytes(b"no image")
    settings = [*settings, f"data.source=folder:{photos}", "data.val_frac=0"]
    settings.append("data.max_broken_frac=0.5")
    with pytest.raises(DataError, match="Got none of 1 of 4 classes, the first 'red'"):
        fieldmark.train("linear-probe", settings, out=tmp_path / "run")


def test_a_network_without_a_plain_head_is_refused_before_anything_is_read(
    tmp_path: Path, settings: list[str]
) -> None:
    airnet = save_weights(tmp_path / "airnet", "airnet")
    settings = [*settings, f"model.pretrained=local-dir:{airnet}"]
    with pytest.raises(ModelError, match="must be a linear layer with a bias"):
        fieldmark.train("linear-probe", settings, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_mirrored_views_double_the_examples_of_train_only(
    tmp_path: Path, settings: list[str]
) -> None:
    out = tmp_path / "run"
    fieldmark.train("linear-probe", [*settings, "probe.views=mirrored"], out=out)
    assert np.load(out / "features" / "train-00000000.npz")["values"].shape[:2] == (2, 48)
    assert np.load(out / "features" / "val-00000000.npz")["values"].shape[:2] == (1, 16)
    assert json.loads((out / "probe.json").read_text())["train_top1_accuracy"]["n"] == 48


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["model.pretrained="], "needs model.pretrained, whose features it reads"),
        (["optim.lr=0.01"], "Got optim.lr=0.01. Leave them out, and start from the recipe"),
        (["train.epochs=3", "augment.flip=random"], "augment.flip='random', train.epochs=3.0"),
        (["model.freeze=backbone"], "Got model.freeze='backbone'"),
        (["data.num_workers=4"], "Got data.num_workers=4"),
        (["loss.label_smoothing=0.1", "schedule.warmup_steps=2"], "loss.label_smoothing=0.1, sch"),
        (["train.precision=bfloat16"], "Got train.precision='bfloat16'"),
        (["probe.penalties=[]"], "must list different numbers above 0"),
        (["probe.penalties=[1.0, 0]"], "must list different numbers above 0"),
        (["probe.penalties=[1.0, 1.0]"], "must list different numbers above 0"),
        (["probe.folds=1"], "probe.folds"),
    ],
)
def test_what_a_probe_does_not_read_is_refused(changes: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe("linear-probe", ["model.arch=resnet18", *changes])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_probe_of_another_recipe_s_settings_names_the_first_and_counts_the_rest() -> None:
    with pytest.raises(ConfigError, match=r"augment\.policy=.auto., .* and \d+ more\. Leave"):
        load_recipe("finetune", ["train.method=linear-probe"])


def test_settings_of_a_probe_are_refused_where_none_is_fitted() -> None:
    with pytest.raises(ConfigError, match=r"train\.method=gradient must leave .* probe\.folds=3"):
        load_recipe("finetune", ["probe.folds=3"])


def test_the_recipe_can_train_by_gradient_when_told_how_long() -> None:
    config = load_recipe("linear-probe", ["train.method=gradient", "train.epochs=2"])
    assert (config.train.method, config.train.epochs) == ("gradient", 2)

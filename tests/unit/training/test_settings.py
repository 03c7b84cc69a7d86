"""Settings that change how a run computes, each through the whole pipeline."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

import fieldmark
from fieldmark.errors import ConfigError, DataError, ModelError
from fieldmark.packaging.manifest import open_package
from fieldmark.training import device
from fieldmark.training.checkpoint import load_newest
from fieldmark.training.run_folder import RunFolder


def losses(run: Path) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").open())
    return [line["loss"] for line in lines if line["kind"] == "train"]


def short(settings: list[str], *more: str) -> list[str]:
    return [s for s in settings if not s.startswith("train.epochs")] + ["train.steps=4", *more]


@pytest.mark.parametrize(
    "setting",
    [
        "train.precision=bfloat16",
        "train.channels_last=false",
        "train.ema_decay=0.5",
        "optim.max_grad_norm=0.1",
        "optim.decay_norm_and_bias=false",
        "optim.name=adamw",
        "loss.label_smoothing=0.2",
        "augment.crop_pad_mode=reflect",
        "schedule.end_factor=0.5",
        "data.num_workers=0",
    ],
)
def test_a_setting_runs_and_changes_what_it_should(
    tmp_path: Path, tiny_settings: list[str], setting: str
) -> None:
    base = short(tiny_settings, "train.threads=1", "optim.weight_decay=0.1")
    plain = fieldmark.train("digits", base, out=tmp_path / "plain")
    other = fieldmark.train("digits", [*base, setting], out=tmp_path / "other")
    assert plain.path is not None
    assert other.path is not None
    results = [
        tuple(load_newest(path / "checkpoints")[1]["network"]["head.weight"].flatten().tolist())
        for path in (plain.path, other.path)
    ]
    assert all(torch.tensor(r).isfinite().all() for r in results)
    same = results[0] == results[1]
    changes_the_weights = setting not in ("train.ema_decay=0.5", "data.num_workers=0")
    if setting == "train.channels_last=false":
        assert losses(other.path) == pytest.approx(losses(plain.path), rel=1e-3)
    else:
        assert same is not changes_the_weights


def test_pretrained_takes_a_package_and_keeps_its_head_for_the_same_classes(
    tmp_path: Path,
    tiny_settings: list[str],
    tiny_package: Path,
    tiny_images: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = [s for s in short(tiny_settings) if not s.startswith("model")]
    base += ["model.arch=", f"model.pretrained={tiny_package}", "train.steps=1", "optim.lr=1e-9"]
    base.remove("train.steps=4")
    same = fieldmark.train("digits", base, out=tmp_path / "same")
    assert "head of digits is kept" in capsys.readouterr().err
    recorded = open_package(tiny_package).manifest.metrics["test"]
    assert isinstance(recorded, dict)
    assert same.facts["top1_accuracy"] == recorded["top1_accuracy"]
    three = tmp_path / "three"
    shutil.copytree(tiny_images, three)
    for split in ("train", "test"):
        shutil.rmtree(three / split / "striped")
    changed = [f"data.source=folder:{three}", "model.freeze=backbone", *base[1:]]
    frozen = fieldmark.train("digits", changed, out=tmp_path / "frozen")
    assert "new head for 3 classes" in capsys.readouterr().err
    before = open_package(tiny_package)
    after = open_package(Path(frozen.facts["package"]))
    old, new = (safetensors.torch.load(p.read("model.safetensors")) for p in (before, after))
    assert new["head.weight"].shape[0] == 3
    backbone = [key for key in old if not key.startswith("head")]
    assert [key for key in backbone if not torch.equal(old[key], new[key])] == []


def test_pretrained_and_architecture_must_agree(
    tmp_path: Path, tiny_settings: list[str], tiny_package: Path
) -> None:
    base = [s for s in short(tiny_settings) if not s.startswith("model")]
    wrong = [*base, "model.arch=resnet18", f"model.pretrained={tiny_package}"]
    with pytest.raises(ConfigError, match="must be that of model.pretrained, 'airnet'"):
        fieldmark.train("digits", wrong, out=tmp_path / "a")
    tag = [*base, "model.arch=", "model.pretrained=a1_in1k"]
    with pytest.raises(ConfigError, match="Name the network: model.arch=NAME"):
        fieldmark.train("digits", tag, out=tmp_path / "b")
    stem = [*base, "model.arch=", f"model.pretrained={tiny_package}", "model.small_input=always"]
    with pytest.raises(ModelError, match="would replace the stem"):
        fieldmark.train("digits", stem, out=tmp_path / "c")
    offline = [*base, "model.arch=resnet18", "model.pretrained=a1_in1k"]
    with pytest.raises(ModelError, match="Without a connection, give a folder"):
        fieldmark.train("digits", offline, out=tmp_path / "d")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("storage", ["resident", pytest.param("files", marks=pytest.mark.slow)])
def test_broken_training_images_are_named_counted_and_left_out(
    tmp_path: Path,
    tiny_settings: list[str],
    tiny_images: Path,
    storage: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_images, data)
    for name in ("03", "07"):
        file = data / "train" / "red" / f"{name}.png"
        file.write_bytes(file.read_bytes()[:60])
    base = [s for s in tiny_settings if not s.startswith(("data.source", "train.epochs"))]
    base += [f"data.source=folder:{data}", f"data.storage={storage}", "data.num_workers=0"]
    base += ["train.epochs=2"]
    result = fieldmark.train("digits", [*base, "data.max_broken_frac=0.1"], out=tmp_path / "run")
    assert {name for name, _ in result.facts["broken"]} == {"train/red/03.png", "train/red/07.png"}
    assert capsys.readouterr().err.count("03.png") == 1
    with pytest.raises(DataError, match="max_broken_frac"):
        fieldmark.train("digits", [*base, "data.max_broken_frac=0.01"], out=tmp_path / "no")
    test = data / "test" / "red" / "00.png"
    test.write_bytes(b"")
    with pytest.raises(DataError, match=r"test/red/00\.png"):
        fieldmark.train("digits", base, out=tmp_path / "no2")


def test_a_broken_file_leaves_its_accumulated_update_alive(
    tmp_path: Path, tiny_settings: list[str], tiny_images: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_images, data)
    (data / "train" / "red" / "03.png").write_bytes(b"not an image")
    base = [s for s in tiny_settings if not s.startswith(("data.source", "train.epochs"))]
    base += [f"data.source=folder:{data}", "data.storage=files", "data.num_workers=0"]
    base += ["train.accumulation_steps=16", "train.epochs=2", "augment.mixup_alpha=0.2"]
    result = fieldmark.train("digits", [*base, "data.val_frac=0"][1:], out=tmp_path / "run")
    assert [name for name, _ in result.facts["broken"]] == ["train/red/03.png"]
    assert all(torch.tensor(losses(tmp_path / "run")).isfinite())


@pytest.mark.slow
def test_a_compiled_run_learns_the_same(tmp_path: Path, tiny_settings: list[str]) -> None:
    if shutil.which("g++") is None:
        pytest.skip("torch.compile on a CPU needs a C++ compiler")
    base = short(tiny_settings)
    plain = fieldmark.train("digits", base, out=tmp_path / "plain")
    compiled = fieldmark.train("digits", [*base, "train.compile=true"], out=tmp_path / "compiled")
    assert plain.path is not None
    assert compiled.path is not None
    assert losses(compiled.path) == pytest.approx(losses(plain.path), rel=1e-2)


@pytest.mark.parametrize(("is_fast", "precision"), [(True, "bfloat16"), (False, "float32")])
def test_precision_auto_goes_by_the_processor_once(
    tmp_path: Path,
    tiny_settings: list[str],
    monkeypatch: pytest.MonkeyPatch,
    is_fast: bool,
    precision: str,
) -> None:
    def finds(fast: bool) -> None:
        monkeypatch.setattr(device, "multiplies_bfloat16", lambda _: fast)

    finds(is_fast)
    settings = short(tiny_settings, "train.threads=1")
    auto = fieldmark.train("digits", [*settings, "train.precision=auto"], out=tmp_path / "auto")
    named = fieldmark.train(
        "digits", [*settings, f"train.precision={precision}"], out=tmp_path / "named"
    )
    assert auto.facts["precision"] == precision
    assert losses(tmp_path / "auto") == losses(tmp_path / "named")
    assert named.facts["precision"] == precision

    finds(not is_fast)  # a run that is resumed elsewhere keeps what it began with
    with RunFolder.open(tmp_path / "auto") as run:
        settled = device.settle_precision(run.config().train, torch.device("cpu"), run.decide_once)
    assert settled.precision == precision

"""Calibrating a package, from the command line to the answers of predict and of the service."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

import fieldmark
from fieldmark.errors import ConfigError, DataError
from fieldmark.evaluation.backends import open_backend
from fieldmark.measure import softmax
from fieldmark.packaging.golden import read_golden
from fieldmark.packaging.manifest import open_package
from fieldmark.packaging.resolve import resolve_model
from fieldmark.serving.app import create_app
from fieldmark.serving.predictor import open_predictor

WRONG_FRAC = 0.1


@pytest.fixture(scope="session")
def doubtful_images(tmp_path_factory: pytest.TempPathFactory, tiny_image_files: list[Path]) -> Path:
    """256 images in class folders, of which one in ten lies in a wrong one."""
    root = tmp_path_factory.mktemp("doubtful") / "images"
    rng = np.random.default_rng(0)
    classes = sorted({file.parent.name for file in tiny_image_files})
    for file in tiny_image_files:
        pixels = np.asarray(Image.open(file)).astype(np.int16)
        for copy in range(8):
            true = classes.index(file.parent.name)
            shift = int(rng.integers(1, len(classes))) if rng.random() < WRONG_FRAC else 0
            name = classes[(true + shift) % len(classes)]
            (root / name).mkdir(parents=True, exist_ok=True)
            noisy = (pixels + rng.normal(0, 5, pixels.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(root / name / f"{true}-{file.stem}-{copy}.png")
    return root


@pytest.fixture
def package(tiny_package: Path, tmp_path: Path) -> Path:
    """A copy of the tiny package, which has no temperature."""
    return Path(shutil.copytree(tiny_package, tmp_path / "package"))


@pytest.fixture(scope="module")
def calibrated(
    tiny_package: Path, doubtful_images: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny package, calibrated on the doubtful images."""
    copy = tmp_path_factory.mktemp("calibrated") / "package"
    shutil.copytree(tiny_package, copy)
    data = f"folder:{doubtful_images}"
    result = fieldmark.calibrate(copy, data=data, plot=copy.parent / "plot.png")
    assert result.passed
    (copy.parent / "facts.json").write_text(json.dumps(result.to_json(), allow_nan=False))
    return copy


def test_the_temperature_mends_the_error_and_every_variant_is_measured_with_it(
    calibrated: Path,
) -> None:
    facts = json.loads((calibrated.parent / "facts.json").read_text())
    found = facts["confidence"]
    assert found["num_images"] == 256
    assert found["low"] < found["temperature"] < found["high"] < 1  # six epochs: it is too unsure
    assert found["after"]["ece"]["value"] < found["before"]["ece"]["value"]
    assert found["after"]["nll"]["value"] < found["before"]["nll"]["value"]
    assert found["nll_change"]["high"] < 0
    parity = facts["variants"]["onnx"]["parity"]
    assert parity["temperature"] == found["temperature"]
    assert parity["reference_ece"] == found["after"]["ece"]
    assert parity["ece"]["value"] == pytest.approx(found["after"]["ece"]["value"], abs=1e-3)
    assert open_package(calibrated).manifest.variants["onnx"].deployable
    assert Image.open(calibrated.parent / "plot.png").width > 500


def test_predict_and_the_service_divide_logits_by_it(
    calibrated: Path, tiny_package: Path, tiny_image_files: list[Path]
) -> None:
    temperature = open_package(calibrated).temperature
    file = tiny_image_files[0]
    predictor = open_predictor(calibrated)
    logits = open_backend(resolve_model(str(tiny_package)), "torch")(
        predictor.decode(file.read_bytes())[None]
    )[0]
    expected = dict(zip(predictor.class_names, softmax(logits, temperature), strict=True))
    plain = dict(zip(predictor.class_names, softmax(logits), strict=True))
    for variant in ("onnx", "torch"):
        [answer] = fieldmark.predict(calibrated, file, variant=variant)
        [before] = fieldmark.predict(tiny_package, file, variant=variant)
        for ranked in answer.predictions:
            assert ranked.probability == pytest.approx(expected[ranked.class_name], abs=1e-4)
        for ranked in before.predictions:
            assert ranked.probability == pytest.approx(plain[ranked.class_name], abs=1e-4)
        assert [p.class_name for p in answer.predictions] == [
            p.class_name for p in before.predictions
        ]
        assert answer.predictions[0].probability > before.predictions[0].probability + 0.01
    client = TestClient(create_app(predictor))
    body = client.post("/v1/classify", content=file.read_bytes()).json()
    assert set(body) == {"model", "preprocessing", "predictions"}
    for ranked in body["predictions"]:
        assert ranked["probability"] == pytest.approx(expected[ranked["class_name"]], abs=1e-4)


def test_golden_samples_stay_as_they_were(calibrated: Path, tiny_package: Path) -> None:
    golden, before = (read_golden(open_package(path)) for path in (calibrated, tiny_package))
    assert golden.answers == before.answers
    for answer, row in zip(golden.answers, golden.logits, strict=True):
        assert answer.probability == pytest.approx(softmax(row).max())


def test_evaluate_reports_both_and_info_shows_it(
    calibrated: Path, package: Path, doubtful_images: Path
) -> None:
    data = f"folder:{doubtful_images}"
    found = open_package(calibrated).manifest.confidence
    assert found is not None
    facts = fieldmark.evaluate(calibrated, data).facts
    assert facts["loss"] == pytest.approx(found.before.nll.value, abs=1e-6)
    assert facts["ece"] == pytest.approx(found.before.ece.model_dump())
    assert facts["calibrated"]["temperature"] == found.temperature
    assert facts["calibrated"]["ece"] == pytest.approx(found.after.ece.model_dump(), abs=1e-6)
    assert facts["calibrated"]["nll"] == pytest.approx(found.after.nll.model_dump(), abs=1e-6)
    assert "calibrated" not in fieldmark.evaluate(package, data).facts
    assert fieldmark.info(calibrated).facts["temperature"] == found.temperature
    assert fieldmark.info(package).facts["temperature"] == 1.0


def test_a_copy_of_a_package_keeps_it(calibrated: Path, tmp_path: Path) -> None:
    fieldmark.package(calibrated, tmp_path / "copy")
    copied = open_package(tmp_path / "copy").manifest.confidence
    assert copied == open_package(calibrated).manifest.confidence


def test_what_cannot_be_fitted_leaves_the_package_as_it_was(
    package: Path, tiny_images: Path, tmp_path: Path
) -> None:
    before = (package / "manifest.json").read_bytes()
    with pytest.raises(DataError, match=r"at least 100 .* Got 16 \(16 images of .*, val\)"):
        fieldmark.calibrate(package)
    with pytest.raises(DataError, match="Got 32"):
        fieldmark.calibrate(package, data=f"folder:{tiny_images}", split="test")
    with pytest.raises(ConfigError, match="--plot"):
        fieldmark.calibrate(package, plot=tmp_path / "nowhere" / "plot.png")
    assert (package / "manifest.json").read_bytes() == before


@pytest.mark.slow
def test_test_images_of_its_own_source_must_be_named(
    doubtful_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run without val is not calibrated; its test images are fitted on only if asked for."""
    settings = [
        f"data.source=folder:{doubtful_images}",
        "data.val_frac=0",
        "data.test_frac=0.45",
        "model.args.widths=[8,8,16]",
        "train.epochs=2",
        "train.batch_size=16",
    ]
    run = fieldmark.train("digits", settings, out=tmp_path / "run")
    assert run.facts["confidence"]["temperature"] is None
    assert "fieldmark calibrate" in run.facts["confidence"]["note"]
    with pytest.raises(DataError, match="must have held-out validation images"):
        fieldmark.calibrate(tmp_path / "run")
    result = fieldmark.calibrate(tmp_path / "run", split="test")
    assert result.facts["confidence"]["data"].endswith("test")
    assert "no test any more" in result.facts["notes"][0]
    assert "no test any more" in capsys.readouterr().err
    trained_on = fieldmark.calibrate(tmp_path / "run", split="all")
    assert "too low" in trained_on.facts["notes"][0]


@pytest.mark.slow
def test_a_run_with_enough_val_images_ends_calibrated(
    doubtful_images: Path, tmp_path: Path
) -> None:
    settings = [
        f"data.source=folder:{doubtful_images}",
        "data.val_frac=0.45",
        "data.test_frac=0.1",
        "model.args.widths=[8,8,16]",
        "train.epochs=3",
        "train.batch_size=16",
    ]
    run = fieldmark.train("digits", settings, out=tmp_path / "run")
    found = open_package(tmp_path / "run" / "package").manifest.confidence
    assert found is not None
    assert run.facts["confidence"]["temperature"] == found.temperature
    assert found.data.endswith(", val")
    assert run.facts["measured_on"] == "test"
    assert run.facts["calibrated"]["temperature"] == found.temperature
    metrics = json.loads((tmp_path / "run/evaluations/val/metrics.json").read_text())
    assert metrics["calibrated"]["nll"] == found.after.nll.model_dump()
    assert metrics["ece"] == found.before.ece.model_dump()
    # The verb fits the same images again, and finds the same.
    again = fieldmark.calibrate(tmp_path / "run").facts["confidence"]
    assert again["temperature"] == pytest.approx(found.temperature, rel=1e-4)
    assert again["data"] == found.data

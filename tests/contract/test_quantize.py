"""`fieldmark quantize`, from the trained package to an int8 variant that serves."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fieldmark
from fieldmark.errors import CheckFailed, FieldmarkError
from fieldmark.evaluation.int8_run import speed_ratio
from fieldmark.packaging.entries import GoldenCheck
from fieldmark.packaging.golden import check_golden
from fieldmark.packaging.load import open_onnx
from fieldmark.packaging.manifest import open_package
from fieldmark.serving.predictor import open_predictor


@pytest.fixture(scope="module")
def quantized(
    tiny_package: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, object]]:
    """A copy of the tiny package with an int8 variant, and what was said of it.

    The bound is wide: with 32 test images, one is 3 points, and a network of 16 channels rounds
    more than a real one.
    """
    folder = tmp_path_factory.mktemp("int8") / "package"
    shutil.copytree(tiny_package, folder)
    with pytest.MonkeyPatch.context() as patch:
        # So small a network may well be slower in integers, and no test shall hang on timings.
        patch.setattr("fieldmark.evaluation.int8_run.speed_ratio", lambda *_: 2.0)
        result = fieldmark.quantize(folder, max_drop=7.0, plot=folder.parent / "frontier.png")
    assert result.passed, result.facts
    return folder, result.to_json()


def test_auto_adds_a_variant_and_reports_on_other_images(
    quantized: tuple[Path, dict[str, object]],
) -> None:
    folder, facts = quantized
    variant = open_package(folder).manifest.variants["int8"]
    assert variant.precision == "int8"
    assert variant.deployable
    quantization, parity = variant.quantization, variant.parity
    assert quantization is not None
    assert quantization.calibration_set is not None
    assert quantization.selection_set is not None
    assert parity is not None
    assert "train" in quantization.calibration_set.data
    assert "val" in quantization.selection_set.data
    assert "32 images" in parity.data
    assert parity.data.endswith("test")
    digests = {
        parity.images_sha256,
        quantization.calibration_set.sha256,
        quantization.selection_set.sha256,
    }
    assert len(digests - {None}) == 3
    assert quantization.num_tried == len(facts["tried"])  # type: ignore[arg-type]
    json.dumps(facts, allow_nan=False)
    with Image.open(folder.parent / "frontier.png") as picture:
        assert picture.width > 600


def test_verify_again_looks_at_images_that_chose_nothing(
    quantized: tuple[Path, dict[str, object]],
) -> None:
    folder, _ = quantized
    found = fieldmark.verify(folder, variants=["int8"]).facts["variants"]["int8"]
    assert found["parity"]["data"].endswith("test")
    assert found["notes"] == []
    asked = fieldmark.verify(folder, split="val").facts["variants"]
    assert "chosen by images of this split" in " ".join(asked["int8"]["notes"])
    assert asked["onnx"]["notes"] == []


def test_it_predicts_and_serves(
    quantized: tuple[Path, dict[str, object]], tiny_image_files: list[Path]
) -> None:
    folder, _ = quantized
    images = tiny_image_files[:8]
    int8 = list(fieldmark.predict(folder, images, variant="int8"))
    exact = list(fieldmark.predict(folder, images, variant="onnx"))
    same = sum(
        a.predictions[0].class_name == b.predictions[0].class_name
        for a, b in zip(int8, exact, strict=True)
    )
    assert same >= 7
    assert any(a.predictions != b.predictions for a, b in zip(int8, exact, strict=True))
    assert open_predictor(folder, "int8").num_classes == 4


def test_another_processor_must_come_as_near_as_the_one_it_was_verified_on(
    quantized: tuple[Path, dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = quantized
    package = open_package(folder)
    recorded = package.manifest.variants["int8"].golden
    assert recorded is not None
    predict = open_onnx(package, "int8")
    assert check_golden(package, predict, "int8", recorded).passed
    farther = check_golden(package, lambda images: predict(images) * 1.2, "int8", recorded)
    assert not farther.passed
    # What a processor whose sums overflow might answer: refused before the service is ready.
    monkeypatch.setattr(
        "fieldmark.serving.predictor.open_served", lambda *_, **__: lambda x: predict(x) * 1.2
    )
    with pytest.raises(CheckFailed, match="Golden logits must be within"):
        open_predictor(folder, "int8")


def test_a_near_tie_may_change_and_nothing_else_may(
    quantized: tuple[Path, dict[str, object]],
) -> None:
    package = open_package(quantized[0])
    exact = open_onnx(package, "onnx")

    def checked(shift: float) -> GoldenCheck:
        def predict(images: np.ndarray) -> np.ndarray:
            logits = exact(images).copy()
            order = np.argsort(-logits, axis=1)
            rows = np.arange(len(logits))
            second = order[:, 1]
            gap = logits[rows, order[:, 0]] - logits[rows, second]
            logits[rows, second] += np.where(gap < shift, gap + 1e-3, 0.0).astype(np.float32)
            return logits

        return check_golden(package, predict, "int8")

    assert checked(0.0).num_wrong_answers == 0
    limit = checked(0.0).tolerance
    assert checked(limit * 0.99).num_wrong_answers == 0
    assert checked(1e9).num_wrong_answers > 0


class Session:
    """Stands for onnxruntime's: a run takes so long."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def run(self, _: object, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        time.sleep(self.seconds)
        return [np.zeros((len(feed["images"]), 4), np.float32)]


@pytest.mark.slow
def test_the_speed_is_that_of_the_second_over_the_first() -> None:
    pixels = np.zeros((4, 8, 8, 3), np.uint8)
    slow, fast = Session(0.03), Session(0.003)
    assert speed_ratio(slow, fast, pixels) > 2.0  # type: ignore[arg-type]
    assert speed_ratio(fast, slow, pixels) < 0.5  # type: ignore[arg-type]


def test_calibrating_confidence_keeps_to_images_that_chose_nothing(
    quantized: tuple[Path, dict[str, object]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(quantized[0], tmp_path / "package"))
    # The tiny run makes no mistake on val, so that no temperature can be fitted to it.
    fitted = (open_package(folder), {"confidence": {}, "split": "val"})
    monkeypatch.setattr(
        "fieldmark.evaluation.confidence.calibrate_package", lambda *_, **__: fitted
    )
    facts = fieldmark.calibrate(folder).facts
    assert facts["variants"]["int8"]["parity"]["data"].endswith("test")
    assert facts["variants"]["int8"]["notes"] == []


def test_a_library_that_is_missing_stops_only_its_own_variant(
    quantized: tuple[Path, dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = quantized
    monkeypatch.setattr(
        "fieldmark.evaluation.parity.can_open", lambda kind: kind != "onnx", raising=True
    )
    found = fieldmark.verify(folder)
    assert found.facts["variants"] == {}
    assert not found.passed  # nothing was verified
    asked = fieldmark.verify(folder, variants=["onnx"])  # named, so it is opened, or an error
    assert asked.passed


@pytest.mark.parametrize("method", ["static", "dynamic"])
def test_the_other_methods(tiny_package: Path, tmp_path: Path, method: str) -> None:
    folder = Path(shutil.copytree(tiny_package, tmp_path / "package"))
    result = fieldmark.quantize(folder, method=method, max_drop=100.0)  # type: ignore[arg-type]
    quantization = open_package(folder).manifest.variants["int8"].quantization
    assert quantization is not None
    assert quantization.method == method
    assert quantization.selection_set is None
    assert "variants" in result.facts


def test_a_bound_that_cannot_be_held_leaves_the_package_as_it_was(
    tiny_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(tiny_package, tmp_path / "package"))
    before = open_package(folder).id
    # As on a processor on which int8 gains nothing.
    monkeypatch.setattr("fieldmark.evaluation.int8_run.speed_ratio", lambda *_: 0.5)
    result = fieldmark.quantize(folder)
    assert not result.passed
    assert len(result.facts["tried"]) > 6
    assert open_package(folder).id == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"max_drop": -1}, "--max-drop must be 0 to 100 points. Got -1."),
        ({"calibration": "entropy"}, "--calibration is for --method static. Got --method auto"),
        ({"method": "dynamic", "calib": "digits"}, "calibrates on nothing. Leave out --calib"),
        ({"method": "static", "plot": "x.png"}, "--plot draws what --method auto tried."),
        ({"plot": "/nowhere/x.png"}, "must be a file in a folder that exists"),
        ({"method": "quick"}, "method 'quick' does not exist"),
        ({"calib_images": 0}, "--calib-images must be at least 1. Got 0."),
    ],
)
def test_wrong_settings_are_one_sentence(
    tiny_package: Path, arguments: dict[str, object], sentence: str
) -> None:
    with pytest.raises(FieldmarkError) as caught:
        fieldmark.quantize(tiny_package, **arguments)  # type: ignore[arg-type]
    assert sentence in str(caught.value)


def test_a_package_without_onnx_says_what_to_run(tiny_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_run / "package", tmp_path / "package"))
    manifest = json.loads((folder / "manifest.json").read_text())
    for variant in manifest["variants"].values():
        del manifest["files"][variant["file"]]
    manifest["variants"] = {}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FieldmarkError, match=r"must have the variant 'onnx' .* fieldmark export"):
        fieldmark.quantize(folder)


@pytest.mark.slow
def test_from_the_command_line(tiny_package: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_package, tmp_path / "package"))
    words = ["quantize", str(folder), "--method", "static", "--max-drop", "7", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "fieldmark", *words], capture_output=True, text=True, check=True
    )
    facts = json.loads(done.stdout)
    assert facts["passed"]
    assert set(facts["variants"]) == {"int8"}
    assert "times smaller" in done.stderr

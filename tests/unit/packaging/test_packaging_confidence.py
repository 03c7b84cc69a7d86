"""The temperature in a package: recorded atomically, and every variant measured with it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from packaging_data import Made, draw_pixels, edit_manifest, put_file

from fieldmark.errors import PackageError
from fieldmark.evaluation.confidence import fit_confidence
from fieldmark.measure import Predict, softmax
from fieldmark.packaging.entries import Confidence
from fieldmark.packaging.load import open_onnx
from fieldmark.packaging.manifest import WEIGHTS, Package, open_package
from fieldmark.packaging.verify import VerifyResult, verify_variant
from fieldmark.packaging.write import record_confidence

OLD_PACKAGE = Path(__file__).parents[2] / "fixtures" / "package-v1"
TRUE_TEMPERATURE = 2.0

Images = tuple[np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def images(made: Made) -> Images:
    """700 images, and labels drawn from what the model would say at temperature 2."""
    pixels = draw_pixels(700)
    cumulative = softmax(made.eager(pixels), TRUE_TEMPERATURE).cumsum(axis=1)
    labels = (cumulative < np.random.default_rng(0).random((700, 1))).sum(axis=1)
    return pixels, labels.clip(0, 4)


@pytest.fixture(scope="module")
def confidence(made: Made, images: Images) -> Confidence:
    pixels, labels = images
    return fit_confidence(made.eager(pixels), labels, data="noise", fingerprint="f" * 64)


def record(package: Package, confidence: Confidence) -> Package:
    weights = package.manifest.files[WEIGHTS].sha256
    return record_confidence(package.path, confidence, weights_sha256=weights)


def test_the_fit_finds_the_temperature_and_mends_the_error(confidence: Confidence) -> None:
    assert confidence.low < TRUE_TEMPERATURE < confidence.high
    assert confidence.after.ece.value < confidence.before.ece.low
    assert confidence.nll_change.high < 0
    assert sum(one.count for one in confidence.before.bins) == confidence.num_images == 700


def test_it_is_recorded_and_nothing_else_changes(package: Package, confidence: Confidence) -> None:
    assert package.temperature == 1.0
    changed = record(package, confidence)
    assert changed.id != package.id
    assert changed.temperature == confidence.temperature
    assert open_package(package.path).manifest.confidence == confidence
    before, after = package.manifest, changed.manifest
    assert before.model_dump(exclude={"confidence"}) == after.model_dump(exclude={"confidence"})
    changed.check_files()


def test_a_temperature_of_other_weights_is_refused(
    package: Package, confidence: Confidence
) -> None:
    weights = package.manifest.files[WEIGHTS].sha256
    put_file(package.path, WEIGHTS, b"others")
    before = (package.path / "manifest.json").read_bytes()
    with pytest.raises(PackageError, match="must keep its weights"):
        record_confidence(package.path, confidence, weights_sha256=weights)
    assert (package.path / "manifest.json").read_bytes() == before


def test_a_package_of_before_has_temperature_1(
    tmp_path: Path, package: Package, confidence: Confidence
) -> None:
    shutil.copytree(OLD_PACKAGE, tmp_path / "old")
    old = open_package(tmp_path / "old")
    assert "confidence" not in json.loads((old.path / "manifest.json").read_text())
    assert (old.temperature, old.manifest.confidence) == (1.0, None)
    assert record(old, confidence).temperature == confidence.temperature


def test_an_impossible_temperature_is_refused(package: Package, confidence: Confidence) -> None:
    edit_manifest(package.path, confidence=confidence.model_dump() | {"temperature": 0.0})
    with pytest.raises(PackageError, match=r"confidence.temperature"):
        open_package(package.path)


def check(package: Package, made: Made, variant: Predict, images: Images, n: int) -> VerifyResult:
    batches = [(images[0][:n], images[1][:n])]
    return verify_variant(package, "onnx", variant, made.eager, batches, "noise")


def test_a_variant_is_measured_at_the_temperature(
    package: Package, made: Made, images: Images, confidence: Confidence
) -> None:
    parity = check(record(package, confidence), made, open_onnx(package), images, 700).parity
    assert parity is not None
    assert parity.temperature == confidence.temperature
    assert parity.reference_ece == confidence.after.ece
    assert parity.reference_nll == confidence.after.nll
    assert parity.ece is not None
    assert parity.nll is not None
    assert parity.ece.value == pytest.approx(confidence.after.ece.value, abs=1e-4)
    assert parity.nll.value == pytest.approx(confidence.after.nll.value, abs=1e-4)
    assert parity.accuracy is not None
    assert parity.reference_accuracy is not None
    drop = parity.reference_accuracy.value - parity.accuracy.value
    assert drop == pytest.approx(parity.accuracy_drop.value)


def sharper(made: Made) -> Predict:
    """Every answer as before, and all of them surer."""
    return lambda pixels: 4 * made.eager(pixels)


def test_a_variant_that_is_surer_than_the_model_is_caught(
    package: Package, made: Made, images: Images, confidence: Confidence
) -> None:
    result = check(record(package, confidence), made, sharper(made), images, 700)
    assert result.parity is not None
    assert result.parity.top1_agreement.value == 1.0
    [problem] = result.parity.problems("float32")
    assert "Calibration error must not exceed" in problem
    assert problem in result.problems()
    assert not result.deployable


@pytest.mark.parametrize(("n", "calibrated"), [(499, True), (700, False)])
def test_with_few_images_or_without_a_temperature_nothing_is_promised(
    package: Package,
    made: Made,
    images: Images,
    confidence: Confidence,
    n: int,
    calibrated: bool,
) -> None:
    package = record(package, confidence) if calibrated else package
    parity = check(package, made, sharper(made), images, n).parity
    assert parity is not None
    assert parity.problems("float32") == []
    assert parity.ece_increase is not None
    assert parity.ece_increase.low > 0.02
    assert (parity.temperature is None) is not calibrated


def test_logits_that_are_not_finite_have_no_calibration(
    package: Package, made: Made, images: Images
) -> None:
    parity = check(package, made, lambda pixels: made.eager(pixels) * np.nan, images, 50).parity
    assert parity is not None
    assert (parity.ece, parity.nll, parity.ece_increase) == (None, None, None)


def test_an_earlier_measurement_at_another_temperature_is_said_to_be_one(
    package: Package, made: Made, images: Images, confidence: Confidence
) -> None:
    check(package, made, open_onnx(package), images, 100)
    changed = record(package, confidence)
    notes = verify_variant(changed, "onnx", open_onnx(package)).notes()
    assert "measured at temperature 1.000" in notes[-1]

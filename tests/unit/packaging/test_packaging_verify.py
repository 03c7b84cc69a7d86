"""Verification: it measures, it records, and it catches what goes wrong between two formats."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from packaging_data import CLASS_NAMES, SPEC, Made, edit_manifest

from fieldmark.errors import IntegrityError, PackageError, UnknownName
from fieldmark.packaging.export import FORMATS
from fieldmark.packaging.load import open_onnx
from fieldmark.packaging.manifest import Package, open_package
from fieldmark.packaging.variants import open_variant
from fieldmark.packaging.verify import verify_variant
from fieldmark.packaging.write import add_variant
from fieldmark.runtime.cpu import instruction_set

Batches = list[tuple[np.ndarray, np.ndarray]]


@pytest.mark.parametrize("kind", FORMATS)
def test_a_sound_export_passes_and_becomes_deployable(
    package: Package, made: Made, batches: Batches, kind: str
) -> None:
    assert not package.manifest.variants[kind].deployable
    result = verify_variant(
        package, kind, open_variant(package, kind), made.eager, batches, "noise"
    )
    assert result.passed
    assert result.deployable
    assert result.problems() == result.notes() == []
    parity = open_package(package.path).manifest.variants[kind].parity
    assert parity is not None
    assert parity == result.parity
    assert parity.top1_agreement.n == 60
    assert parity.top1_agreement.value == 1.0
    assert parity.top1_agreement.low < 0.95  # 60 images do not prove more
    assert parity.max_abs_delta_logit is not None
    assert parity.max_abs_delta_logit < 1e-4
    if kind != "pt2":  # which runs the very kernels of the eager model
        assert parity.max_abs_delta_logit > 0
    assert parity.accuracy_drop.value == 0
    assert parity.accuracy_drop.low < 0 < parity.accuracy_drop.high
    assert (parity.data, parity.instruction_set) == ("noise", instruction_set())
    assert result.package.manifest.variants[kind].deployable


def test_result_as_json_has_rates_with_their_interval(
    package: Package, made: Made, batches: Batches
) -> None:
    result = verify_variant(package, "onnx", open_onnx(package), made.eager, batches, "noise")
    content = json.loads(json.dumps(result.to_json(), allow_nan=False))
    for rate in ("top1_agreement", "accuracy_drop"):
        assert set(content["parity"][rate]) == {"value", "low", "high", "n"}
    assert content["passed"] is content["deployable"] is content["parity_measured"] is True
    assert content["package_id"] == open_package(package.path).id
    assert content["bytes"] == len(made.onnx)
    assert content["golden"]["passed"] is True


def test_without_images_parity_is_said_not_to_be_measured(package: Package, made: Made) -> None:
    result = verify_variant(package, "onnx", open_onnx(package))
    assert result.passed  # what ran, passed
    assert not result.deployable
    assert result.parity is None
    assert result.to_json()["parity_measured"] is False
    assert "was not measured" in result.notes()[0]


@pytest.mark.parametrize("images", [None, [], [(np.zeros((0, 32, 32, 3), np.uint8), np.zeros(0))]])
def test_without_images_the_earlier_parity_is_kept(
    package: Package, made: Made, batches: Batches, images: Any
) -> None:
    first = verify_variant(package, "onnx", open_onnx(package), made.eager, batches, "noise")
    again = verify_variant(first.package, "onnx", open_onnx(package), made.eager, images)
    assert again.passed
    assert again.deployable
    assert again.parity is None
    assert again.earlier_parity == first.parity
    assert again.package.manifest.variants["onnx"].parity == first.parity
    assert "not measured again" in again.notes()[0]
    assert "60 images (noise)" in again.notes()[0]


def test_a_failing_golden_check_takes_deployable_away(
    package: Package, made: Made, batches: Batches
) -> None:
    first = verify_variant(package, "onnx", open_onnx(package), made.eager, batches, "noise")
    assert first.deployable
    again = verify_variant(first.package, "onnx", lambda images: made.eager(images) + 1)
    assert not again.passed
    assert not again.deployable
    assert not open_package(package.path).manifest.variants["onnx"].deployable


def _fails(
    package: Package, made: Made, batches: Batches, variant: Any, reference: Any = None
) -> list[str]:
    result = verify_variant(package, "onnx", variant, reference or made.eager, batches, "noise")
    assert not result.passed
    assert not result.deployable
    assert not open_package(package.path).manifest.variants["onnx"].deployable
    assert result.to_json()["problems"] == result.problems()
    return result.problems()


def test_swapped_channels_are_caught_by_both(
    package: Package, made: Made, batches: Batches
) -> None:
    onnx_predict = open_onnx(package)
    problems = _fails(package, made, batches, lambda images: onnx_predict(images[..., ::-1]))
    assert "Golden logits" in problems[0]
    assert "Top-1 agreement" in problems[-1]


def test_labels_shifted_by_one_are_caught_by_both(
    package: Package, made: Made, batches: Batches
) -> None:
    onnx_predict = open_onnx(package)
    problems = _fails(
        package, made, batches, lambda images: np.roll(onnx_predict(images), 1, axis=1)
    )
    assert "6 of 6 wrong" in " ".join(problems)
    assert "Got 0.00% on 60 images" in problems[-1]


def test_a_shifted_class_list_is_caught(folder: Path, made: Made, batches: Batches) -> None:
    shifted = [{"name": name} for name in (CLASS_NAMES[-1], *CLASS_NAMES[:-1])]
    edit_manifest(folder, classes=shifted)
    package = open_package(folder)
    # Both models share the mistake, so only the recorded answers can tell.
    problems = _fails(package, made, batches, open_onnx(package))
    assert problems == ["Golden samples must be given the recorded classes. Got 6 of 6 wrong."]


def test_a_wider_crop_is_caught(folder: Path, made: Made, batches: Batches) -> None:
    edit_manifest(folder, preprocess=SPEC.model_dump(mode="json") | {"crop_frac": 1.0})
    package = open_package(folder)
    problems = _fails(package, made, batches, open_onnx(package))
    assert len(problems) == 1
    assert "must decode to the recorded pixels" in problems[0]


def test_one_altered_weight_byte_is_caught_by_the_checksum_and_without_it(
    folder: Path, package: Package, made: Made, batches: Batches
) -> None:
    model = onnx.load_from_string(made.onnx)
    head = made.module.network.get_classifier().weight.detach().numpy()
    stored = next(
        t for t in model.graph.initializer if set(t.dims) == set(head.shape) and t.raw_data
    )
    raw = bytearray(stored.raw_data)
    raw[int(np.abs(numpy_helper.to_array(stored)).argmax()) * 4 + 3] ^= 0x80  # a weight's sign
    stored.raw_data = bytes(raw)
    altered = model.SerializeToString()
    assert len(altered) == len(made.onnx)
    assert sum(a != b for a, b in zip(altered, made.onnx, strict=True)) == 1

    file = package.manifest.variants["onnx"].file
    (folder / file).write_bytes(altered)
    with pytest.raises(IntegrityError, match="It was altered"):
        open_onnx(package)
    changed = add_variant(folder, "onnx", altered, kind="onnx", opset=20)  # with its checksum
    problems = _fails(changed, made, batches, open_onnx(changed))
    assert "Golden logits" in problems[0]


def test_a_truncated_file_is_caught(folder: Path, package: Package) -> None:
    path = folder / package.manifest.variants["onnx"].file
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(IntegrityError, match="truncated"):
        open_onnx(package)
    with pytest.raises(IntegrityError, match="truncated"):
        package.check_files()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_caught_and_recorded(
    package: Package, made: Made, batches: Batches, bad: float
) -> None:
    def broken(images: np.ndarray) -> np.ndarray:
        logits = made.eager(images).copy()
        if len(images) == 25:  # golden samples are fewer
            logits[3] = bad
        return logits

    problems = _fails(package, made, batches, broken)
    assert len(problems) == 1
    assert "Top-1 agreement" in problems[0]
    parity = open_package(package.path).manifest.variants["onnx"].parity
    assert parity is not None
    assert parity.max_abs_delta_logit is None
    assert parity.top1_agreement.value == pytest.approx(58 / 60)


def test_every_image_counts_once_the_last_batch_too(
    package: Package, made: Made, batches: Batches
) -> None:
    def wrong_in_the_last_batch(images: np.ndarray) -> np.ndarray:
        logits = made.eager(images)
        return np.roll(logits, 1, axis=1) if len(images) == 10 else logits

    result = verify_variant(
        package, "onnx", wrong_in_the_last_batch, made.eager, iter(batches), "noise"
    )
    assert result.parity is not None
    assert result.parity.top1_agreement.value == pytest.approx(50 / 60)
    hits = sum(int((made.eager(x).argmax(1) == y).sum()) for x, y in batches)
    found = sum(int((wrong_in_the_last_batch(x).argmax(1) == y).sum()) for x, y in batches)
    assert result.parity.accuracy_drop.value == pytest.approx((hits - found) / 60)


def test_what_the_caller_must_give(package: Package, made: Made, batches: Batches) -> None:
    with pytest.raises(ValueError, match="reference must be given"):
        verify_variant(package, "onnx", made.eager, None, batches)
    with pytest.raises(UnknownName, match="Did you mean 'onnx'"):
        verify_variant(package, "onxx", made.eager)


def test_a_variant_exported_meanwhile_keeps_its_own_measurements(
    package: Package, made: Made, batches: Batches
) -> None:
    def export_in_between() -> Any:
        yield batches[0]
        add_variant(package.path, "onnx", b"another", kind="onnx")

    with pytest.raises(PackageError, match="changed meanwhile"):
        verify_variant(package, "onnx", made.eager, made.eager, export_in_between(), "noise")
    assert open_package(package.path).manifest.variants["onnx"].golden is None

"""The model card says what the manifest says, whatever people call their classes."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging_data import Made, edit_manifest, write_falcons

from fieldmark.packaging.card import MAX_CLASSES, is_generated, write_card
from fieldmark.packaging.entries import CalibrationEntry, Confidence, Measured
from fieldmark.packaging.manifest import Package, open_package

NASTY = 'a|b`c`"\n# heading\x85\x7f[x](http://y) <b>: - é 🦅\u2028'
RATE = {"value": 0.9512, "low": 0.9, "high": 0.98, "n": 200}


def head(card: bytes) -> dict[str, Any]:
    text = card.decode()
    assert text.startswith("---\n")
    found = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))
    assert isinstance(found, dict)
    return found


def card_of(package: Package) -> bytes:
    return write_card(package.manifest, package.id, "hf:me/falcons")


def test_the_head_is_what_hubs_read(package: Package) -> None:
    found = head(card_of(package))
    assert found["license"] == "apache-2.0"
    assert found["library_name"] == "fieldmark"
    assert found["pipeline_tag"] == "image-classification"
    assert {"image-classification", "onnx", "torchscript"} <= set(found["tags"])
    assert found["metrics"] == ["accuracy"]


def test_accuracy_comes_with_its_interval_and_data(folder: Path) -> None:
    metrics = {"test": {"top1_accuracy": RATE, "data": "folder:x|y"}, "note": "by hand", "bad": {}}
    edit_manifest(folder, metrics=metrics)
    text = card_of(open_package(folder)).decode()
    assert "| test | 95.12% (90.00% to 98.00%) | 200 | folder:x\\|y |" in text
    metrics["test"]["top5_accuracy"] = RATE | {"value": 1.0}
    edit_manifest(folder, metrics=metrics)
    assert "| 95.12% (90.00% to 98.00%) | 100.00% (90.00%" in card_of(open_package(folder)).decode()


def test_a_card_without_measurements_says_so(package: Package) -> None:
    text = card_of(package).decode()
    assert "## Accuracy\n\nNot measured." in text
    assert "| onnx | float32 |" in text
    assert "not measured | not measured |  | no |" in text
    assert f"--expect {package.id}" in text
    assert "fieldmark pull hf:me/falcons --out falcons" in text
    assert "kestrel, merlin" in text


def test_names_that_people_type_are_shown_and_do_nothing(
    folder: Path, made: Made, tmp_path: Path
) -> None:
    names = (NASTY, "b", "c", "- d", "---")
    package = write_falcons(
        tmp_path / "nasty", made.module, None, class_names=names, license=NASTY, name=NASTY
    )
    card = card_of(package)
    found = head(card)
    assert found["license"] == "other"
    assert found["license_name"] == "a-b-c-heading-x-http-y-b"
    lines = card.decode().splitlines()
    assert lines.count("---") == 2
    assert sum(line.startswith("# ") for line in lines) == 1
    escaped = 'a\\|b\\`c\\`" \\# heading \\[x\\](http://y) \\<b\\>: - é 🦅'
    assert f"# {escaped}" in lines
    assert any(line.startswith(f"In the order of the outputs: {escaped}, b") for line in lines)


def test_many_classes_are_counted_rather_than_listed(package: Package) -> None:
    entry = package.manifest.classes[0]
    classes = tuple(entry.model_copy(update={"name": f"c{i}"}) for i in range(MAX_CLASSES + 7))
    manifest = package.manifest.model_copy(update={"classes": classes})
    text = write_card(manifest, "0" * 64, "SOURCE").decode()
    assert f"c{MAX_CLASSES - 1} and 7 more" in text
    assert f"c{MAX_CLASSES}," not in text


def test_calibrated_confidence_is_told_where_there_is_one(package: Package) -> None:
    assert "## Confidence" not in card_of(package).decode()
    measured = Measured(value=0.1234567, low=0.1, high=0.2, n=200)
    entry = CalibrationEntry(nll=measured, ece=measured, bins=())
    confidence = Confidence(
        temperature=1.234567,
        low=1.1,
        high=1.4,
        data="200 images of birds, val",
        num_images=200,
        fingerprint="f",
        before=entry,
        after=entry,
        nll_change=measured,
    )
    manifest = package.manifest.model_copy(update={"confidence": confidence})
    text = write_card(manifest, "0" * 64, "SOURCE").decode()
    assert "divided by 1.235, fitted on 200 images of birds, val" in text
    assert "0.1235 (0.1000 to 0.2000)" in text


@pytest.mark.parametrize("edit", ["", "front", "end"])
def test_a_card_that_was_edited_is_told_from_one_that_was_not(package: Package, edit: str) -> None:
    card = card_of(package)
    if edit == "front":
        card = card.replace(b"# falcons", b"# Falcons of Kent")
    if edit == "end":
        card += b"More.\n"
    assert is_generated(card) is (not edit)
    assert not is_generated(b"# mine\n")
    assert not is_generated(b"\xff\xfe")

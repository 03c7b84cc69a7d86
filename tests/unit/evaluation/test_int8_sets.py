"""The three sets of a quantization have no image in common, and say what they are."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fieldmark.errors import DataError, PackageError
from fieldmark.evaluation.int8_sets import Int8Sets, LoadedSet, choose_sets
from fieldmark.packaging.manifest import open_package

COLUMNS = {"image_column": "", "label_column": ""}


def sets(folder: Path, **changes: object) -> Int8Sets:
    asked: dict[str, object] = {
        "data": "",
        "split": "auto",
        "calib": "",
        "columns": COLUMNS,
        "num_images": 10,
        "seed": 0,
    }
    return choose_sets(open_package(folder), **(asked | changes))  # type: ignore[arg-type]


def images_of(loaded: LoadedSet) -> set[bytes]:
    return {image.tobytes() for image in loaded.pixels}


def others(tiny_images: Path, folder: Path, count: int) -> str:
    """A source with images of two classes that the model does not know."""
    for number, file in enumerate(sorted((tiny_images / "train").rglob("*.png"))[:count]):
        target = folder / f"other-{number % 2}"
        target.mkdir(exist_ok=True)
        (target / f"{number}.png").write_bytes(file.read_bytes())
    return f"folder:{folder}"


def test_training_images_calibrate_val_selects_and_test_reports(tiny_package: Path) -> None:
    found = sets(tiny_package)
    assert (found.report_data, found.report_split) == ("", "test")
    assert found.calibration.entry.data.endswith(", train")
    assert found.selection.entry.data.endswith(", val")
    assert len(found.calibration.pixels) == found.calibration.entry.num_images == 10
    assert len(found.selection.pixels) == 16  # a quarter of 64
    assert not images_of(found.calibration) & images_of(found.selection)


def test_without_val_the_rest_of_the_training_images_selects(tiny_package: Path) -> None:
    found = sets(tiny_package, split="val")
    assert found.selection.entry.data.endswith(", train (the rest)")
    assert len(found.selection.pixels) == 48 - 10
    assert not images_of(found.calibration) & images_of(found.selection)


def test_the_choice_is_seeded(tiny_package: Path) -> None:
    first, again = sets(tiny_package), sets(tiny_package)
    other = sets(tiny_package, seed=1)
    assert np.array_equal(first.calibration.pixels, again.calibration.pixels)
    assert first.calibration.entry.sha256 == again.calibration.entry.sha256
    assert first.calibration.entry.sha256 != other.calibration.entry.sha256


def test_half_of_the_images_is_the_most_that_calibrate(tiny_package: Path) -> None:
    assert len(sets(tiny_package, num_images=1000).calibration.pixels) == 24


def test_images_with_other_classes_calibrate_without_labels(
    tiny_package: Path, tiny_images: Path, tmp_path: Path
) -> None:
    found = sets(tiny_package, calib=others(tiny_images, tmp_path, 40))
    assert found.selection.labels is None
    assert len(found.calibration.pixels) + len(found.selection.pixels) == 40


def test_calibrating_on_the_report_is_refused(tiny_package: Path) -> None:
    with pytest.raises(DataError, match=r"must not be those of the report\. Got train and train"):
        sets(tiny_package, split="train")


def test_too_few_images_are_refused(tiny_package: Path, tiny_images: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must have at least 16 images"):
        sets(tiny_package, calib=others(tiny_images, tmp_path, 6))


def test_a_package_without_images_asks_for_them(tiny_package: Path) -> None:
    package = open_package(tiny_package)
    foreign = replace(package, manifest=package.manifest.model_copy(update={"training": None}))
    with pytest.raises(PackageError, match="records no images to quantize with"):
        choose_sets(foreign, data="", split="auto", calib="", columns=COLUMNS, num_images=9, seed=0)

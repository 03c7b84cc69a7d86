"""A package of format 1, committed once, must open for ever."""

from pathlib import Path

import fieldmark
from fieldmark.packaging.golden import check_golden
from fieldmark.packaging.load import open_onnx
from fieldmark.packaging.manifest import open_package

PACKAGE = Path(__file__).parents[1] / "fixtures" / "package-v1"


def test_it_opens_and_repeats_its_golden_samples() -> None:
    package = open_package(PACKAGE)
    package.check_files()
    assert package.manifest.format_version == 1
    check = check_golden(package, open_onnx(package))
    assert check.passed, check.problems()


def test_it_predicts() -> None:
    (answer,) = fieldmark.predict(str(PACKAGE), [PACKAGE / "golden" / "000.png"], top_k=1)
    assert answer.error is None
    assert answer.predictions[0].class_name in open_package(PACKAGE).class_names

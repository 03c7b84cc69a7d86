"""Every backend is the same kind of thing: one check for all of them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fieldmark.evaluation.backends import open_backend
from fieldmark.measure import Predict
from fieldmark.packaging.golden import read_golden
from fieldmark.packaging.manifest import open_package
from fieldmark.packaging.resolve import resolve_model
from fieldmark.pipeline import export

Open = Callable[[str], Predict]


@pytest.fixture(scope="module")
def package(tiny_package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import shutil

    copy = tmp_path_factory.mktemp("backends") / "package"
    shutil.copytree(tiny_package, copy)
    for to in ("torchscript", "pt2", "openvino"):
        export(str(copy), to)
    return copy


@pytest.mark.parametrize("variant", ["torch", "onnx", "torchscript", "pt2", "openvino"])
def test_a_backend_keeps_the_contract(package: Path, variant: str) -> None:
    predict = open_backend(resolve_model(str(package)), variant)
    golden = read_golden(open_package(package))
    check_predict(predict, golden.pixels, golden.logits)


def check_predict(predict: Predict, pixels: np.ndarray, expected: np.ndarray) -> None:
    """Golden tolerance, float32, batch invariance, and nothing written into the input."""
    before = pixels.copy()
    logits = predict(pixels)
    assert logits.dtype == np.float32
    assert logits.shape == expected.shape
    assert np.abs(logits - expected).max() < 1e-3
    assert (pixels == before).all()
    for size in (1, 2, 5):
        alone = np.concatenate([predict(pixels[i : i + size]) for i in range(0, len(pixels), size)])
        assert np.abs(alone - logits).max() < 1e-4
    reversed_logits = predict(np.ascontiguousarray(pixels[::-1]))
    assert np.abs(reversed_logits[::-1] - logits).max() < 1e-4
    read_only = pixels.copy()
    read_only.setflags(write=False)
    assert np.abs(predict(read_only) - logits).max() < 1e-4

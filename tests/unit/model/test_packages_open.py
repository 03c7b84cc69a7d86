"""Packages opened by plain timm: the same logits where timm can build the network, no other way."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fieldmark.model import (
    Architecture,
    InferenceModule,
    adapt_architecture,
    build,
    eager_predict,
    opens_in,
)
from fieldmark.packaging.golden import make_golden, read_golden, synthetic_images
from fieldmark.packaging.manifest import open_package
from fieldmark.packaging.write import write_package
from fieldmark.preprocess import Preprocess

SPEC = Preprocess(height_px=32, width_px=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))

OPEN = """
import sys, numpy as np, timm, torch
if sys.argv[3] == "with-fieldmark":
    import fieldmark.model
network = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
pixels = np.load(sys.argv[2])
x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
mean, std = (torch.tensor(network.pretrained_cfg[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
with torch.no_grad():
    np.save(sys.argv[2], network((x - mean) / std).numpy())
"""


def open_elsewhere(package: Path, pixels: np.ndarray, how: str) -> "np.ndarray | str":
    file = package / f"{how}.npy"
    np.save(file, pixels)
    done = subprocess.run(
        [sys.executable, "-c", OPEN, str(package), str(file), how],
        capture_output=True,
        text=True,
        check=False,
    )
    return np.load(file) if done.returncode == 0 else done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "args"),
    [
        ("test_resnet", {}),
        ("test_efficientnet", {}),
        ("test_vit", {}),
        ("test_convnext", {}),
        ("airnet", {"widths": [8, 8, 16]}),
    ],
)
def test_an_adapted_package_never_opens_under_a_stock_name_with_other_logits(
    tmp_path: Path, arch: str, args: dict[str, object]
) -> None:
    torch.manual_seed(0)
    architecture, _ = adapt_architecture(Architecture(arch, 6, args), 32, "auto")
    network = build(architecture)
    predict = eager_predict(InferenceModule(network, SPEC.mean, SPEC.std))
    names = [f"class {k}" for k in range(6)]
    write_package(
        tmp_path / "package",
        network=network,
        architecture=architecture,
        class_names=names,
        preprocess=SPEC,
        golden=make_golden(synthetic_images(4, seed=0), SPEC, predict, names),
        golden_kind="synthetic",
        name=arch,
    )
    package = open_package(tmp_path / "package")
    golden = read_golden(package)
    plain = open_elsewhere(package.path, golden.pixels, "plain")
    if opens_in(architecture.name) == "timm":
        assert package.manifest.architecture.opens_in == "timm"
        assert isinstance(plain, np.ndarray), plain
        assert np.abs(plain - golden.logits).max() < 1e-4
        return
    assert package.manifest.architecture.opens_in == "fieldmark"
    assert isinstance(plain, str)
    assert "Unknown model" in plain
    ours = open_elsewhere(package.path, golden.pixels, "with-fieldmark")
    assert isinstance(ours, np.ndarray), ours
    assert np.abs(ours - golden.logits).max() < 1e-4

"""A small network, its package, and ways to damage one."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray

from fieldmark.measure import Predict
from fieldmark.model import Architecture, InferenceModule
from fieldmark.packaging.entries import VariantKind
from fieldmark.packaging.export import Exported
from fieldmark.packaging.golden import GoldenSamples
from fieldmark.packaging.manifest import Package
from fieldmark.packaging.write import add_variant, write_package
from fieldmark.preprocess import Preprocess
from fieldmark.runtime.files import sha256_bytes

SIDE_PX = 32
CLASS_NAMES = ("kestrel", "merlin", "hobby", "peregrine", "osprey")
SPEC = Preprocess(
    height_px=SIDE_PX,
    width_px=SIDE_PX,
    crop_frac=0.875,
    interpolation="bicubic",
    mean=(0.49, 0.48, 0.44),
    std=(0.25, 0.24, 0.26),
)


def make_network(name: str = "test_resnet", **args: Any) -> torch.nn.Module:
    """A network whose answers differ from image to image, although it is not trained."""
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=len(CLASS_NAMES), **args).eval()
    with torch.no_grad():
        network.get_classifier().weight.mul_(30.0)
    return network


def draw_pixels(count: int = 60) -> NDArray[np.uint8]:
    """Blocks of colour of any strength: as different from each other as real images are."""
    rng = np.random.default_rng(1)
    colour = rng.uniform(0, 255, size=(count, 1, 1, 3))
    contrast = rng.uniform(0, 120, size=(count, 1, 1, 1))
    blocks = rng.normal(size=(count, 8, 8, 3)).repeat(4, axis=1).repeat(4, axis=2)
    return np.clip(colour + contrast * blocks, 0, 255).astype(np.uint8)


def balance(module: InferenceModule) -> None:
    """Shift the head's bias so that the drawn images are not all given one class."""
    with torch.no_grad():
        mean = module(torch.from_numpy(draw_pixels())).mean(dim=0)
        module.network.get_classifier().bias.sub_(mean)


@dataclass(frozen=True)
class Made:
    """The parts a package was made of."""

    module: InferenceModule
    eager: Predict
    golden: GoldenSamples
    exported: dict[VariantKind, Exported]
    folder: Path

    @property
    def onnx(self) -> bytes:
        """The ONNX file."""
        return self.exported["onnx"].data


def add_export(folder: Path, name: str, exported: Exported) -> Package:
    """Add what an exporter gave, as the pipeline does."""
    return add_variant(
        folder,
        name,
        exported.data,
        kind=name,  # type: ignore[arg-type]
        opset=exported.opset,
        weights=exported.weights,
        features=exported.features,
        graph=exported.graph,
        written_by=exported.written_by,
    )


def write_falcons(
    folder: Path, module: InferenceModule, golden: GoldenSamples | None, **more: Any
) -> Package:
    """Write a package of the class names and preprocessing above; `more` changes its parts."""
    values: dict[str, Any] = {
        "network": module.network,
        "architecture": Architecture("test_resnet", len(CLASS_NAMES)),
        "class_names": CLASS_NAMES,
        "preprocess": SPEC,
        "golden": golden,
        "golden_kind": "synthetic",
        "name": "falcons",
    }
    return write_package(folder, **(values | more))


def edit_manifest(folder: Path, **changes: Any) -> None:
    """Change top-level keys of the manifest behind the package's back."""
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def put_file(folder: Path, relative: str, data: bytes) -> None:
    """Replace a file and its checksum, as one would who forges a package."""
    (folder / relative).write_bytes(data)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    files[relative] = {"sha256": sha256_bytes(data), "bytes": len(data)}
    edit_manifest(folder, files=files)

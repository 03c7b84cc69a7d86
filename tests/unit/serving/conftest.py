"""A tiny real package, made without torch: an ONNX model whose logits are three mean colours."""

import io

import numpy as np
import pytest
from onnx import TensorProto, helper
from PIL import Image

from fieldmark.packaging.entries import (
    ArchitectureEntry,
    ClassEntry,
    FileEntry,
    GoldenEntry,
    TensorEntry,
    Variant,
)
from fieldmark.packaging.golden import make_golden, synthetic_images
from fieldmark.packaging.load import open_session
from fieldmark.packaging.manifest import MANIFEST, TIMM_CONFIG, WEIGHTS, Manifest
from fieldmark.preprocess import Preprocess
from fieldmark.runtime.files import sha256_bytes
from fieldmark.serving.predictor import Predictor

NAMES = ("red", "green", "blue")
SPEC = Preprocess(height_px=16, width_px=16, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def mean_colours(pixels):
    """The fake model: logits are the mean of each channel, 0 to 25.5."""
    return pixels.mean(axis=(1, 2), dtype=np.float32) / np.float32(10)


def onnx_model():
    """The same as a graph."""
    nodes = [
        helper.make_node("Cast", ["images"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["floats"], ["means"], axes=[1, 2], keepdims=0),
        helper.make_node("Div", ["means", "ten"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "colours",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, ["batch", 16, 16, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 3])],
        [helper.make_tensor("ten", TensorProto.FLOAT, [], [10.0])],
    )
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()


def write_package(folder, change=lambda samples: samples, with_golden=True):
    """Write the package; `change` may alter the golden samples before they are written."""
    model = onnx_model()
    session = open_session(model, "model", 1)
    files = {WEIGHTS: b"weights", TIMM_CONFIG: b"{}", "variants/onnx.onnx": model}
    if with_golden:
        golden = make_golden(
            synthetic_images(4, seed=0),
            SPEC,
            lambda pixels: session.run(["logits"], {"images": pixels})[0],
            NAMES,
        )
        files |= change(golden).files()
    manifest = Manifest(
        format_version=1,
        created="2025-01-01T00:00:00+00:00",
        fieldmark_version="0.1.0",
        name="colours",
        architecture=ArchitectureEntry(name="colours", num_classes=3, opens_in="fieldmark"),
        classes=tuple(
            ClassEntry(name=name, description=f"mostly {name}" if name != "blue" else "")
            for name in NAMES
        ),
        preprocess=SPEC,
        golden=GoldenEntry(kind="synthetic", count=4)
        if with_golden
        else GoldenEntry(kind="none", count=0),
        variants={
            "onnx": Variant(
                kind="onnx",
                precision="float32",
                file="variants/onnx.onnx",
                opset=17,
                inputs=(TensorEntry(name="images", dtype="uint8", shape=("batch", 16, 16, 3)),),
                outputs=(TensorEntry(name="logits", dtype="float32", shape=("batch", 3)),),
            )
        },
        files={
            name: FileEntry(sha256=sha256_bytes(data), bytes=len(data))
            for name, data in files.items()
        },
    )
    for name, data in (files | {MANIFEST: manifest.model_dump_json().encode()}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


@pytest.fixture(scope="session")
def tiny_package(tmp_path_factory):
    return write_package(tmp_path_factory.mktemp("package"))


@pytest.fixture
def write_tiny_package(tmp_path):
    """Write an altered one: see `write_package`."""
    return lambda **changes: write_package(tmp_path / "altered", **changes)


@pytest.fixture
def make_predictor():
    """A predictor around `mean_colours`, or another model."""

    def make(predict=mean_colours, descriptions=("mostly red", "mostly green", ""), spec=SPEC):
        return Predictor(predict, spec, NAMES, descriptions, "f" * 64)

    return make


@pytest.fixture
def encode():
    """Encode an image, or a colour as a 24 x 20 image."""

    def encode(image, format="PNG", **options):
        if isinstance(image, str):
            image = Image.new("RGB", (24, 20), image)
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        return buffer.getvalue()

    return encode

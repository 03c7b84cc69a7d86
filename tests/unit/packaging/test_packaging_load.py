"""Opening exported models: what a Predict promises, and which files are never opened."""

import dataclasses
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from packaging_data import SIDE_PX, Made, add_export, draw_pixels, edit_manifest

from fieldmark.errors import IntegrityError, MissingDependency, PackageError, UnknownName
from fieldmark.measure import Predict
from fieldmark.packaging.entries import VariantKind
from fieldmark.packaging.export import export_openvino
from fieldmark.packaging.load import open_onnx, open_session
from fieldmark.packaging.manifest import Package, open_package
from fieldmark.packaging.openvino_load import open_openvino
from fieldmark.packaging.served import open_served
from fieldmark.packaging.torch_load import open_pt2, open_torchscript
from fieldmark.packaging.variants import open_variant
from fieldmark.packaging.write import add_variant

KINDS = ["onnx", "torchscript", "pt2", "openvino"]
OPENERS: dict[str, Callable[[Package], Predict]] = {
    "onnx": open_onnx,
    "torchscript": open_torchscript,
    "pt2": open_pt2,
    "openvino": open_openvino,
}


@pytest.fixture(params=KINDS)
def predict(request: pytest.FixtureRequest, package: Package) -> Predict:
    return open_variant(package, request.param)


def test_gives_the_logits_of_the_eager_model(
    predict: Predict, made: Made, batches: list[tuple[np.ndarray, np.ndarray]]
) -> None:
    for images, _ in batches:
        logits = predict(images)
        assert (logits.dtype, logits.shape) == (np.float32, (len(images), 5))
        np.testing.assert_allclose(logits, made.eager(images), atol=1e-4)


def test_takes_any_batch_size_and_memory_layout(
    predict: Predict, batches: list[tuple[np.ndarray, np.ndarray]]
) -> None:
    images = batches[0][0]
    together = predict(images)
    parts = (images[:1], images[1:3], images[3:])
    alone = np.concatenate([predict(part) for part in parts])
    np.testing.assert_allclose(alone, together, atol=1e-4)
    np.testing.assert_allclose(predict(images[::-1]), together[::-1], atol=1e-4)
    frozen = images.copy()
    frozen.flags.writeable = False  # as a slice of a memory map is
    np.testing.assert_array_equal(predict(frozen), together)


@pytest.mark.parametrize(
    "images",
    [
        np.zeros((2, SIDE_PX, SIDE_PX, 3), np.float32),
        np.zeros((2, 3, SIDE_PX, SIDE_PX), np.uint8),
        np.zeros((2, SIDE_PX, SIDE_PX + 1, 3), np.uint8),
        np.zeros((SIDE_PX, SIDE_PX, 3), np.uint8),
        np.zeros((0, SIDE_PX, SIDE_PX, 3), np.uint8),
        np.zeros((), np.uint8),
    ],
)
def test_refuses_other_images_in_words(predict: Predict, images: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"images must be uint8 \(B, 32, 32, 3\) with B > 0. Got"):
        predict(images)


def test_a_missing_variant_says_what_to_run(folder: Path) -> None:
    edit_manifest(folder, variants={})
    package = open_package(folder)
    for kind, opener in OPENERS.items():
        with pytest.raises(PackageError, match=f"Run: fieldmark export {folder} --to {kind}"):
            opener(package)
    with pytest.raises(UnknownName, match="'onxx' does not exist"):
        open_variant(package, "onxx")


def test_without_torch_only_onnx_and_openvino_open(folder: Path, package: Package) -> None:
    for kind in ("onnx", "openvino"):
        open_served(package, kind)
    with pytest.raises(PackageError, match="must be onnx or openvino to run without"):
        open_served(package, "pt2")


@pytest.mark.parametrize(("kind", "index"), [*((kind, 0) for kind in KINDS), ("openvino", 1)])
def test_damaged_bytes_are_never_opened(
    folder: Path, package: Package, kind: str, index: int
) -> None:
    path = folder / package.manifest.variants[kind].files[index]
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(IntegrityError, match="truncated") as caught:
        open_variant(package, kind)
    assert f"Run: fieldmark export {folder} --to {kind}." in str(caught.value)
    middle = len(data) // 2
    path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    with pytest.raises(IntegrityError, match="altered"):
        open_variant(package, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_model_is_one_sentence(
    folder: Path, kind: VariantKind, capfd: pytest.CaptureFixture[str]
) -> None:
    package = add_variant(folder, kind, b"\x08\x09 no model", kind=kind)
    with pytest.raises(PackageError, match="can open") as caught:
        open_variant(package, kind)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")  # no library logs a traceback beside it


def test_a_program_of_another_torch_is_one_sentence(folder: Path, made: Made) -> None:
    program = made.exported["pt2"]
    other = dataclasses.replace(
        program,
        data=program.data.replace(b"torch.ops.aten.relu", b"torch.ops.aten.rolu"),
        written_by="torch 9.1",
    )
    package = add_export(folder, "pt2", other)
    with pytest.raises(PackageError, match="torch 9.1 wrote it, and torch does not promise"):
        open_variant(package, "pt2")


@pytest.mark.parametrize("cut", [10, 0])
def test_openvino_weights_that_do_not_fit_are_one_sentence(
    folder: Path, made: Made, cut: int
) -> None:
    exported = made.exported["openvino"]
    package = add_export(
        folder, "openvino", dataclasses.replace(exported, weights=exported.weights[:cut])
    )
    with pytest.raises(PackageError, match="must be IR that openvino .* can open"):
        open_variant(package, "openvino")


@pytest.mark.slow
def test_openvino_of_another_shape_is_refused(folder: Path, made: Made) -> None:
    exported = export_openvino(made.module, SIDE_PX, SIDE_PX + 32)
    package = add_export(folder, "openvino", exported)
    with pytest.raises(PackageError, match=r"Got uint8 \(\?, 32, 64, 3\) and float32 \(\?, 5\)"):
        open_variant(package, "openvino")


def test_openvino_is_imported_without_its_telemetry(folder: Path) -> None:
    program = (
        "import sys\n"
        "from fieldmark.packaging.manifest import open_package\n"
        "from fieldmark.packaging.served import open_served\n"
        f"open_served(open_package({str(folder)!r}), 'openvino')\n"
        "print([name for name in sys.modules if name.startswith('openvino_telemetry.')])\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )
    assert done.stdout.split() == ["[]", "False"]


def test_openvino_missing_names_the_extra(
    package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name)
    )
    with pytest.raises(MissingDependency, match=r"pip install 'fieldmark\[openvino\]'"):
        open_variant(package, "openvino")


def test_threads_share_a_predict(package: Package, made: Made) -> None:
    images = draw_pixels(24)
    expected = made.eager(images)
    for kind in KINDS:
        shared = open_variant(package, kind)
        with ThreadPoolExecutor(4) as pool:
            parts = list(pool.map(lambda i: shared(images[i : i + 1]), range(len(images))))  # noqa: B023
        np.testing.assert_allclose(np.concatenate(parts), expected, atol=1e-4)


def _tiny_model(batch: str | int = "batch", side_px: int = SIDE_PX, classes: int = 5) -> bytes:
    """Mean of an image, cast to float, as each of its logits."""
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["x", "axes"], ["m"], keepdims=0),
        helper.make_node("Unsqueeze", ["m", "one"], ["u"]),
        helper.make_node("MatMul", ["u", "w"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, [batch, side_px, side_px, 3])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, classes])],
        [
            helper.make_tensor("axes", TensorProto.INT64, [3], [1, 2, 3]),
            helper.make_tensor("one", TensorProto.INT64, [1], [1]),
            helper.make_tensor("w", TensorProto.FLOAT, [1, classes], [1.0] * classes),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(model.SerializeToString())


def test_a_foreign_model_of_the_right_shape_opens(folder: Path) -> None:
    package = add_variant(folder, "onnx", _tiny_model(), kind="onnx")
    logits = open_onnx(package, threads=1)(np.full((3, SIDE_PX, SIDE_PX, 3), 7, np.uint8))
    np.testing.assert_array_equal(logits, np.full((3, 5), 7.0, np.float32))


@pytest.mark.parametrize("other", [{"batch": 2}, {"side_px": 31}, {"classes": 4}])
def test_a_model_of_another_shape_is_refused(folder: Path, other: dict[str, int]) -> None:
    package = add_variant(folder, "onnx", _tiny_model(**other), kind="onnx")  # type: ignore[arg-type]
    with pytest.raises(PackageError, match=r"must take uint8 \(batch, 32, 32, 3\)"):
        open_onnx(package)


def _with_external_weights(location: str) -> bytes:
    model = onnx.load_from_string(_tiny_model())
    tensor = model.graph.initializer[2]
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": "20"}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return bytes(model.SerializeToString())


def test_external_data_is_refused_although_onnxruntime_finds_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights.bin").write_bytes(np.full(5, 2.0, np.float32).tobytes())
    monkeypatch.chdir(tmp_path)
    model = _with_external_weights("weights.bin")
    # The reason for our own check: given bytes, onnxruntime looks in the working directory.
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    images = np.ones((1, SIDE_PX, SIDE_PX, 3), np.uint8)
    np.testing.assert_array_equal(session.run(None, {"images": images})[0], np.full((1, 5), 2.0))

    package = add_variant(folder, "onnx", model, kind="onnx")
    with pytest.raises(PackageError, match="external data"):
        open_onnx(package)


def test_another_format_than_onnx_is_refused_although_onnxruntime_opens_it(tmp_path: Path) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "model.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    ort.InferenceSession(_tiny_model(), options, providers=["CPUExecutionProvider"])
    data = (tmp_path / "model.ort").read_bytes()
    ort.InferenceSession(data, providers=["CPUExecutionProvider"])

    with pytest.raises(PackageError, match="can open"):
        open_session(data, "m.onnx")


@pytest.mark.parametrize("location", ["/etc/hosts", "../weights.bin", "*/_ORT_MEM_ADDR_/*"])
def test_external_data_anywhere_is_refused(location: str) -> None:
    with pytest.raises(PackageError, match="external data"):
        open_session(_with_external_weights(location), "m.onnx")


def test_external_data_is_found_however_its_key_is_encoded() -> None:
    plain = _with_external_weights("w")
    assert plain.count(b"\x0a\x08location") == 1
    # A length of 8 may be written in two bytes; protobuf accepts that.
    start = plain.index(b"\x0a\x08location")
    padded = plain[start:].replace(b"\x0a\x08location", b"\x0a\x88\x00location", 1)
    with pytest.raises(PackageError, match="external data"):
        open_session(padded, "m.onnx")


def test_a_node_named_like_a_location_is_not_mistaken_for_one() -> None:
    model = onnx.load_from_string(_tiny_model())
    model.graph.node[0].name = "/head/allocation/location"
    open_session(model.SerializeToString(), "m.onnx")

"""int8: all layers are quantized, biases are corrected as the paper says, the search is fair."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper
from packaging_data import Made, draw_pixels

from fieldmark.errors import ModelError
from fieldmark.measure import compare_logits
from fieldmark.packaging.export import export_onnx
from fieldmark.packaging.int8 import (
    Int8Settings,
    StaticQuantizer,
    correct_biases,
    input_means,
    needs_reduced_range,
    quantized_dynamically,
    weighted_layers,
)
from fieldmark.packaging.int8_search import Int8Search, Measured
from fieldmark.packaging.load import open_session


@pytest.fixture(scope="module")
def quantizer(made: Made, tmp_path_factory: pytest.TempPathFactory) -> StaticQuantizer:
    return StaticQuantizer(made.onnx, draw_pixels(24), tmp_path_factory.mktemp("int8"))


def integer_weights(model: bytes) -> dict[str, np.ndarray]:
    """Layer -> its integers, for the layers whose weights are."""
    proto = onnx.ModelProto.FromString(model)
    tensors = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
    dequantized = {
        node.output[0]: tensors[node.input[0]]
        for node in proto.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] in tensors
    }
    return {
        node.name: dequantized[node.input[1]]
        for node in proto.graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in dequantized
    }


def run(model: bytes, pixels: np.ndarray) -> np.ndarray:
    logits: np.ndarray = open_session(model, "model").run(["logits"], {"images": pixels})[0]
    return logits


def test_every_layer_with_weights_is_int8_and_answers_stay(
    quantizer: StaticQuantizer, made: Made
) -> None:
    model = quantizer.quantized(Int8Settings())
    weights = integer_weights(model)
    assert set(weights) == set(quantizer.layers)
    assert len(weights) > 5
    assert {values.dtype for values in weights.values()} == {np.dtype(np.int8)}
    assert len(model) < 0.5 * len(made.onnx)
    pixels = draw_pixels(60)
    agreement = compare_logits(made.eager(pixels), run(model, pixels))
    assert agreement.top1_agreement.value > 0.85
    assert agreement.max_abs_delta_logit > 0.0  # it was rounded


def test_7_bit_weights_are_half_as_large(quantizer: StaticQuantizer) -> None:
    wide = integer_weights(quantizer.quantized(Int8Settings()))
    narrow = integer_weights(quantizer.quantized(Int8Settings(reduce_range=True)))
    # An untrained residual branch ends in zeros.
    convolutions = [name for name, values in wide.items() if values.ndim == 4 and values.any()]
    assert len(convolutions) > 4
    for name in convolutions:
        assert np.abs(wide[name].astype(int)).max() > 100
        assert np.abs(narrow[name].astype(int)).max() <= 64


def test_layers_left_in_float_are_those_named(quantizer: StaticQuantizer) -> None:
    left = quantizer.layers[1:3]
    weights = integer_weights(quantizer.quantized(Int8Settings(float_layers=left)))
    assert set(weights) == set(quantizer.layers) - set(left)


def test_layers_left_in_float_run_in_float(quantizer: StaticQuantizer, tmp_path: Path) -> None:
    """onnxruntime itself quantizes float weights between rounded tensors, if it is let."""
    left = quantizer.layers[2:3]
    model = quantizer.quantized(Int8Settings(float_layers=left))
    assert opened_kinds(model, tmp_path / "some.onnx")["Conv"] == 1
    whole = opened_kinds(quantizer.quantized(Int8Settings()), tmp_path / "whole.onnx")
    assert whole["Conv"] == 0
    assert whole["QLinearConv"] == sum(layer != "fc" for layer in quantizer.layers)


@pytest.mark.slow
def test_a_feature_map_beside_the_logits_leaves_all_layers_in_integers(
    made: Made, tmp_path: Path
) -> None:
    exported = export_onnx(made.module, 64, 64, features=True)
    images = np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    model = StaticQuantizer(exported.data, images, tmp_path).quantized(Int8Settings())
    assert opened_kinds(model, tmp_path / "opened.onnx")["Conv"] == 0
    exact = open_session(exported.data, "float32").run(["features"], {"images": images})[0]
    found = open_session(model, "int8").run(["features"], {"images": images})[0]
    assert found.shape == exact.shape
    assert np.abs(found - exact).mean() < 0.1 * np.abs(exact).mean()


def opened_kinds(model: bytes, path: Path) -> Counter[str]:
    """The operators that onnxruntime runs, floats named as ONNX names them."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 3
    ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(path).graph.node)
    kinds["Conv"] += kinds.pop("FusedConv", 0)
    return kinds


def test_a_layer_in_float_keeps_its_bias(quantizer: StaticQuantizer) -> None:
    """Its weights are not rounded, so there is nothing to correct."""
    layer = quantizer.layers[1]

    def bias(model: bytes) -> np.ndarray | None:
        proto = onnx.ModelProto.FromString(model)
        tensors = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
        (node,) = [node for node in proto.graph.node if node.name == layer]
        return tensors[node.input[2]] if len(node.input) > 2 else None

    plain = bias(quantizer.quantized(Int8Settings(float_layers=(layer,))))
    settings = Int8Settings(float_layers=(layer,), bias_corrected=True)
    corrected = bias(quantizer.quantized(settings))
    assert (plain is None) == (corrected is None)
    assert plain is None or np.array_equal(plain, np.asarray(corrected))


def test_one_layer_alone(quantizer: StaticQuantizer) -> None:
    layer = quantizer.layers[2]
    assert set(integer_weights(quantizer.quantized_alone(layer, Int8Settings()))) == {layer}


def test_corrected_biases_bring_logits_nearer(quantizer: StaticQuantizer, made: Made) -> None:
    pixels = draw_pixels(60)
    reference = made.eager(pixels)
    # Seven bits, so that what is corrected is larger than what rounding of activations does.
    settings = Int8Settings(reduce_range=True)
    plain = np.abs(run(quantizer.quantized(settings), pixels) - reference).mean()
    corrected = quantizer.quantized(replace(settings, bias_corrected=True))
    assert np.abs(run(corrected, pixels) - reference).mean() < plain


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_a_corrected_layer_keeps_its_mean(groups: int) -> None:
    rng = np.random.default_rng(groups)
    weight = rng.normal(size=(6, 6 // groups, 1, 1)).astype(np.float32)
    bias = rng.normal(size=6).astype(np.float32)
    scale = np.abs(weight).max(axis=(1, 2, 3)) / 2.6  # so coarse that means move
    integers = np.round(weight / scale.reshape(-1, 1, 1, 1)).astype(np.int8)
    model = one_convolution(weight, bias, groups)
    dequantized = integers * scale.reshape(-1, 1, 1, 1).astype(np.float32)
    images = rng.integers(0, 256, size=(20, 4, 4, 6)).astype(np.uint8)
    changed = correct_biases(model, {"w": dequantized}, input_means(model, images))
    moved = {t.name: numpy_helper.to_array(t) for t in changed.graph.initializer}["b"]

    def mean_output(w: np.ndarray, b: np.ndarray) -> np.ndarray:
        session = open_session(one_convolution(w, b, groups).SerializeToString(), "model")
        (out,) = session.run(["y"], {"images": images})
        return np.asarray(out).mean(axis=(0, 2, 3))

    wanted = mean_output(weight, bias)
    assert np.abs(mean_output(dequantized, bias) - wanted).max() > 1.0
    np.testing.assert_allclose(mean_output(dequantized, moved), wanted, rtol=1e-3, atol=1e-2)


def one_convolution(weight: np.ndarray, bias: np.ndarray, groups: int) -> onnx.ModelProto:
    return helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Cast", ["images"], ["f"], to=onnx.TensorProto.FLOAT),
                helper.make_node("Transpose", ["f"], ["x"], perm=[0, 3, 1, 2]),
                helper.make_node("Conv", ["x", "w", "b"], ["y"], name="conv", group=groups),
            ],
            "one",
            [helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["n", 4, 4, 6])],
            [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 6, 4, 4])],
            [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(bias, "b")],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=9,
    )


def test_dynamic_quantization_takes_convolutions_too(made: Made, tmp_path: Path) -> None:
    model, num_layers = quantized_dynamically(made.onnx, tmp_path)
    kinds = [node.op_type for node in onnx.ModelProto.FromString(model).graph.node]
    assert "Conv" not in kinds
    assert "Gemm" not in kinds
    assert kinds.count("ConvInteger") + kinds.count("MatMulInteger") == num_layers
    assert len(model) < 0.5 * len(made.onnx)


def test_a_model_without_weights_is_refused(tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Cast", ["images"], ["logits"], to=onnx.TensorProto.FLOAT)],
        "none",
        [helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, ["n", 4, 4, 3])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["n", 4, 4, 3])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    with pytest.raises(ModelError, match="must have convolutions or matrix products"):
        StaticQuantizer(model.SerializeToString(), draw_pixels(8), tmp_path)


class FakeQuantizer:
    """Layers l0 to l7; a model is the text of its settings."""

    layers = tuple(f"l{number}" for number in range(8))

    def quantized(self, settings: Int8Settings) -> bytes:
        return repr(settings).encode()

    def quantized_alone(self, layer: str, settings: Int8Settings) -> bytes:
        return layer.encode()


class FakeMeasure:
    """A drop that shrinks with each sensitive layer in float: l5 first, then l2, then l7."""

    sensitive = ("l5", "l2", "l7")

    def __init__(self, needed: int, speed: float = 2.0, best: str = "entropy") -> None:
        self.needed, self.speed, self.best = needed, speed, best
        self.asked: list[str] = []

    def __call__(self, model: bytes) -> Measured:
        text = model.decode()
        self.asked.append(text)
        in_float = sum(f"'{layer}'" in text for layer in self.sensitive)
        kl = 0.1 * max(0, self.needed - in_float) + (0.0 if self.best in text else 0.01)
        logits = np.eye(4, dtype=np.float32)
        return Measured(compare_logits(logits, logits), kl, kl / 10, self.speed)

    def mean_kl(self, model: bytes) -> float:
        order = {"l5": 3.0, "l2": 2.0, "l7": 1.0}
        return order.get(model.decode(), 0.1)


def search(measure: FakeMeasure, max_drop: float = 0.005) -> Int8Search:
    return Int8Search(
        FakeQuantizer(), measure, measure.mean_kl, max_drop=max_drop, reduce_range=False
    )


def test_the_search_stops_as_soon_as_the_bound_holds() -> None:
    measure = FakeMeasure(needed=0)
    found = search(measure).run()
    assert found.holds
    assert len(found.tried) == 2  # min-max, without and with corrected biases
    assert found.sensitivity == {}


@pytest.mark.parametrize("needed", [1, 2, 3])
def test_the_fewest_layers_are_left_in_float(needed: int) -> None:
    found = search(FakeMeasure(needed)).run()
    assert found.holds
    assert found.best.settings.float_layers == FakeMeasure.sensitive[:needed]
    assert found.best.settings.calibration == "entropy"  # the nearest of the three
    assert found.model == FakeQuantizer().quantized(found.best.settings)


def test_a_bound_that_cannot_be_held_is_said() -> None:
    found = search(FakeMeasure(needed=9)).run()
    assert not found.holds
    assert max(len(c.settings.float_layers) for c in found.tried) == 4  # half of the layers


def test_a_model_slower_than_float_is_never_taken() -> None:
    found = search(FakeMeasure(needed=0, speed=0.9)).run()
    assert not found.holds


class ClaimsToBeNear(FakeMeasure):
    """Corrected biases bring the logits nearer, and lose the bound that plain rounding holds."""

    def __call__(self, model: bytes) -> Measured:
        corrected = b"bias_corrected=True" in model
        logits = np.eye(4, dtype=np.float32)
        agreement = compare_logits(logits, logits)
        return Measured(agreement, 0.01 - 0.001 * corrected, 0.004 + 0.002 * corrected, 2.0)


def test_what_holds_goes_before_what_is_near() -> None:
    found = search(ClaimsToBeNear(needed=0)).run()
    assert found.holds
    assert not found.best.settings.bias_corrected


@pytest.mark.parametrize(
    ("flags", "reduced"),
    [
        ("x86_64+avx2", True),
        ("x86_64+avx2+avx512f", True),
        ("x86_64+avx2+avx512f+avx512_vnni", False),
        ("x86_64+avx2+avx_vnni", False),
        ("aarch64+asimd", False),
    ],
)
def test_the_processor_decides_on_7_bits(
    flags: str, reduced: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fieldmark.packaging.int8.instruction_set", lambda: flags)
    assert needs_reduced_range() is reduced


def test_layers_are_found_in_the_order_of_the_graph(made: Made) -> None:
    proto = onnx.ModelProto.FromString(made.onnx)
    names = [node.name for node in proto.graph.node if node.op_type in ("Conv", "Gemm")]
    assert list(weighted_layers(proto)) == names

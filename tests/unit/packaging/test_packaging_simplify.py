"""What an exported graph consists of: folded norms, no leftovers, names of the network's own."""

from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, numpy_helper
from packaging_data import SPEC, Made, make_network
from torch import nn

from fieldmark.model import InferenceModule
from fieldmark.packaging.export import export_onnx
from fieldmark.packaging.simplify import describe_graph, simplify

IMAGES_IN = {"Transpose": 1, "Cast": 1, "Div": 2, "Sub": 1}  # normalisation


def _with_norms(name: str) -> InferenceModule:
    """A network whose norms do something, as those of a trained one do."""
    network = make_network(name)
    with torch.no_grad():
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.bias.normal_()
                norm.running_mean.normal_(std=0.1)
                norm.running_var.uniform_(0.5, 2.0)
    return InferenceModule(network, SPEC.mean, SPEC.std)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side_px", "operators"),
    [
        (
            "test_efficientnet",
            64,
            {"Conv": 17, "Sigmoid": 13, "Mul": 13, "ReduceMean": 3, "Reshape": 1, "Gemm": 1},
        ),
        (
            "airnet",
            32,
            {"Conv": 7, "Gelu": 7, "MaxPool": 3, "ReduceMax": 1, "Gemm": 1, "Mul": 1},
        ),
    ],
)
def test_a_graph_is_what_the_network_does_and_no_more(
    name: str, side_px: int, operators: dict[str, int]
) -> None:
    module = _with_norms(name)
    exported = export_onnx(module, side_px, side_px)
    assert exported.graph.operators == Counter(IMAGES_IN) + Counter(operators)
    graph = onnx.load_from_string(exported.data).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    convs = [node for node in graph.node if node.op_type in ("Conv", "Gemm")]
    for node in convs:
        assert node.input[1] == f"{node.name}.weight"  # as in the package
        assert node.input[1] in tensors
    state = module.network.state_dict()
    assert {node.name for node in convs} == {
        key.removesuffix(".weight") for key, value in state.items() if value.ndim in (2, 4)
    }
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    assert all(names)


@pytest.mark.slow
def test_folded_norms_of_airnet_are_not_the_identity() -> None:
    module = _with_norms("airnet")
    graph = onnx.load_from_string(export_onnx(module, 32, 32).data).graph
    bias = next(t for t in graph.initializer if t.name == "groups.0.conv1.bias")
    norm = module.network.groups[0].norm1
    scale = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach()
    expected = (norm.bias - norm.running_mean * scale).detach().numpy()
    np.testing.assert_allclose(numpy_helper.to_array(bias), expected, rtol=1e-5)
    assert np.abs(expected).max() > 0.5


def _pooled(scale: list[float], with_bias: bool, extra_use: bool = False) -> onnx.ModelProto:
    """Conv -> MaxPool -> BatchNormalization on two channels."""
    rng = np.random.default_rng(0)
    values = {
        "weight": rng.normal(size=(2, 3, 3, 3)),
        "scale": np.array(scale),
        "shift": np.array([0.3, -0.7]),
        "mean": np.array([0.1, 0.2]),
        "var": np.array([0.5, 3.0]),
    }
    if with_bias:
        values["bias"] = np.array([1.0, -2.0])
    parts = {
        name: numpy_helper.from_array(value.astype(np.float32), name)
        for name, value in values.items()
    }
    nodes = [
        helper.make_node("Conv", ["x", "weight", *(["bias"] * with_bias)], ["c"]),
        helper.make_node("MaxPool", ["c"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node(
            "BatchNormalization", ["p", "scale", "shift", "mean", "var"], ["y"], epsilon=0.01
        ),
    ]
    outputs = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, 2, 3, 3])]
    if extra_use:
        outputs.append(helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, [1, 2, 6, 6]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 3, 8, 8])],
        outputs,
        list(parts.values()),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _run(model: onnx.ModelProto) -> list[np.ndarray]:
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x = np.random.default_rng(1).normal(size=(1, 3, 8, 8)).astype(np.float32)
    return session.run(None, {"x": x})


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(
    ("scale", "extra_use", "folded"),
    [
        ([0.5, 2.0], False, True),
        ([0.5, -2.0], False, False),  # the smallest would become the largest
        ([0.5, 0.0], False, False),
        ([0.5, 2.0], True, False),  # another reads what the convolution gives
    ],
)
def test_a_norm_behind_a_pooling_is_folded_where_that_changes_nothing(
    with_bias: bool, scale: list[float], extra_use: bool, folded: bool
) -> None:
    model = _pooled(scale, with_bias, extra_use)
    before = _run(model)
    simplify(model)
    assert ("BatchNormalization" in describe_graph(model).operators) is not folded
    for one, other in zip(before, _run(model), strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5)
    assert describe_graph(model).num_parameters == (54 + 2 if folded else 54 + 8 + 2 * with_bias)


def test_every_format_counts_what_it_stores(made: Made) -> None:
    size = sum(p.numel() for p in made.module.network.parameters())
    for name, exported in made.exported.items():
        assert exported.graph.num_parameters == pytest.approx(size, rel=0.02), name
        counts = list(exported.graph.operators.values())
        assert counts == sorted(counts, reverse=True)
    convs = {name: made.exported[name].graph.operators for name in made.exported}
    assert convs["onnx"]["Conv"] == convs["pt2"]["conv2d"] == 15
    assert convs["torchscript"]["_convolution"] == convs["openvino"]["Convolution"] == 15

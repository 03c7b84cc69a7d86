"""An exported ONNX graph made plain: norms inside convolutions, and names of the network's own.

torch's exporter has already folded constants, removed what does nothing, and folded each norm that
follows a convolution. What is left for here is the norm behind a pooling, and the names.
"""

import ast
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from fieldmark.packaging.entries import GraphEntry

_SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter notes the module of a node
_NETWORK = "module.network."  # in the wrappers around it
_ABOVE = {_NETWORK: "", "module.": "images."}
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_NO_WEIGHTS = (onnx.TensorProto.INT64, onnx.TensorProto.BOOL)  # shapes, axes and masks

Values = npt.NDArray[np.float64]


def simplify(model: onnx.ModelProto) -> None:
    """Fold, rename and clean the graph in place.

    Weights get the names that they have in the package, as far as they are the network's; nodes
    the name of the module whose weights they hold, such as "layer1.0.conv1", or that they stand
    for, and each another one. Notes of the exporter, with paths of this machine, go.
    """
    _fold_pooled_norms(model.graph)
    _rename_weights(model.graph)
    _rename_nodes(model.graph)
    _remove_notes(model)


def describe_graph(model: onnx.ModelProto) -> GraphEntry:
    """Return the operators and how many values the initializers hold, shapes left out."""
    operators = Counter(node.op_type for node in model.graph.node)
    weights = [t for t in model.graph.initializer if t.data_type not in _NO_WEIGHTS]
    stored = sum(int(np.prod(tensor.dims, dtype=np.int64)) for tensor in weights)
    return GraphEntry(operators=dict(operators.most_common()), num_parameters=stored)


def _fold_pooled_norms(graph: onnx.GraphProto) -> None:
    """Fold Conv -> MaxPool -> BatchNormalization into the Conv where all scales are positive.

    The largest of scaled values is the scaled largest then, so the norm may come first.
    """
    made_by = {output: node for node in graph.node for output in node.output}
    uses = Counter(name for node in graph.node for name in node.input)
    uses.update(output.name for output in graph.output)
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for norm in [node for node in graph.node if node.op_type == "BatchNormalization"]:
        pool = made_by.get(norm.input[0])
        conv = made_by.get(pool.input[0]) if pool is not None else None
        if pool is None or conv is None or (pool.op_type, conv.op_type) != ("MaxPool", "Conv"):
            continue
        own = [conv.output[0], pool.output[0], *conv.input[1:]]
        if any(uses[name] != 1 for name in own):
            continue
        if not all(name in tensors for name in [*conv.input[1:], *norm.input[1:]]):
            continue
        scale, shift = _affine([_values(tensors[name]) for name in norm.input[1:]], norm)
        if (scale > 0).all():
            _fold(graph, conv, scale, shift, tensors)
            pool.output[0] = norm.output[0]
            graph.node.remove(norm)
    _remove_unused(graph)


def _affine(parts: list[Values], norm: onnx.NodeProto) -> tuple[Values, Values]:
    """Return what a norm in eval mode multiplies each channel by, and then adds."""
    gain, bias, mean, variance = parts
    epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
    scale = gain / np.sqrt(variance + epsilon)
    return scale, bias - mean * scale


def _fold(
    graph: onnx.GraphProto,
    conv: onnx.NodeProto,
    scale: Values,
    shift: Values,
    tensors: dict[str, onnx.TensorProto],
) -> None:
    weight = tensors[conv.input[1]]
    bias = np.zeros(len(scale))
    if len(conv.input) == 3:
        bias = _values(tensors[conv.input[2]])
    else:
        tensors[f"{weight.name}_bias"] = graph.initializer.add(name=f"{weight.name}_bias")
        conv.input.append(f"{weight.name}_bias")
    _set(weight, _values(weight) * scale[:, None, None, None])
    _set(tensors[conv.input[2]], bias * scale + shift)


def _values(tensor: onnx.TensorProto) -> Values:
    return numpy_helper.to_array(tensor).astype(np.float64)


def _set(tensor: onnx.TensorProto, values: Values) -> None:
    tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))


def _remove_unused(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
    made = {name for node in graph.node for name in node.output}
    for info in [info for info in graph.value_info if info.name not in made]:
        graph.value_info.remove(info)


def _rename_weights(graph: onnx.GraphProto) -> None:
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    renamed = {}
    for tensor in graph.initializer:
        short = _below(tensor.name)
        if short.endswith(".weight_bias"):  # of a folded norm
            short = short.removesuffix("weight_bias") + "bias"
        if short != tensor.name and short not in taken:
            renamed[tensor.name] = tensor.name = short
            taken.add(short)
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)


def _rename_nodes(graph: onnx.GraphProto) -> None:
    weights = {tensor.name for tensor in graph.initializer}
    taken: set[str] = set()
    for node in graph.node:
        base = name = _node_name(node, weights)
        number = 1
        while name in taken:
            number += 1
            name = f"{base}_{number}"
        taken.add(name)
        node.name = name


def _node_name(node: onnx.NodeProto, weights: set[str]) -> str:
    if node.op_type in _WEIGHTED:
        for name in node.input:
            module, _, parameter = name.rpartition(".")
            if name in weights and module and parameter == "weight":
                return module
    noted = next((prop.value for prop in node.metadata_props if prop.key == _SCOPES), "[]")
    scopes = ["", *ast.literal_eval(noted)[:-1]]  # the last is the operation itself
    inside = scopes[-1].startswith(_NETWORK)
    return f"{scopes[-1].removeprefix(_NETWORK)}/{node.op_type}" if inside else node.op_type


def _below(name: str) -> str:
    """Return a name without the wrappers that lie around the network."""
    for above, instead in _ABOVE.items():
        if name.startswith(above):
            return instead + name.removeprefix(above)
    return name


def _remove_notes(model: onnx.ModelProto) -> None:
    """Remove what the exporter notes beside each node: stack traces with this machine's paths."""
    graph = model.graph
    parts: list[Any] = [*graph.node, *graph.initializer, *graph.value_info]
    parts += [*graph.input, *graph.output]
    for function in model.functions:
        parts += [function, *function.node]
    for part in [model, graph, *parts]:
        part.ClearField("metadata_props")
        part.ClearField("doc_string")

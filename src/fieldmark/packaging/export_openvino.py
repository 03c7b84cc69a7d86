"""The OpenVINO exporter: IR, made of the ONNX graph."""

import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fieldmark.errors import ModelError, require
from fieldmark.model import InferenceModule
from fieldmark.packaging.entries import GraphEntry
from fieldmark.packaging.export_onnx import export_onnx
from fieldmark.packaging.export_parts import Exported, check_batches, export_sentence
from fieldmark.packaging.openvino_load import compile_ir, import_openvino, run_with

_NO_OPERATORS = ("Parameter", "Result", "Constant")
_AFTER_POOLING = ("Relu", "Clamp", "Convolution", "GroupConvolution")  # what needs no guard


def export_openvino(module: InferenceModule, height_px: int, width_px: int) -> Exported:
    """Return `module` as OpenVINO IR in float32: the graph, and its weights as a second file.

    Its input and output are those of `export_onnx`, of which it is made.

    Raises:
        MissingDependency: OpenVINO is not installed.
        ModelError: torch or OpenVINO cannot convert the network, or the result answers differently.
    """
    require("openvino", "openvino", "exporting to OpenVINO")
    openvino = import_openvino()
    onnx = export_onnx(module, height_px, width_px)
    try:
        model = openvino.Core().read_model(onnx.data, b"")
        _guard_poolings(openvino, model)
        passes = openvino.passes.Manager()
        passes.register_pass(openvino.passes.ConstantFolding())  # of shapes, above all
        passes.run_passes(model)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.xml"
            # Weights in float16, which is OpenVINO's default here, would change the logits.
            openvino.save_model(model, file, compress_to_fp16=False)
            graph, weights = file.read_bytes(), file.with_suffix(".bin").read_bytes()
    except RuntimeError as error:
        raise ModelError(export_sentence(module, "OpenVINO", error)) from error
    predict = run_with(compile_ir(graph, weights, "the exported model"))

    def run(images: Tensor) -> tuple[Tensor]:
        return (torch.from_numpy(predict(images.cpu().numpy())),)

    check_batches(module, lambda x: (module(x),), run, "OpenVINO", height_px, width_px)
    version = openvino.__version__.partition("-")[0]
    return Exported(graph, _describe(model), f"openvino {version}", weights=weights)


def _guard_poolings(openvino: Any, model: Any) -> None:
    """Keep an activation that follows a convolution and a max pooling behind the pooling.

    OpenVINO's CPU plugin (2026.4) moves it into the convolution, which is right only where it
    never decreases: GELU, SiLU and others then give other values. It leaves a pooling alone that
    two operations read, so here they read max(x, x - 1), which is x.
    """
    ops = openvino.opset13
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MaxPool":
            continue
        pooled = node.output(0)
        readers = list(pooled.get_target_inputs())
        if all(reader.get_node().get_type_name() in _AFTER_POOLING for reader in readers):
            continue
        guarded = ops.maximum(pooled, ops.subtract(pooled, np.float32(1)))
        for reader in readers:
            reader.replace_source_output(guarded.output(0))


def _describe(model: Any) -> GraphEntry:
    nodes = model.get_ops()
    kinds = (node.get_type_name() for node in nodes)
    operators = Counter(kind for kind in kinds if kind not in _NO_OPERATORS)
    constants = [node for node in nodes if node.get_type_name() == "Constant"]
    sizes = [
        math.prod(node.get_output_shape(0))
        for node in constants
        if node.get_element_type().is_real()
    ]
    return GraphEntry(operators=dict(operators.most_common()), num_parameters=sum(sizes))

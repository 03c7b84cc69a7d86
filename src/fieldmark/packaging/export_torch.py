"""Exports that torch itself opens: TorchScript, and the programs of torch.export."""

import io
from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fieldmark.errors import ModelError
from fieldmark.packaging.entries import GraphEntry
from fieldmark.packaging.export_parts import (
    Exported,
    check_batches,
    example_images,
    export_sentence,
    quiet,
)


def export_torchscript(module: nn.Module, height_px: int, width_px: int) -> Exported:
    """Return `module` traced, frozen and saved: the same input and output as `export_onnx`.

    torch deprecates TorchScript: its warnings are silenced here, for the caller to say it once.

    Raises:
        ModelError: torch cannot trace the network, or the trace answers differently.
    """
    example = example_images(module, 2, height_px, width_px)
    try:
        with quiet(), torch.no_grad():
            # What check_trace compares is compared below, at more than one batch size.
            traced = torch.jit.freeze(torch.jit.trace(module.eval(), (example,), check_trace=False))
            buffer = io.BytesIO()
            torch.jit.save(traced, buffer)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ModelError(export_sentence(module, "TorchScript", error)) from error

    def run(images: Tensor) -> tuple[Tensor]:
        with torch.jit.optimized_execution(False):  # as it is served; see torch_load
            return (traced(images),)

    check_batches(module, lambda x: (module(x),), run, "TorchScript", height_px, width_px)
    nodes = list(traced.inlined_graph.nodes())
    constants = [node.t("value") for node in nodes if _holds_tensor(node)]
    operators = [node.kind().removeprefix("aten::") for node in nodes if "aten::" in node.kind()]
    return Exported(buffer.getvalue(), _graph(operators, constants), _written_by())


def export_pt2(module: nn.Module, height_px: int, width_px: int) -> Exported:
    """Return `module` as a program of torch.export: the same input and output as `export_onnx`.

    torch does not promise that later versions read it, so the caller should say so.

    Raises:
        ModelError: torch cannot export the network, or the program answers differently.
    """
    example = example_images(module, 2, height_px, width_px)  # torch.export freezes sizes of 1
    buffer = io.BytesIO()
    try:
        with quiet(), torch.no_grad():
            batch = torch.export.Dim("batch")
            program = torch.export.export(
                module.eval(), (example,), dynamic_shapes=({0: batch},), strict=False
            )
            for node in program.graph.nodes:
                node.meta.pop("stack_trace", None)  # paths of this machine
            program.example_inputs = None  # a pickle, and of no use to a reader
            torch.export.save(program, buffer)
            opened = program.module()
    # torch.export raises errors of many kinds, some of no public class.
    except Exception as error:  # noqa: BLE001
        raise ModelError(export_sentence(module, "pt2", error)) from error
    check_batches(
        module, lambda x: (module(x),), lambda x: (opened(x),), "pt2", height_px, width_px
    )
    calls = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
    # "aten.conv2d.default"; others check sizes or take tuples apart.
    operators = [name.split(".")[1] for name in calls if name.startswith("aten.")]
    operators = [name for name in operators if not name.startswith(("_assert", "sym_"))]
    stored = [*program.state_dict.values(), *program.constants.values()]
    tensors = [value for value in stored if isinstance(value, Tensor)]
    return Exported(buffer.getvalue(), _graph(operators, tensors), _written_by())


def _holds_tensor(node: torch.Node) -> bool:
    is_constant: bool = node.kind() == "prim::Constant" and node.hasAttribute("value")
    return is_constant and node.kindOf("value") == "t"


def _graph(operators: Iterable[str], tensors: Iterable[Tensor]) -> GraphEntry:
    counted = dict(Counter(operators).most_common())
    stored = sum(tensor.numel() for tensor in tensors if tensor.is_floating_point())
    return GraphEntry(operators=counted, num_parameters=stored)


def _written_by() -> str:
    return f"torch {torch.__version__}"

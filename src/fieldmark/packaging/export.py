"""A trained module -> one file that runs without its Python code: ONNX, or TorchScript."""

import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from fieldmark.errors import ModelError
from fieldmark.packaging.entries import VariantKind
from fieldmark.packaging.load import open_session

OPSET = 20  # what torch's exporter is written for; onnxruntime 1.17 and later run it
FORMATS: tuple[VariantKind, ...] = ("onnx", "torchscript")
MAX_ONNX_BYTES = 2**31 - 2**24  # a protobuf ends at 2 GiB; the graph itself takes some of it

# Rounding differs in the sixth digit; a size frozen into the graph gives errors or other logits.
_TOLERANCE = 1e-3
_BATCH_SIZES = (1, 2, 3)


def export_module(module: nn.Module, to: VariantKind, height_px: int, width_px: int) -> bytes:
    """Return `module` in the format `to`; see `export_onnx` and `export_torchscript`."""
    exporter = {"onnx": export_onnx, "torchscript": export_torchscript}[to]
    return exporter(module, height_px, width_px)


def export_onnx(module: nn.Module, height_px: int, width_px: int) -> bytes:
    """Return `module` as one ONNX file that takes batches of any size.

    Its input is "images", uint8 (batch, height_px, width_px, 3); its output "logits", float32
    (batch, K). The module is put in eval mode. The result was run, for batches of 1, 2 and 3.

    Raises:
        ModelError: torch cannot export the network, or what it exports answers differently.
    """
    size = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    if size > MAX_ONNX_BYTES:
        raise ModelError(
            f"weights must be at most {MAX_ONNX_BYTES} bytes for a single ONNX file. Got {size}."
        )
    example = _images(module, 2, height_px, width_px)  # torch.export freezes sizes of 1
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                module.eval(),
                (example,),
                dynamo=True,
                external_data=False,
                opset_version=OPSET,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes=({0: "batch"},),
                verbose=False,
            )
        if program is None:  # what the signature allows for the exporter without dynamo
            raise ModelError("torch.onnx.export must return a program. Got None.")
        proto = program.model_proto
        _remove_traces(proto)
        onnx.checker.check_model(proto, full_check=True)
    except (torch.onnx.OnnxExporterError, onnx.checker.ValidationError, ValueError) as error:
        raise ModelError(_sentence(module, "ONNX", error)) from error
    data: bytes = proto.SerializeToString()
    session = open_session(data, "the exported model")

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(["logits"], {"images": images.cpu().numpy()})[0])

    _check_batches(module, run, "ONNX", height_px, width_px)
    return data


def export_torchscript(module: nn.Module, height_px: int, width_px: int) -> bytes:
    """Return `module` traced, frozen and saved: the same input and output as `export_onnx`.

    torch deprecates TorchScript: its warnings are silenced here, for the caller to say it once.

    Raises:
        ModelError: torch cannot trace the network, or the trace answers differently.
    """
    example = _images(module, 2, height_px, width_px)
    try:
        with _quiet(), torch.no_grad():
            # What check_trace compares is compared below, at more than one batch size.
            traced = torch.jit.freeze(torch.jit.trace(module.eval(), (example,), check_trace=False))
            buffer = io.BytesIO()
            torch.jit.save(traced, buffer)
    except (RuntimeError, ValueError, TypeError) as error:
        raise ModelError(_sentence(module, "TorchScript", error)) from error

    def run(images: Tensor) -> Tensor:
        with torch.jit.optimized_execution(False):  # as it is served; see torch_load
            logits: Tensor = traced(images)
        return logits

    _check_batches(module, run, "TorchScript", height_px, width_px)
    return buffer.getvalue()


def _check_batches(
    module: nn.Module,
    exported: Callable[[Tensor], Tensor],
    format_name: str,
    height_px: int,
    width_px: int,
) -> None:
    """Raise ModelError unless both give the same logits, whatever the batch size."""
    for batch_size in _BATCH_SIZES:
        images = _images(module, batch_size, height_px, width_px)
        with torch.no_grad():
            expected = module(images).cpu()
            try:
                found = exported(images).cpu()
            # Each runtime raises its own errors, and all of them mean the same here.
            except Exception as error:  # noqa: BLE001
                raise ModelError(
                    _sentence(module, f"{format_name} for any batch", error)
                ) from error
        tolerance = _TOLERANCE * max(1.0, float(expected.abs().max()))
        same = found.shape == expected.shape and torch.allclose(
            found, expected, rtol=0, atol=tolerance
        )
        if not same:
            raise ModelError(
                f"{type(getattr(module, 'network', module)).__name__} in {format_name} must give "
                f"the logits it gives in torch. Got others for a batch of {batch_size}. "
                "Choose another architecture or format."
            )


def _images(module: nn.Module, batch_size: int, height_px: int, width_px: int) -> Tensor:
    values = np.random.default_rng(batch_size).integers(
        0, 256, size=(batch_size, height_px, width_px, 3), dtype=np.uint8
    )
    device = next((t.device for t in module.state_dict().values()), torch.device("cpu"))
    return torch.from_numpy(values).to(device)


def _remove_traces(proto: onnx.ModelProto) -> None:
    """Remove what the exporter notes beside each node: stack traces with this machine's paths."""
    graph = proto.graph
    parts = [*graph.node, *graph.initializer, *graph.value_info, *graph.input, *graph.output]
    for function in proto.functions:
        parts += [function, *function.node]
    for part in [proto, graph, *parts]:
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the exporter's warnings and log lines; its errors are exceptions."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _sentence(module: nn.Module, format_name: str, error: Exception) -> str:
    cause = error.__cause__ or error  # the exporter wraps the reason in a page of advice
    reason = " ".join(str(cause).split())[:200].rstrip(".")
    name = type(getattr(module, "network", module)).__name__
    return f"{name} cannot be exported to {format_name}. {type(cause).__name__}: {reason}."

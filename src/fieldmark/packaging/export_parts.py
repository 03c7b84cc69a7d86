"""What all exporters share: their result, example images, the comparison, and sentences."""

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from fieldmark.errors import ModelError
from fieldmark.packaging.entries import Features, GraphEntry

# Rounding differs in the sixth digit; a size frozen into the graph gives errors or other logits.
_TOLERANCE = 1e-3
_BATCH_SIZES = (1, 2, 3)
_LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")

Outputs = tuple[Tensor, ...]  # logits (B, K), and features (B, C, h, w) where they were asked for


@dataclass(frozen=True, slots=True)
class Exported:
    """A module in another format, and what is recorded of it."""

    data: bytes
    graph: GraphEntry
    written_by: str  # the library and its version
    weights: bytes = b""  # OpenVINO's second file
    opset: int | None = None  # of ONNX
    features: Features | None = None


def check_batches(
    module: nn.Module,
    expected: Callable[[Tensor], Outputs],
    exported: Callable[[Tensor], Outputs],
    format_name: str,
    height_px: int,
    width_px: int,
) -> None:
    """Raise ModelError unless both give the same outputs, whatever the batch size."""
    name = network_name(module)
    for batch_size in _BATCH_SIZES:
        images = example_images(module, batch_size, height_px, width_px)
        with torch.no_grad():
            wanted = expected(images)
            try:
                found = exported(images)
            # Each runtime raises its own errors, and all of them mean the same here.
            except Exception as error:  # noqa: BLE001
                raise ModelError(
                    export_sentence(module, f"{format_name} for any batch", error)
                ) from error
        outputs = zip(("logits", "features"), wanted, found, strict=False)
        for output, one, other in outputs:
            if not _same(one.cpu(), other.cpu()):
                raise ModelError(
                    f"{name} in {format_name} must give the {output} it gives in torch. Got "
                    f"others for a batch of {batch_size}. Choose another architecture or format."
                )


def example_images(module: nn.Module, batch_size: int, height_px: int, width_px: int) -> Tensor:
    """Return noise, uint8 (batch_size, height_px, width_px, 3), where the module's weights are."""
    values = np.random.default_rng(batch_size).integers(
        0, 256, size=(batch_size, height_px, width_px, 3), dtype=np.uint8
    )
    device = next((t.device for t in module.state_dict().values()), torch.device("cpu"))
    return torch.from_numpy(values).to(device)


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back the exporters' warnings and log lines; their errors are exceptions."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def network_name(module: nn.Module) -> str:
    """Return the class of the network inside."""
    return type(getattr(module, "network", module)).__name__


def export_sentence(module: nn.Module, format_name: str, error: Exception) -> str:
    """Return why the module cannot be exported, in one line."""
    cause = error.__cause__ or error  # the exporter wraps the reason in a page of advice
    reason = " ".join(str(cause).split())[:200].rstrip(".")
    return (
        f"{network_name(module)} cannot be exported to {format_name}. "
        f"{type(cause).__name__}: {reason}."
    )


def _same(one: Tensor, other: Tensor) -> bool:
    tolerance = _TOLERANCE * max(1.0, float(one.abs().max()))
    return one.shape == other.shape and torch.allclose(other, one, rtol=0, atol=tolerance)

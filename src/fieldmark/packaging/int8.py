"""A float32 ONNX model -> an int8 one, by onnxruntime's quantizer, calibrated on real images.

`StaticQuantizer` writes the integers as pairs of QuantizeLinear and DequantizeLinear around each
layer (QDQ), which onnxruntime fuses into integer kernels when it opens the file: activations are
uint8, one scale for each tensor; weights int8, one scale for each output channel.
"""

import contextlib
import io
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

from fieldmark.errors import ModelError
from fieldmark.packaging.load import open_session
from fieldmark.runtime.cpu import instruction_set

Calibration = Literal["minmax", "percentile", "entropy"]
CALIBRATIONS: tuple[Calibration, ...] = ("minmax", "percentile", "entropy")
Pixels = npt.NDArray[np.uint8]
Weights = dict[str, npt.NDArray[np.float64]]

# Layers hold weights; they are what is counted, and what may be left in float. The other operators
# only carry integers on, so that the values between two layers need not become floats again.
LAYERS = ("Conv", "Gemm", "MatMul")
_CARRIERS = ("Add", "AveragePool", "Clip", "Concat", "GlobalAveragePool", "MaxPool", "Relu")

# Without these instructions a product of uint8 and int8 is summed in pairs in 16 bits, which
# overflow: 255 * 127 * 2 is more than 32,767. Weights of 7 bits cannot overflow.
_WIDE_SUMS = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "asimd")
_CALIBRATION_BATCH = 8

_METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "percentile": CalibrationMethod.Percentile,
    "entropy": CalibrationMethod.Entropy,
}


@dataclass(frozen=True, slots=True)
class Int8Settings:
    """One way to quantize a model."""

    calibration: Calibration = "minmax"
    reduce_range: bool = False  # weights of 7 bits
    bias_corrected: bool = False
    float_layers: tuple[str, ...] = ()


def needs_reduced_range() -> bool:
    """Return whether this processor's int8 kernels overflow with weights of 8 bits."""
    return not set(instruction_set().split("+")) & set(_WIDE_SUMS)


class StaticQuantizer:
    """A float32 model and its calibration images; what is computed once is kept in `folder`."""

    def __init__(self, model: bytes, images: Pixels, folder: Path) -> None:
        """Prepare the model: shapes inferred, constants folded.

        Args:
            model: float32 ONNX; it takes "images", uint8 (batch, H, W, 3).
            images: to calibrate on, uint8 (N, H, W, 3).
            folder: for files in between; the caller removes it.

        Raises:
            ModelError: onnxruntime cannot prepare it, or there is nothing to quantize in it.
        """
        self._images, self._folder = images, folder
        (folder / "float.onnx").write_bytes(model)
        with _quiet():
            try:
                quant_pre_process(
                    folder / "float.onnx", folder / "prepared.onnx", skip_symbolic_shape=True
                )
            # onnxruntime's exceptions have no common base but Exception.
            except Exception as error:  # noqa: BLE001
                raise ModelError(_sentence("prepared for int8", error)) from error
        self._prepared = onnx.load(folder / "prepared.onnx")
        self.layers = weighted_layers(self._prepared)
        if not self.layers:
            raise ModelError(
                "a model must have convolutions or matrix products with weights to be quantized. "
                "This one has none."
            )
        self._rounded: dict[tuple[Calibration, bool], Weights] = {}
        self._means: Weights = {}

    def quantized(self, settings: Int8Settings) -> bytes:
        """Return the model in int8, but for `settings.float_layers`."""
        model = self._prepared
        if settings.bias_corrected:
            model = self._bias_corrected(settings)
        return self._quantize(model, settings, excluded=settings.float_layers)

    def quantized_alone(self, layer: str, settings: Int8Settings) -> bytes:
        """Return the model in float32, but for one layer: to see what its rounding does."""
        return self._quantize(self._prepared, settings, only=layer)

    def _quantize(
        self,
        model: onnx.ModelProto,
        settings: Int8Settings,
        *,
        excluded: Sequence[str] = (),
        only: str = "",
    ) -> bytes:
        out = self._folder / "int8.onnx"
        with _quiet():
            try:
                quantize_static(
                    onnx.ModelProto.FromString(model.SerializeToString()),  # it changes its input
                    out,
                    _Batches(self._images),
                    quant_format=QuantFormat.QDQ,
                    op_types_to_quantize=[*LAYERS, *_CARRIERS],
                    nodes_to_quantize=[only] if only else [],
                    nodes_to_exclude=list(excluded),
                    per_channel=True,
                    reduce_range=settings.reduce_range,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                    calibrate_method=_METHODS[settings.calibration],
                    # Ranges depend on the images alone, and are found once for each method.
                    extra_options={"CalibStridedMinMax": _stride(len(self._images))},
                    calibration_cache_path=self._folder / f"ranges-{settings.calibration}.json",
                )
            except Exception as error:  # noqa: BLE001  # as above
                raise ModelError(_sentence("quantized", error)) from error
        int8 = onnx.load(out)
        _with_float_logits(int8)
        others = [layer for layer in self.layers if layer != only]
        _keep_in_float(int8, others if only else excluded)
        return bytes(int8.SerializeToString())

    def _bias_corrected(self, settings: Int8Settings) -> onnx.ModelProto:
        key = (settings.calibration, settings.reduce_range)
        if key not in self._rounded:
            whole = onnx.ModelProto.FromString(self.quantized(Int8Settings(*key)))
            self._rounded[key] = dequantized_weights(whole)
        if not self._means:
            self._means = input_means(self._prepared, self._images)
        return correct_biases(
            self._prepared, self._rounded[key], self._means, but=settings.float_layers
        )


def quantized_dynamically(model: bytes, folder: Path) -> tuple[bytes, int]:
    """Return the model with weights of Conv, Gemm and MatMul in 8 bits, and how many there are.

    Activations are rounded as they come, each time with a scale found anew, which costs time, and
    no operators are fused: for networks of convolutions `StaticQuantizer` gives smaller errors and
    more speed.

    Raises:
        ModelError: onnxruntime cannot quantize it.
    """
    source, out = folder / "float.onnx", folder / "dynamic.onnx"
    source.write_bytes(model)
    with _quiet():
        try:
            quant_pre_process(source, folder / "prepared.onnx", skip_symbolic_shape=True)
            quantize_dynamic(
                folder / "prepared.onnx",
                out,
                op_types_to_quantize=list(LAYERS),
                weight_type=QuantType.QUInt8,  # onnxruntime has no integer convolution of int8
                reduce_range=needs_reduced_range(),
            )
        except Exception as error:  # noqa: BLE001  # as above
            raise ModelError(_sentence("quantized", error)) from error
    return out.read_bytes(), len(weighted_layers(onnx.load(folder / "prepared.onnx")))


def weighted_layers(model: onnx.ModelProto) -> tuple[str, ...]:
    """Return the names of the nodes that multiply by weights, in the order of the graph."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return tuple(
        node.name
        for node in model.graph.node
        if node.op_type in LAYERS and len(node.input) > 1 and node.input[1] in weights
    )


def correct_biases(
    model: onnx.ModelProto, rounded: Weights, means: Weights, but: Sequence[str] = ()
) -> onnx.ModelProto:
    """Return `model` with convolutions' biases moved against what rounding their weights does.

    On average, that is: an output channel's mean moves by the sum over its inputs of (rounded -
    weight) times the mean of that input. Border effects of padding are left out.

    Source: Nagel et al. 2019, arXiv:1906.04721, section 4.2; means are taken from images here.

    Args:
        rounded: weights as their integers give them back, by name, (out, in / groups, kh, kw).
        means: of each convolution's input, by name, (in,).
        but: layers that are not rounded.
    """
    changed = onnx.ModelProto.FromString(model.SerializeToString())
    tensors = {tensor.name: tensor for tensor in changed.graph.initializer}
    uses = Counter(name for node in changed.graph.node for name in node.input)
    for node in changed.graph.node:
        if node.op_type != "Conv" or node.input[1] not in rounded or node.name in but:
            continue
        if len(node.input) > 2 and uses[node.input[2]] > 1:
            continue  # a bias for two layers has no one right value
        weight = numpy_helper.to_array(tensors[node.input[1]])
        error = (rounded[node.input[1]] - weight).sum(axis=(2, 3))
        mean = means[node.input[0]]
        groups = len(mean) // weight.shape[1]
        of_output = np.repeat(np.arange(groups), len(weight) // groups)
        moved = (error * mean.reshape(groups, -1)[of_output]).sum(axis=1)
        if len(node.input) > 2:
            bias = tensors[node.input[2]]
            moved = moved - numpy_helper.to_array(bias)
        else:
            bias = changed.graph.initializer.add()
            bias.name = f"{node.name}_bias"
            node.input.append(bias.name)
        bias.CopyFrom(numpy_helper.from_array((-moved).astype(np.float32), bias.name))
    return changed


def input_means(model: onnx.ModelProto, images: Pixels) -> Weights:
    """Return the mean of each channel of every convolution's input, over images and places."""
    probed = onnx.ModelProto.FromString(model.SerializeToString())
    names = sorted({node.input[0] for node in model.graph.node if node.op_type == "Conv"})
    outputs = []
    for number, name in enumerate(names):
        outputs.append(f"fieldmark_mean_{number}")
        probed.graph.node.append(onnx.helper.make_node("GlobalAveragePool", [name], outputs[-1:]))
        probed.graph.output.append(
            onnx.helper.make_tensor_value_info(outputs[-1], onnx.TensorProto.FLOAT, None)
        )
    if not names:
        return {}
    session = open_session(probed.SerializeToString(), "the model with its means")
    sums: list[npt.NDArray[np.float64]] = [np.zeros(()) for _ in names]
    for start in range(0, len(images), _CALIBRATION_BATCH):
        found = session.run(outputs, {"images": images[start : start + _CALIBRATION_BATCH]})
        of_batch = (means[:, :, 0, 0].astype(np.float64).sum(axis=0) for means in found)
        sums = [total + more for total, more in zip(sums, of_batch, strict=True)]
    return {name: total / len(images) for name, total in zip(names, sums, strict=True)}


def dequantized_weights(rounded: onnx.ModelProto) -> Weights:
    """Return convolutions' weights by their float name, as the integers give them back."""
    tensors = {tensor.name: tensor for tensor in rounded.graph.initializer}
    found = {}
    for node in rounded.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in tensors:
            continue
        values, scales = (numpy_helper.to_array(tensors[name]) for name in node.input[:2])
        if values.ndim == 4 and scales.ndim == 1:  # symmetric: the zero point is 0
            name = node.input[0].removesuffix("_quantized")
            found[name] = values.astype(np.float64) * scales.reshape(-1, 1, 1, 1)
    return found


def _with_float_logits(model: onnx.ModelProto) -> None:
    """Remove the rounding of the logits: 256 steps between them would only lose ties.

    A feature map stays rounded, because what comes after it works on the integers.
    """
    nodes = {node.output[0]: node for node in model.graph.node}
    last = nodes.get("logits")
    before = nodes.get(last.input[0]) if last is not None else None
    if last is None or before is None or last.op_type != "DequantizeLinear":
        return
    if sum(before.output[0] in node.input for node in model.graph.node) > 1:
        return
    rounded = before.input[0]
    model.graph.node.remove(last)
    model.graph.node.remove(before)
    nodes[rounded].output[0] = "logits"


def _keep_in_float(model: onnx.ModelProto, layers: Sequence[str]) -> None:
    """Put a maximum of one value in front of layers that are to stay in float.

    When onnxruntime opens a file, it quantizes the weights of a layer between two rounded tensors
    by itself, with one scale for all channels and full range. It looks for the tensor in front.
    """
    for index, node in reversed(list(enumerate(model.graph.node))):
        if node.name in layers:
            through = f"{node.name}_in_float"
            guard = onnx.helper.make_node("Max", [node.input[0]], [through], name=through)
            node.input[0] = through
            model.graph.node.insert(index, guard)


class _Batches(CalibrationDataReader):
    """Gives images in turn; a part of them at a time, so that not all activations are held."""

    def __init__(self, images: Pixels) -> None:
        self._images = images
        self._next, self._end = 0, len(images)

    def __len__(self) -> int:
        return len(self._images)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._next, self._end = start_index, end_index

    def get_next(self) -> dict[str, Pixels] | None:
        if self._next >= self._end:
            return None
        start, self._next = self._next, min(self._end, self._next + _CALIBRATION_BATCH)
        return {"images": self._images[start : self._next]}


def _stride(num_images: int) -> int:
    """Return the largest part of so many images, up to a few batches, that divides them."""
    most = min(num_images, 4 * _CALIBRATION_BATCH)
    return next(size for size in range(most, 0, -1) if num_images % size == 0)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the quantizer's advice and prints; its errors are exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Yield a folder for the files in between."""
    with tempfile.TemporaryDirectory(prefix="fieldmark-int8-") as folder:
        yield Path(folder)


def _sentence(what: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:200].rstrip(".")
    return f"the model cannot be {what}. {type(error).__name__}: {reason}."

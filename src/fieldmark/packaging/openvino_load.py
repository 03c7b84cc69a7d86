"""Opening a package's OpenVINO variant. Torch-free; needs the extra `openvino`."""

import sys
import threading
from typing import Any

import numpy as np
import numpy.typing as npt

from fieldmark.errors import PackageError, require
from fieldmark.measure import Predict
from fieldmark.packaging.load import check_images
from fieldmark.packaging.manifest import Package
from fieldmark.runtime.cpu import num_cores

_IR_START = b"<?xml"


def open_openvino(package: Package, variant: str = "openvino", threads: int = 0) -> Predict:
    """Return the variant as a Predict on the CPU, opened from bytes that match their checksums.

    Args:
        threads: within one image batch; 0 takes the cores this process may use.

    Raises:
        MissingDependency: OpenVINO is not installed.
        PackageError: there is no such variant, or the model cannot be opened or does not fit.
        IntegrityError: a file is missing, truncated or altered.
    """
    require("openvino", "openvino", f"variant {variant!r}")
    entry = package.variant(variant, "openvino")
    graph, weights = (package.read(file) for file in entry.files)
    name = str(package.path / entry.file)
    spec = package.preprocess
    compiled = compile_ir(graph, weights, name, threads)
    _check_ends(compiled, package, name)
    run = run_with(compiled)

    def predict(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        check_images(images, spec.height_px, spec.width_px)
        return run(images)

    return predict


def import_openvino() -> Any:
    """Return OpenVINO, imported without openvino_telemetry.

    With it, each import would report itself to a server, and without a connection wait for one.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino
    import openvino.opset13
    import openvino.passes

    return openvino


def compile_ir(graph: bytes, weights: bytes, name: str, threads: int = 0) -> Any:
    """Return OpenVINO's compiled model; `name` stands for it in errors.

    Raises:
        PackageError: OpenVINO cannot open it.
    """
    openvino = import_openvino()
    settings = {
        # Its default may be bfloat16, where the processor has it: other logits than recorded.
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads or num_cores(),
        "NUM_STREAMS": 1,
    }
    version = openvino.__version__.partition("-")[0]
    reason = "It does not begin as XML does."
    # OpenVINO tries all the formats it knows, and some of them refer to other files.
    if graph.startswith(_IR_START):
        core = openvino.Core()
        try:
            return core.compile_model(core.read_model(graph, weights), "CPU", settings)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200] + "."
    raise PackageError(f"{name} must be IR that openvino {version} can open. {reason}")


def run_with(compiled: Any) -> Predict:
    """Return a compiled model as a Predict that threads may share: one at a time runs."""
    request, lock = compiled.create_infer_request(), threading.Lock()

    def run(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        with lock:
            logits: npt.NDArray[np.float32] = request.infer([np.ascontiguousarray(images)])[0]
        return logits

    return run


def _check_ends(compiled: Any, package: Package, name: str) -> None:
    spec, num_classes = package.preprocess, len(package.class_names)
    wanted = (
        ["?", str(spec.height_px), str(spec.width_px), "3", "uint8"],
        ["?", str(num_classes), "float32"],
    )
    ends = [*compiled.inputs, *compiled.outputs]
    found = tuple(
        [*map(str, end.get_partial_shape()), str(end.get_element_type().to_dtype())] for end in ends
    )
    if found != wanted:
        shown = " and ".join(f"{end[-1]} ({', '.join(end[:-1])})" for end in found)
        raise PackageError(
            f"{name} must take uint8 (batch, {spec.height_px}, {spec.width_px}, 3) and give "
            f"float32 (batch, {num_classes}), for any batch. Got {shown or 'nothing'}. "
            f"Run: fieldmark export {package.path} --to openvino."
        )

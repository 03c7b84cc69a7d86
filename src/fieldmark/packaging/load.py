"""Opening a package's ONNX model with onnxruntime. Torch-free."""

import re
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from fieldmark.errors import ConfigError, PackageError
from fieldmark.measure import Predict
from fieldmark.packaging.entries import Variant
from fieldmark.packaging.manifest import Package
from fieldmark.runtime.cpu import num_cores

Device = Literal["cpu", "cuda"]
PROVIDERS: dict[Device, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

_LOG_ERRORS_ONLY = 3

# A tensor whose values lie in another file has an entry with the key "location": a length of 8,
# in one byte or padded to several, then the word. Such a file would escape the checksum, and
# onnxruntime, given bytes, looks for it in the working directory (some versions follow absolute
# paths too), so a model with that entry is refused before onnxruntime sees it.
_EXTERNAL_DATA = re.compile(rb"[\x00\x08]location")


def open_onnx(
    package: Package, variant: str = "onnx", threads: int = 0, device: Device = "cpu"
) -> Predict:
    """Return the variant as a Predict, opened from bytes that match their checksum.

    Args:
        threads: within one operator; 0 takes the cores this process may use.
        device: where it runs.

    Raises:
        PackageError: there is no such variant, or the model cannot be opened or does not fit.
        IntegrityError: the file is missing, truncated or altered.
    """
    session, names = open_checked(package, package.variant(variant, "onnx"), threads, device)
    spec = package.preprocess

    def predict(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        check_images(images, spec.height_px, spec.width_px)
        logits: npt.NDArray[np.float32] = session.run(
            names[1:2], {names[0]: np.ascontiguousarray(images)}
        )[0]
        return logits

    return predict


def open_checked(
    package: Package, entry: Variant, threads: int = 0, device: Device = "cpu"
) -> tuple[ort.InferenceSession, list[str]]:
    """Return an ONNX variant's session and the names of its input and its outputs, in order.

    Raises:
        PackageError: it cannot be opened, or its input and outputs are not those recorded.
        IntegrityError: the file is missing, truncated or altered.
    """
    where = str(package.path / entry.file)
    session = open_session(package.read(entry.file), where, threads, device)
    _check_ends(session, package, entry)
    return session, [end.name for end in (*session.get_inputs(), *session.get_outputs())]


def open_session(
    model: bytes, name: str, threads: int = 0, device: Device = "cpu"
) -> ort.InferenceSession:
    """Return an onnxruntime session on a device; `name` stands for the model in errors.

    Raises:
        PackageError: the model refers to another file, or onnxruntime cannot open it there.
    """
    if _EXTERNAL_DATA.search(model):
        raise PackageError(
            f"{name} must hold all of its weights. It refers to external data, which no checksum "
            "covers. Export it anew as a single file."
        )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or num_cores()
    options.inter_op_num_threads = 1
    options.log_severity_level = _LOG_ERRORS_ONLY
    # Spinning threads gain at most 5 % (a ResNet-18, 2 cores), and between the requests of a
    # lightly loaded service they burn seven times the CPU that the work takes.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Without this, bytes that look like onnxruntime's own format would be taken for it.
    options.add_session_config_entry("session.load_model_format", "ONNX")
    provider = PROVIDERS[device]
    try:
        session = ort.InferenceSession(model, options, providers=[provider])
        session.disable_fallback()  # a failure of CUDA is told, not answered by the CPU
    # onnxruntime's exceptions have no common base but Exception.
    except Exception as error:  # noqa: BLE001
        reason = " ".join(str(error).split())[:200]
        raise PackageError(
            f"{name} must be a model that onnxruntime {ort.__version__} can open. {reason}."
        ) from error
    # A provider whose libraries or device are missing is left out with no more than a warning.
    if session.get_providers()[0] != provider:
        raise PackageError(
            f"{name} must run on {device}. onnxruntime {ort.__version__} could not start there "
            "(a library of CUDA or cuDNN, or the device, is missing). Use --device cpu."
        )
    return session


def choose_device(asked: str) -> Device:
    """Return the device that was asked for; auto: cuda where onnxruntime was built for it.

    Raises:
        ConfigError: it is no device, or this onnxruntime was not built for it.
    """
    available = ort.get_available_providers()
    if asked == "auto":
        return "cuda" if PROVIDERS["cuda"] in available else "cpu"
    if asked not in PROVIDERS:
        raise ConfigError(f"device must be auto, cpu or cuda. Got {asked!r}.")
    device: Device = "cuda" if asked == "cuda" else "cpu"
    if PROVIDERS[device] not in available:
        raise ConfigError(
            f"device must be one that onnxruntime {ort.__version__} was built for. Got {device}. "
            "Install onnxruntime-gpu in place of onnxruntime, or use --device cpu."
        )
    return device


def _check_ends(session: ort.InferenceSession, package: Package, variant: Variant) -> None:
    spec = package.preprocess
    height, width, num_classes = spec.height_px, spec.width_px, len(package.class_names)
    features = [list(output.shape[1:]) for output in variant.outputs[1:]]
    wanted = (
        [("tensor(uint8)", [height, width, 3])],
        [("tensor(float)", shape) for shape in ([num_classes], *features)],
    )
    inputs, outputs = session.get_inputs(), session.get_outputs()
    found = tuple([(x.type, list(x.shape[1:])) for x in end] for end in (inputs, outputs))
    if found != wanted or any(isinstance(x.shape[0], int) for x in (*inputs, *outputs)):
        raise PackageError(
            f"{package.path / variant.file} must take uint8 (batch, {height}, {width}, 3) and "
            f"give float32 (batch, {num_classes}){' and the features' * len(features)}, for any "
            "batch. "
            f"Got {_shown(inputs)} and {_shown(outputs)}. "
            f"Run: fieldmark export {package.path} --to onnx."
        )


def check_images(images: npt.NDArray[np.uint8], height_px: int, width_px: int) -> None:
    """Raise ValueError unless images are uint8 (B, height_px, width_px, 3) with B > 0."""
    if images.dtype != np.uint8 or images.shape[1:] != (height_px, width_px, 3) or not len(images):
        raise ValueError(
            f"images must be uint8 (B, {height_px}, {width_px}, 3) with B > 0. "
            f"Got {images.dtype} {images.shape}."
        )


def _shown(ends: list[ort.NodeArg]) -> str:
    return ", ".join(f"{x.name}: {x.type} {x.shape}" for x in ends) or "nothing"

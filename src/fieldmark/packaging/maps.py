"""Opening an ONNX variant that gives its features, for exact class maps. Torch-free."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from fieldmark.errors import PackageError
from fieldmark.measure import class_maps
from fieldmark.packaging.load import Device, check_images, open_checked
from fieldmark.packaging.manifest import WEIGHTS, Package
from fieldmark.preprocess import Preprocess

Floats = npt.NDArray[np.float32]
_LENGTH_BYTES = 8  # of the header, in front of it
_DTYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}


@dataclass(frozen=True, slots=True)
class MapModel:
    """A model that says what it sees, and where. Safe to share between threads."""

    session: ort.InferenceSession
    names: tuple[str, str, str]  # of the input, the logits and the features
    preprocess: Preprocess
    weight: Floats  # (K, C), of the head
    bias: Floats  # (K,)

    def run(self, images: npt.NDArray[np.uint8]) -> tuple[Floats, Floats]:
        """Return logits (B, K) and features (B, C, h, w) of images uint8 (B, H, W, 3)."""
        check_images(images, self.preprocess.height_px, self.preprocess.width_px)
        source, *outputs = self.names
        logits, features = self.session.run(outputs, {source: np.ascontiguousarray(images)})
        return logits, features

    def maps(self, features: Floats, classes: Sequence[int]) -> Floats:
        """Return the maps (B, len(classes), h, w) of some classes, by the index of their logit.

        A map's mean over h and w is the logit (of int8 up to its rounding), so that parts above
        and below say what spoke for the class and what against it.
        """
        chosen = list(classes)
        return class_maps(features, self.weight[chosen], self.bias[chosen])


def open_maps(
    package: Package, variant: str = "onnx", threads: int = 0, device: Device = "cpu"
) -> MapModel:
    """Return an ONNX variant with its second output, opened from bytes that match their checksum.

    Args:
        threads: within one operator; 0 takes the cores this process may use.
        device: where it runs.

    Raises:
        PackageError: there is no such variant, it gives no features, or it does not fit.
        IntegrityError: a file is missing, truncated or altered.
    """
    entry = package.variant(variant, "onnx")
    if entry.head is None or len(entry.outputs) < 2:
        raise PackageError(
            f"variant {variant!r} of {package.path} must give its features for class maps. It "
            f"does not. Run: fieldmark export {package.path} --features."
        )
    session, (source, logits, features) = open_checked(package, entry, threads, device)
    num_classes, channels = len(package.class_names), entry.outputs[1].shape[1]
    weights = package.read(WEIGHTS)
    weight = read_tensor(weights, entry.head.weight, str(package.path / WEIGHTS))
    bias = np.zeros(num_classes, np.float32)
    if entry.head.bias:
        bias = read_tensor(weights, entry.head.bias, str(package.path / WEIGHTS))
    if weight.shape != (num_classes, channels) or bias.shape != (num_classes,):
        raise PackageError(
            f"the head in {package.path / WEIGHTS} must have the shapes ({num_classes}, "
            f"{channels}) and ({num_classes},). Got {weight.shape} and {bias.shape}. "
            f"Run: fieldmark export {package.path} --features."
        )
    return MapModel(session, (source, logits, features), package.preprocess, weight, bias)


def read_tensor(data: bytes, name: str, where: str) -> Floats:
    """Return one tensor of a safetensors file as float32; `where` names the file in errors.

    The format is eight bytes with the length of a JSON header, the header, and the values.

    Raises:
        PackageError: the file is not of that format, or has no such tensor of floats.
    """
    try:
        start = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "little")
        entry = json.loads(data[_LENGTH_BYTES:start])[name]
        first, last = entry["data_offsets"]
        values = np.frombuffer(data[start + first : start + last], _DTYPES[entry["dtype"]])
        return values.reshape(entry["shape"]).astype(np.float32)
    except (ValueError, KeyError, TypeError) as error:
        raise PackageError(
            f"{where} must hold the floats {name!r} in safetensors. It does not "
            f"({type(error).__name__}). Write the package anew."
        ) from error

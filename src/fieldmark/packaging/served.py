"""Opening the variants that need no torch. Torch-free."""

from importlib.util import find_spec

from fieldmark.errors import ConfigError, PackageError
from fieldmark.measure import Predict
from fieldmark.packaging.entries import VariantKind
from fieldmark.packaging.load import Device, open_onnx
from fieldmark.packaging.manifest import Package
from fieldmark.packaging.openvino_load import open_openvino

SERVED: tuple[VariantKind, ...] = ("onnx", "openvino")


def can_open(kind: str) -> bool:
    """Return whether this installation opens such variants without torch."""
    return kind == "onnx" or (kind == "openvino" and find_spec("openvino") is not None)


def open_served(package: Package, name: str, threads: int = 0, device: Device = "cpu") -> Predict:
    """Return an ONNX or OpenVINO variant as a Predict.

    Args:
        threads: within one operator; 0 takes the cores this process may use.
        device: where it runs; an OpenVINO variant on the CPU alone.

    Raises:
        PackageError: the variant needs torch, cannot be opened, does not fit, or is not there
            although it has the name of a format.
        UnknownName: there is no such variant.
        ConfigError: the variant does not run on the device.
        MissingDependency: OpenVINO is needed, and not installed.
        IntegrityError: a file is missing, truncated or altered.
    """
    variant = package.manifest.variants.get(name)
    kind = name if variant is None else variant.kind
    if kind == "openvino":
        if device != "cpu":
            raise ConfigError(
                f"variant {name!r} must run on the cpu, as OpenVINO's do here. Got {device}. "
                "Choose an ONNX variant, or --device cpu."
            )
        return open_openvino(package, name, threads)
    if variant is not None and kind not in SERVED:
        raise PackageError(
            f"variant {name!r} of {package.path} must be {' or '.join(SERVED)} to run without "
            f"torch. Got {kind}. Run: fieldmark export {package.path}."
        )
    return open_onnx(package, name, threads, device)

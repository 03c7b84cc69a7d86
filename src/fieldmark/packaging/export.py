"""A trained module -> another format, which runs without its Python code.

Each format has an exporter of its own; all of them give an `Exported`, which was run beside the
module. The input is always "images", uint8 (batch, H, W, 3); the output "logits", float32
(batch, K).
"""

from collections.abc import Callable

from fieldmark.errors import ConfigError, UnknownName
from fieldmark.model import InferenceModule
from fieldmark.packaging.entries import VariantKind
from fieldmark.packaging.export_onnx import MAX_ONNX_BYTES, OPSET, export_onnx
from fieldmark.packaging.export_openvino import export_openvino
from fieldmark.packaging.export_parts import Exported
from fieldmark.packaging.export_torch import export_pt2, export_torchscript

_EXPORTERS: dict[VariantKind, Callable[[InferenceModule, int, int], Exported]] = {
    "onnx": export_onnx,
    "torchscript": export_torchscript,
    "pt2": export_pt2,
    "openvino": export_openvino,
}
FORMATS = tuple(_EXPORTERS)
# What to tell whoever chooses a format.
NOTES: dict[VariantKind, str] = {
    "torchscript": "torch deprecates TorchScript; ONNX is the format to prefer",
    "pt2": "torch does not promise to read .pt2 files in later versions: keep none in an archive",
}


def export_module(
    module: InferenceModule,
    to: VariantKind,
    height_px: int,
    width_px: int,
    *,
    features: bool = False,
) -> Exported:
    """Return `module` in the format `to`.

    Args:
        features: whether to give the last feature map as a second output, which ONNX alone does.

    Raises:
        UnknownName: no such format.
        ConfigError: features in a format other than ONNX.
        ModelError: the network cannot be exported, or answers differently.
        MissingDependency: OpenVINO is not installed.
    """
    if to not in _EXPORTERS:
        raise UnknownName.among("export format", to, FORMATS)
    if not features:
        return _EXPORTERS[to](module, height_px, width_px)
    if to != "onnx":
        raise ConfigError(
            f"--features must be given with --to onnx. Got {to}, of which the service reads no "
            "features. Leave one of them out."
        )
    return export_onnx(module, height_px, width_px, features=True)


__all__ = [
    "FORMATS",
    "MAX_ONNX_BYTES",
    "NOTES",
    "OPSET",
    "Exported",
    "export_module",
    "export_onnx",
    "export_openvino",
    "export_pt2",
    "export_torchscript",
]

"""The ONNX exporter: one file, simplified and checked, for batches of any size."""

from collections.abc import Callable

import onnx
import torch
from torch import Tensor, nn

from fieldmark.errors import ModelError
from fieldmark.model import FeatureModule, InferenceModule
from fieldmark.packaging.entries import Features, HeadEntry
from fieldmark.packaging.export_parts import (
    Exported,
    Outputs,
    check_batches,
    example_images,
    export_sentence,
    quiet,
)
from fieldmark.packaging.load import open_session
from fieldmark.packaging.simplify import describe_graph, simplify

OPSET = 20  # what torch's exporter is written for; onnxruntime 1.17 and later run it
MAX_ONNX_BYTES = 2**31 - 2**24  # a protobuf ends at 2 GiB; the graph itself takes some of it


class _Graph(nn.Module):
    """What is exported. Its network takes contiguous images, as no eager one does.

    Images that were only permuted are channels_last, and the decompositions of some operators
    then contain gathers that restore the strides: nothing that a graph needs.
    """

    def __init__(self, module: InferenceModule, run: Callable[[Tensor], Outputs]) -> None:
        super().__init__()
        self.module, self.run = module, run

    def forward(self, images: Tensor) -> Outputs:
        return self.run(self.module.normalised(images).contiguous())


def export_onnx(
    module: InferenceModule, height_px: int, width_px: int, *, features: bool = False
) -> Exported:
    """Return `module` as one ONNX file that takes batches of any size.

    Its input is "images", uint8 (batch, height_px, width_px, 3); its output "logits", float32
    (batch, K). The module is put in eval mode. The result was run, for batches of 1, 2 and 3.

    Args:
        features: whether to give a second output, "features", float32 (batch, C, h, w).

    Raises:
        ModelError: torch cannot export the network, what it exports answers differently, or
            no class maps follow from its features.
    """
    size = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    if size > MAX_ONNX_BYTES:
        raise ModelError(
            f"weights must be at most {MAX_ONNX_BYTES} bytes for a single ONNX file. Got {size}."
        )
    example = example_images(module, 2, height_px, width_px)  # torch.export freezes sizes of 1
    mapped = FeatureModule(module.eval(), example) if features else None

    def run_network(x_BCHW: Tensor) -> Outputs:
        return (module.network(x_BCHW).to(torch.float32),)

    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                _Graph(module, mapped.run if mapped else run_network).eval(),
                (example,),
                dynamo=True,
                external_data=False,
                opset_version=OPSET,
                input_names=["images"],
                output_names=["logits", "features"] if features else ["logits"],
                dynamic_shapes=({0: "batch"},),
                verbose=False,
            )
        if program is None:  # what the signature allows for the exporter without dynamo
            raise ModelError("torch.onnx.export must return a program. Got None.")
        proto = program.model_proto
        simplify(proto)
        onnx.checker.check_model(proto, full_check=True)
    except (torch.onnx.OnnxExporterError, onnx.checker.ValidationError, ValueError) as error:
        raise ModelError(export_sentence(module, "ONNX", error)) from error
    data: bytes = proto.SerializeToString()
    session = open_session(data, "the exported model")

    def run(images: Tensor) -> Outputs:
        found = session.run(None, {"images": images.cpu().numpy()})
        return tuple(torch.from_numpy(output) for output in found)

    def eager(images: Tensor) -> Outputs:
        return (module(images),) if mapped is None else mapped(images)

    check_batches(module, eager, run, "ONNX", height_px, width_px)
    return Exported(
        data,
        describe_graph(proto),
        f"torch {torch.__version__}",
        opset=OPSET,
        features=None if mapped is None else _features(mapped, example),
    )


def _features(mapped: FeatureModule, example: Tensor) -> Features:
    with torch.no_grad():
        _, channels, height, width = mapped(example)[1].shape
    head = HeadEntry(weight=mapped.weight_name, bias=mapped.bias_name)
    return Features((channels, height, width), head)

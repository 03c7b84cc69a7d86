"""Exports of real networks: one file, any batch size, nothing of this machine in it."""

import io

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from packaging_data import SPEC, Made, draw_pixels, make_network
from torch import Tensor, nn

import fieldmark.packaging.export_onnx as export_room
from fieldmark.errors import ModelError
from fieldmark.model import InferenceModule
from fieldmark.packaging.entries import VariantKind
from fieldmark.packaging.export import (
    FORMATS,
    export_module,
    export_onnx,
    export_openvino,
    export_pt2,
    export_torchscript,
)
from fieldmark.packaging.openvino_load import compile_ir, run_with


def _difference(data: bytes, module: nn.Module, height_px: int, width_px: int) -> float:
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    largest = 0.0
    for batch_size in (1, 2, 3, 7):
        images = np.random.default_rng(batch_size).integers(
            0, 256, size=(batch_size, height_px, width_px, 3), dtype=np.uint8
        )
        with torch.no_grad():
            expected = module(torch.from_numpy(images)).numpy()
        found = session.run(["logits"], {"images": images})[0]
        largest = max(largest, float(np.abs(found - expected).max() / np.abs(expected).max()))
    return largest


def test_onnx_is_one_file_with_the_stated_ends(made: Made) -> None:
    model = onnx.load_from_string(made.onnx)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    session = ort.InferenceSession(made.onnx, providers=["CPUExecutionProvider"])
    (images,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (images.name, images.type, images.shape) == (
        "images",
        "tensor(uint8)",
        ["batch", 32, 32, 3],
    )
    assert (logits.name, logits.type, logits.shape) == ("logits", "tensor(float)", ["batch", 5])
    assert _difference(made.onnx, made.module, 32, 32) < 1e-5
    assert made.exported["onnx"].opset == 20


@pytest.mark.parametrize("format_name", FORMATS)
def test_nothing_of_this_machine_is_in_the_file(made: Made, format_name: VariantKind) -> None:
    data = made.exported[format_name].data + made.exported[format_name].weights
    for trace in (b"site-packages", b"/home/", b".venv", b"stack_trace"):
        assert trace not in data


@pytest.mark.parametrize(
    ("name", "side_px", "args"),
    [
        pytest.param("test_vit", 32, {"img_size": 32}, marks=pytest.mark.slow),
        pytest.param("test_efficientnet", 64, {}, marks=pytest.mark.slow),
        pytest.param("test_convnext", 64, {}, marks=pytest.mark.slow),
        pytest.param("resnet18", 64, {}, marks=pytest.mark.slow),
        pytest.param("airnet", 32, {}, marks=pytest.mark.slow),
        pytest.param("small_resnet18", 32, {}, marks=pytest.mark.slow),
    ],
)
def test_networks_agree_with_eager(name: str, side_px: int, args: dict[str, int]) -> None:
    module = InferenceModule(make_network(name, **args), SPEC.mean, SPEC.std)
    onnx_data = export_onnx(module, side_px, side_px).data
    assert _difference(onnx_data, module, side_px, side_px) < 1e-5


class _FrozenBatch(nn.Module):
    """Right for a batch of two, which is what exporters see."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3)) / float(x.shape[0])


class _Coin(nn.Module):
    """Its path depends on a value, which no graph can hold."""

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:
            return x.mean(dim=(2, 3))
        return x.amax(dim=(2, 3))


def test_a_batch_size_frozen_into_the_graph_is_an_error() -> None:
    module = InferenceModule(_FrozenBatch(), SPEC.mean, SPEC.std)
    for export in (export_torchscript, export_pt2):
        with pytest.raises(ModelError, match="_FrozenBatch"):
            export(module, 8, 8)


def test_an_onnx_graph_that_answers_differently_is_an_error() -> None:
    class Training(nn.Module):
        """Another answer each time it is called, as with dropout that stays on."""

        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            return x.mean(dim=(2, 3)) + float(type(self).calls)

    module = InferenceModule(Training(), SPEC.mean, SPEC.std)
    with pytest.raises(ModelError, match=r"Training in ONNX must give the logits"):
        export_onnx(module, 8, 8)


def test_a_network_that_cannot_be_exported_is_one_sentence() -> None:
    module = InferenceModule(_Coin(), SPEC.mean, SPEC.std)
    for name, export in (("ONNX", export_onnx), ("pt2", export_pt2), ("ONNX", export_openvino)):
        with pytest.raises(
            ModelError, match=rf"_Coin cannot be exported to {name}. \w+: "
        ) as caught:
            export(module, 8, 8)
        assert len(str(caught.value)) < 400
        assert "\n" not in str(caught.value)


def test_weights_that_no_single_file_holds_are_refused(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_room, "MAX_ONNX_BYTES", 1_000_000)
    with pytest.raises(ModelError, match="weights must be at most 1000000 bytes"):
        export_onnx(made.module, 32, 32)


@pytest.mark.slow
def test_a_module_in_training_mode_with_unequal_sides_is_exported_in_eval_mode_in_silence(
    capfd: pytest.CaptureFixture[str],
) -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        network[0].running_mean.fill_(0.5)
    module = InferenceModule(network, SPEC.mean, SPEC.std)
    module.train()
    exported = {name: export_module(module, name, 8, 24) for name in FORMATS}
    assert not module.training
    assert _difference(exported["onnx"].data, module, 8, 24) < 1e-5
    assert capfd.readouterr() == ("", "")
    images = torch.randint(0, 256, (3, 8, 24, 3), dtype=torch.uint8)
    with pytest.warns(FutureWarning, match="torch.jit"):
        loaded = torch.jit.load(io.BytesIO(exported["torchscript"].data))
    torch.testing.assert_close(loaded(images), module(images))


@pytest.mark.slow
@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.ReLU()])
def test_openvino_keeps_an_activation_behind_a_pooling(activation: nn.Module) -> None:
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 8, 3)
    with torch.no_grad():
        convolution.bias.sub_(1.0)  # into the part where most of them decrease
    pooled = nn.Sequential(convolution, nn.MaxPool2d(2), activation)
    network = nn.Sequential(pooled, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    module = InferenceModule(network, SPEC.mean, SPEC.std)
    exported = export_openvino(module, 32, 32)
    predict = run_with(compile_ir(exported.data, exported.weights, "model"))
    images = draw_pixels(20)
    with torch.no_grad():
        expected = module(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(predict(images), expected, atol=1e-5)

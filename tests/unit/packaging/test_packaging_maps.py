"""The last feature map as a second output, and the exact class maps that follow from it."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging_data import (
    CLASS_NAMES,
    SPEC,
    Made,
    add_export,
    draw_pixels,
    edit_manifest,
    make_network,
    write_falcons,
)
from safetensors.numpy import save

from fieldmark.errors import CheckFailed, ConfigError, ModelError, PackageError
from fieldmark.measure import class_maps
from fieldmark.model import InferenceModule
from fieldmark.packaging.export import export_module, export_onnx
from fieldmark.packaging.golden import make_golden, synthetic_images
from fieldmark.packaging.load import open_onnx, open_session
from fieldmark.packaging.manifest import Package, open_package
from fieldmark.packaging.maps import open_maps, read_tensor
from fieldmark.serving import predictor
from fieldmark.serving.predictor import open_predictor

SIDE_PX = 64  # at which the feature map has more than one place


@pytest.fixture(scope="module")
def mapped(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mapped") / "package"
    spec = SPEC.model_copy(update={"height_px": SIDE_PX, "width_px": SIDE_PX})
    golden = make_golden(synthetic_images(2, seed=7), spec, made.eager, CLASS_NAMES)
    write_falcons(folder, made.module, golden, preprocess=spec)
    add_export(folder, "onnx", export_onnx(made.module, SIDE_PX, SIDE_PX, features=True))
    return folder


def _draw(count: int) -> np.ndarray:
    return draw_pixels(count).repeat(2, axis=1).repeat(2, axis=2)


@pytest.fixture
def package(mapped: Path, tmp_path: Path) -> Package:
    return open_package(shutil.copytree(mapped, tmp_path / "package"))


def test_the_mean_of_a_class_map_is_the_logit(package: Package, made: Made) -> None:
    model = open_maps(package)
    images = _draw(7)
    logits, features = model.run(images)
    np.testing.assert_allclose(logits, made.eager(images), atol=1e-4)
    maps = model.maps(features, range(5))
    assert maps.shape == (7, 5, *features.shape[2:])
    np.testing.assert_allclose(maps.mean(axis=(2, 3)), logits, atol=1e-4)
    assert maps.std(axis=(2, 3)).min() > 1e-3  # and they say where
    np.testing.assert_array_equal(model.maps(features, [3, 0]), maps[:, [3, 0]])


def test_a_service_checks_the_session_of_the_maps_too(
    mapped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert open_predictor(mapped, serves=True).maps is not None

    class Other:
        def __init__(self, session: Any) -> None:
            self._session = session

        def run(self, *arguments: Any) -> Any:
            logits, features = self._session.run(*arguments)
            return logits + np.float32(1), features

    def open_other(*arguments: Any) -> Any:
        model = open_maps(*arguments)
        return dataclasses.replace(model, session=Other(model.session))

    monkeypatch.setattr(predictor, "open_maps", open_other)
    assert open_predictor(mapped).maps is None
    with pytest.raises(CheckFailed, match="must repeat its golden samples"):
        open_predictor(mapped, serves=True)


def test_the_variant_says_what_its_outputs_are(package: Package) -> None:
    variant = package.manifest.variants["onnx"]
    assert [(x.name, x.shape) for x in variant.outputs] == [
        ("logits", ("batch", 5)),
        ("features", ("batch", 96, 2, 2)),
    ]
    assert variant.head is not None
    assert (variant.head.weight, variant.head.bias) == ("fc.weight", "fc.bias")


def test_it_is_a_predict_like_any_other(package: Package, made: Made) -> None:
    images = _draw(5)
    np.testing.assert_allclose(open_onnx(package)(images), made.eager(images), atol=1e-4)
    with pytest.raises(ValueError, match="images must be uint8"):
        open_maps(package).run(images[:, :63])


@pytest.mark.parametrize("name", ["test_efficientnet", "small_resnet18", "tf_efficientnet_lite0"])
@pytest.mark.slow
def test_networks_with_an_averaging_head_have_exact_maps(name: str) -> None:
    network = make_network(name)
    head = network.get_classifier()
    module = InferenceModule(network, SPEC.mean, SPEC.std)
    exported = export_onnx(module, 64, 64, features=True)
    assert exported.features is not None
    channels, height, width = exported.features.shape
    assert channels == head.in_features
    assert height == width == {"small_resnet18": 8}.get(name, 2)
    session = open_session(exported.data, "model")
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    logits, features = session.run(None, {"images": images})
    weight, bias = head.weight.detach().numpy(), head.bias.detach().numpy()
    maps = class_maps(features, weight, bias)
    np.testing.assert_allclose(maps.mean(axis=(2, 3)), logits, atol=1e-4 * np.abs(logits).max())


@pytest.mark.parametrize(
    ("name", "side_px", "reason"),
    [
        ("airnet", 32, "AirNet: its logits are not the mean of the map through the head"),
        ("test_convnext", 64, "ConvNeXt: its logits are not the mean"),
        ("test_vit", 160, "VisionTransformer: its last features are no map"),
        ("mobilenetv3_small_050", 64, "MobileNetV3: layers lie between the map and the head"),
        ("vgg11", 32, "VGG: layers lie between the map and the head"),
    ],
)
def test_other_heads_are_refused_with_the_reason(name: str, side_px: int, reason: str) -> None:
    import timm

    import fieldmark.model  # noqa: F401  (registers airnet)

    torch.manual_seed(0)
    module = InferenceModule(timm.create_model(name, num_classes=5), SPEC.mean, SPEC.std)
    with pytest.raises(ModelError, match=reason) as caught:
        export_onnx(module, side_px, side_px, features=True)
    assert "Export without --features." in str(caught.value)


def test_a_network_that_timm_did_not_make_is_refused() -> None:
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    module = InferenceModule(network, SPEC.mean, SPEC.std)
    with pytest.raises(ModelError, match="Sequential: its head is no single linear layer"):
        export_onnx(module, 8, 8, features=True)


@pytest.mark.parametrize("kind", ["torchscript", "pt2", "openvino"])
def test_only_onnx_has_a_second_output(made: Made, kind: str) -> None:
    with pytest.raises(ConfigError, match=f"must be given with --to onnx. Got {kind}"):
        export_module(made.module, kind, SIDE_PX, SIDE_PX, features=True)  # type: ignore[arg-type]


def test_a_variant_without_features_says_what_to_run(made: Made) -> None:
    with pytest.raises(PackageError, match="Run: fieldmark export .* --features"):
        open_maps(open_package(made.folder))


def test_an_output_that_is_not_recorded_is_refused(package: Package) -> None:
    content = package.manifest.model_dump(mode="json")["variants"]
    content["onnx"]["outputs"][1]["shape"][1] = 95
    edit_manifest(package.path, variants=content)
    for opener in (open_onnx, open_maps):
        with pytest.raises(PackageError, match=r"float32 \(batch, 5\) and the features"):
            opener(open_package(package.path))
    content["onnx"]["outputs"] = content["onnx"]["outputs"][:1]
    edit_manifest(package.path, variants=content)
    with pytest.raises(PackageError, match=r"Got images: .* and logits: .*, features: "):
        open_onnx(open_package(package.path))


def test_a_head_of_another_shape_is_refused(package: Package) -> None:
    content = package.manifest.model_dump(mode="json")["variants"]
    content["onnx"]["head"] = {"weight": "fc.bias", "bias": ""}
    edit_manifest(package.path, variants=content)
    with pytest.raises(PackageError, match=r"must have the shapes \(5, 96\) and \(5,\)"):
        open_maps(open_package(package.path))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_a_tensor_is_read_as_safetensors_writes_it(dtype: type) -> None:
    wanted = np.random.default_rng(0).normal(size=(3, 4)).astype(dtype)
    data = save({"a": np.ones(5, np.int64), "b": wanted, "c": np.zeros(2, np.float32)})
    found = read_tensor(data, "b", "file")
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, wanted.astype(np.float32))
    for bad, name in ((data, "a"), (data, "d"), (data[:-30], "b"), (b"", "b"), (b"\xff" * 40, "b")):
        with pytest.raises(PackageError, match="must hold the floats"):
            read_tensor(bad, name, "file")

"""Networks: sizes, stems for small images, heads, and what opens them again."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from fieldmark.errors import ModelError, UnknownName
from fieldmark.model import (
    Architecture,
    Weights,
    adapt_architecture,
    build,
    check_image_size,
    freeze_backbone,
    head_parameters,
    num_parameters,
    set_train_mode,
)
from shared_data import shared_path


@pytest.mark.parametrize(("name", "count"), [("resnet18", 11_173_962), ("resnet50", 23_520_842)])
def test_parameter_counts_of_the_networks_for_32_px(name: str, count: int) -> None:
    adapted, note = adapt_architecture(Architecture(name, 10), 32, "auto")
    network = build(adapted)
    assert num_parameters(network) == count
    assert adapted.name == f"small_{name}"
    assert "stride-1 stem" in note
    assert (network.conv1.kernel_size, network.conv1.stride) == ((3, 3), (1, 1))
    assert isinstance(network.maxpool, nn.Identity)
    downsamples = [m for n, m in network.named_modules() if n.endswith("downsample.0")]
    assert {m.kernel_size for m in downsamples} == {(1, 1)}


@pytest.mark.parametrize(
    ("name", "reduction_before", "reduction_after"),
    [("test_resnet", 32, 8), ("test_efficientnet", 32, 16)],
)
def test_an_adapted_stem_keeps_more_of_a_small_image(
    name: str, reduction_before: int, reduction_after: int
) -> None:
    stock = build(Architecture(name, 4))
    adapted = build(adapt_architecture(Architecture(name, 4), 32, "auto")[0])
    x = torch.zeros(1, 3, 64, 64)
    assert 64 // stock.eval().forward_features(x).shape[-1] == reduction_before
    assert 64 // adapted.eval().forward_features(x).shape[-1] == reduction_after
    assert [p.shape for p in stock.parameters()][2:] == [p.shape for p in adapted.parameters()][2:]


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("test_vit", {"img_size": 32, "patch_size": 4}),
        ("test_convnext", {"patch_size": 1}),
    ],
)
def test_patch_networks_keep_their_stock_name(name: str, args: dict[str, int]) -> None:
    adapted, note = adapt_architecture(Architecture(name, 4), 32, "auto")
    assert (adapted.name, dict(adapted.args)) == (name, args)
    assert "32 px" in note
    check_image_size(build(adapted), 32)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext"])
def test_each_family_has_a_stock_form_too(name: str) -> None:
    stock = Architecture(name, 4)
    assert adapt_architecture(stock, 32, "never") == (stock, "")
    adapted, _ = adapt_architecture(stock, 32, "auto")
    assert num_parameters(build(stock)) != num_parameters(build(adapted)) or (
        adapted.name != stock.name
    )


def test_large_inputs_unknown_families_and_never_are_left_alone() -> None:
    resnet, vgg = Architecture("resnet18", 4), Architecture("vgg11_bn", 4)
    assert adapt_architecture(resnet, 224, "auto") == (resnet, "")
    assert adapt_architecture(resnet, 32, "never") == (resnet, "")
    unchanged, note = adapt_architecture(vgg, 32, "auto")
    assert unchanged == vgg
    assert "no small-input form" in note
    with pytest.raises(ModelError, match="small_input=always needs"):
        adapt_architecture(vgg, 32, "always")
    assert adapt_architecture(resnet, 224, "always")[0].name == "small_resnet18"


@pytest.mark.slow
def test_no_adapted_name_is_a_stock_name_and_plain_timm_does_not_know_it() -> None:
    code = (
        "import timm, sys; names = [n for n in sys.argv[1:] if timm.is_model(n)];"
        "sys.exit(','.join(names) or 0)"
    )
    ours = [*timm.list_models("small_*"), "airnet"]
    assert len(ours) > 100
    done = subprocess.run(
        [sys.executable, "-c", code, *ours], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_airnet_is_the_published_network() -> None:
    network = build(Architecture("airnet", 10))
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    # 24 whitening biases; six 3x3 convolutions; six norm biases; a 256 x 10 head.
    convolutions = 9 * (24 * 64 + 64 * 64 + 64 * 256 + 3 * 256 * 256)
    assert trained == 24 + convolutions + 2 * (64 + 256 + 256) + 2560
    assert 1.96e6 < trained < 1.99e6
    x = torch.randn(2, 3, 32, 32)
    assert network.forward_features(x).shape == (2, 256, 3, 3)


def test_airnet_can_be_deeper_and_start_otherwise() -> None:
    args = {"widths": [8, 16, 16], "depth": 3, "stem_bias": "uniform", "head_std": 1.0}
    network = build(Architecture("airnet", 10, args))
    assert abs(float(network.head.weight.detach().std()) - 1) < 1e-6
    assert 0 < float(network.whiten.bias.detach().abs().max()) <= 12**-0.5
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    group = network.groups[0]
    with torch.no_grad():  # nothing comes of the third convolution: its input passes by it
        group.conv3.weight.zero_()
        x = torch.randn(2, 24, 31, 31)
        shortcut = F.gelu(group.norm1(F.max_pool2d(group.conv1(x), 2)))
        assert torch.allclose(group(x), F.gelu(shortcut))
    with pytest.raises(ModelError, match="depth 2 or 3"):
        build(Architecture("airnet", 10, {"depth": 4}))


def test_airnet_starts_as_an_identity_and_whitens_its_images() -> None:
    network = build(Architecture("airnet", 10, {"widths": [8, 8, 8]}))
    eye = torch.zeros(8, 8, 3, 3)
    eye[range(8), range(8), 1, 1] = 1
    assert torch.equal(network.groups[1].conv1.weight, eye)
    images = torch.randn(64, 3, 16, 16).cumsum(3)  # neighbours are alike, as in photographs
    network.init_from_images(images, eps=1e-6)
    with torch.no_grad():
        out = network.whiten(images)[:, :12].permute(0, 2, 3, 1).reshape(-1, 12)
    second_moment = out.T @ out / len(out)
    assert torch.allclose(second_moment, torch.eye(12), atol=0.05)
    assert torch.equal(network.whiten.weight[:12], -network.whiten.weight[12:])


def test_a_network_too_deep_for_its_input_names_the_smallest_size_that_works() -> None:
    network = build(Architecture("airnet", 10, {"widths": [8, 8, 8]}))
    check_image_size(network, 9)
    with pytest.raises(ModelError, match="smallest size that works is 9 px"):
        check_image_size(network, 8)


def test_unknown_names_and_arguments_are_one_sentence() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'resnet18'"):
        build(Architecture("resnet81", 10))
    with pytest.raises(ModelError, match="model.args must be arguments of resnet18"):
        build(Architecture("resnet18", 10, {"deepness": 3}))


def test_weights_of_other_classes_get_a_new_head_and_wrong_ones_are_refused(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    ten = build(Architecture("test_resnet", 10))
    path = tmp_path / "ten.pth"
    torch.save(ten.state_dict(), path)
    weights = Weights(10, path=path)
    same = build(Architecture("test_resnet", 10), weights)
    other = build(Architecture("test_resnet", 3), weights)
    assert torch.equal(same.fc.weight, ten.fc.weight)
    assert torch.equal(other.conv1[0].weight, ten.conv1[0].weight)
    assert other.fc.weight.shape[0] == 3
    with pytest.raises(ModelError, match="do not fit test_vit"):
        build(Architecture("test_vit", 10), weights)


def test_a_frozen_backbone_neither_learns_nor_moves_its_statistics() -> None:
    network = build(Architecture("test_resnet", 3))
    freeze_backbone(network)
    set_train_mode(network, "backbone")
    before = {key: value.clone() for key, value in network.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1)
    network(torch.randn(8, 3, 64, 64)).square().mean().backward()
    optimizer.step()
    changed = {k for k, v in network.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"fc.weight", "fc.bias"}
    assert len(head_parameters(network)) == 2
    set_train_mode(network, "none")
    assert network.bn1.training
    set_train_mode(network, "statistics")
    assert network.training
    assert not network.bn1.training


@pytest.mark.shared
def test_real_weights_load_with_and_without_their_head() -> None:
    path = shared_path("weights", "tf_efficientnet_lite0.in1k")
    weights = Weights(1000, path=path)
    full = build(Architecture("tf_efficientnet_lite0", 1000), weights)
    reference = timm.create_model(f"local-dir:{path}", pretrained=True)
    for key, value in reference.state_dict().items():
        assert torch.equal(full.state_dict()[key], value), key
    six = build(Architecture("tf_efficientnet_lite0", 6), weights)
    assert torch.equal(six.conv_stem.weight, full.conv_stem.weight)
    assert six.classifier.weight.shape[0] == 6

"""norm_statistics.py: when batch norms keep what they came with, and that they do."""

import json
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

import fieldmark
from fieldmark.config import ModelConfig, TrainConfig
from fieldmark.errors import ConfigError
from fieldmark.training.norm_statistics import FEW_VALUES, fewest_positions, settle_freeze, settled
from random_weights import save_weights

RESNET = timm.create_model("test_resnet", num_classes=2)
PRETRAINED = "local-dir:weights"


def settle(
    model: ModelConfig, train: TrainConfig, network=RESNET, px: int = 32, num_ranks: int = 1
) -> tuple[str, str]:
    """Return what is settled and the reason that is recorded."""
    reasons = []

    def decide_once(kind, find):
        assert kind == "freeze"
        value, why = find()
        reasons.append(why)
        return value

    found = settle_freeze(
        model,
        train,
        network,
        height_px=px,
        width_px=px,
        num_ranks=num_ranks,
        decide_once=decide_once,
    )
    return settled(found), "".join(reasons)


def test_the_smallest_map_is_found_and_the_network_stays_as_it_is():
    network = timm.create_model("test_resnet", num_classes=2)
    network.train()
    next(network.children()).eval()
    modes = [module.training for module in network.modules()]
    state = {name: value.clone() for name, value in network.state_dict().items()}
    assert fewest_positions(network, 32, 32) == 1  # it shrinks images 32 times
    assert fewest_positions(network, 96, 64) == 6
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert not any(module._forward_pre_hooks for module in network.modules())
    assert fewest_positions(timm.create_model("test_vit", img_size=32), 32, 32) is None


@pytest.mark.parametrize(
    ("batch_size", "accumulation_steps", "num_ranks", "freeze"),
    [
        (FEW_VALUES // 4, 1, 1, "none"),  # 64 px: 4 positions
        (FEW_VALUES // 4 - 1, 1, 1, "statistics"),
        (FEW_VALUES // 4, 5, 1, "statistics"),
        (FEW_VALUES // 4, 1, 5, "statistics"),
    ],
)
def test_it_depends_on_the_values_that_are_seen_at_once(
    batch_size, accumulation_steps, num_ranks, freeze
):
    train = TrainConfig(epochs=1, batch_size=batch_size, accumulation_steps=accumulation_steps)
    model = ModelConfig(pretrained=PRETRAINED, freeze="auto")
    found, why = settle(model, train, px=64, num_ranks=num_ranks)
    assert found == freeze
    at_once = batch_size // accumulation_steps // num_ranks
    assert why.startswith(f"as {at_once} images at once give a batch norm {4 * at_once} values")


def test_where_there_is_nothing_to_keep_nothing_is_frozen():
    train = TrainConfig(epochs=1, batch_size=2)
    scratch = ModelConfig(arch="test_resnet", freeze="auto")
    assert settle(scratch, train) == ("none", "as there are no statistics to keep")
    model = ModelConfig(pretrained=PRETRAINED, freeze="auto")
    vit = timm.create_model("test_vit", img_size=32)
    assert settle(model, train, vit) == ("none", "as there is no batch norm")


def test_they_are_kept_where_the_size_of_an_update_is_not_known_yet():
    unknown = TrainConfig(epochs=1, batch_size="auto")
    assert settle(ModelConfig(pretrained=PRETRAINED, freeze="auto"), unknown)[0] == "statistics"


@pytest.mark.parametrize("freeze", ["none", "statistics", "backbone"])
def test_what_is_asked_for_is_taken(freeze):
    model = ModelConfig(pretrained=PRETRAINED, freeze=freeze)
    assert settle(model, TrainConfig(epochs=1, batch_size=2)) == (freeze, "")


def test_the_recipe_keeps_them_for_a_few_small_images_and_says_so(tmp_path: Path, capsys):
    weights = save_weights(tmp_path / "weights")
    for label, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
        folder = tmp_path / "images" / label
        folder.mkdir(parents=True)
        for n in range(12):
            image = Image.new("RGB", (32, 32), colour)
            image.putpixel((n, n), (255, 255, 255))
            image.save(folder / f"{n}.png")
    settings = [
        f"data.source=folder:{tmp_path / 'images'}",
        f"model.pretrained=local-dir:{weights}",
    ]
    settings += ["train.min_steps=2", "train.epochs=1", "train.batch_size=8", "train.device=cpu"]
    run = fieldmark.train("finetune", settings, out=tmp_path / "run").path
    assert "model.freeze=auto: statistics" in capsys.readouterr().err
    decisions = [json.loads(line) for line in (run / "decisions.jsonl").read_text().splitlines()]
    [decided] = [line for line in decisions if line["kind"] == "freeze"]
    assert decided["value"] == "statistics"
    before = load_file(weights / "model.safetensors")
    after = load_file(run / "package" / "model.safetensors")
    statistics = [name for name in before if name.endswith(("running_mean", "running_var"))]
    assert statistics
    assert all(torch.equal(before[name], after[name]) for name in statistics)
    assert any(not torch.equal(before[name], after[name]) for name in before if "weight" in name)


@pytest.mark.parametrize("batch_size", ["1", "auto"])
def test_a_single_image_over_a_single_pixel_is_refused_in_a_sentence_and_never_chosen(
    tmp_path: Path, tiny_settings: list[str], batch_size: str
):
    weights = save_weights(tmp_path / "weights")
    settings = [s for s in tiny_settings if s.startswith("data.")]
    settings += [f"model.pretrained=local-dir:{weights}", "model.freeze=none", "model.image_px=32"]
    settings += ["train.steps=2", "train.device=cpu", f"train.batch_size={batch_size}"]
    out = tmp_path / "run"
    if batch_size == "auto":
        assert fieldmark.train("finetune", settings, out=out).facts["selected_by"]["step"] == 2
        return
    with pytest.raises(ConfigError, match=r"a single pixel of 32 x 32 px images. Got 1\. Set a"):
        fieldmark.train("finetune", settings, out=out)

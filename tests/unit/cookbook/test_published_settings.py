"""What the recipes of published trainings build, against numbers typed from their sources.

Each row says what the optimizer, the schedule, the loss, the augmentation and the evaluation of a
recipe are; what a row does not name must be at its default.
"""

from typing import Any

import numpy as np
import pytest
import torch

from fieldmark.config.section import Section
from fieldmark.cookbook import RECIPES, find_recipe
from fieldmark.data.loader import FileBatches
from fieldmark.data.source import open_source
from fieldmark.model import Architecture, build
from fieldmark.preprocess import Preprocess
from fieldmark.training.losses import make_loss
from fieldmark.training.optim import make_optimizer
from fieldmark.training.schedule import lr_factor, total_steps, warmup_steps

PER_EPOCH = 100  # updates, in these tests

RESIZED = {"resized_crop": True, "flip": "random"}
RAND_7 = {"ops": "randaugment", "ops_magnitude": 7.0}
MIXED_A = {"mixup_alpha": 0.1, "cutmix_alpha": 1.0}
THREE = {"ops": "three-augment", "color_jitter": 0.3, "mixup_alpha": 0.8, "cutmix_alpha": 1.0}
RAND_9 = {"ops": "randaugment"}  # magnitude 9, std 0.5, 2 operations are the defaults
BICUBIC = {"interpolation": "bicubic"}
LAMB = {"eps": 1e-6, "betas": (0.9, 0.999)}

# A row: the network and its arguments; the optimizer's class and settings; its groups' rates and
# decays ("no decay" holds the vectors, and the position embeddings of a transformer); the rate at
# five epochs; loss, augmentation and evaluation; px in training and in the test, 0 for the data's
# own; batch and epochs; decay and steps of the moving average.
ROWS: dict[str, dict[str, Any]] = {
    # He et al. 2015, section 4.2, with 5e-4 and cosine instead of 1e-4 and steps
    "cifar10-resnet18": {
        "network": ("small_resnet18", {}),
        "optimizer": ("SGD", {"momentum": 0.9, "nesterov": False}),
        "groups": {"backbone": (0.1, 5e-4), "head": (0.1, 5e-4)},
        "rates": [(0, 0.1), (50, 0.0853553), (100, 0.05), (150, 0.0146447), (200, 0)],
        "augment": {"crop_pad_px": 4, "flip": "random"},
        "px": (0, 0),
        "length": (128, 200),
    },
    "cifar10-resnet50": {
        "network": ("small_resnet50", {}),
        "optimizer": ("SGD", {"momentum": 0.9, "nesterov": False}),
        "groups": {"backbone": (0.1, 5e-4), "head": (0.1, 5e-4)},
        "rates": [(0, 0.1), (50, 0.0853553), (100, 0.05), (150, 0.0146447), (200, 0)],
        "augment": {"crop_pad_px": 4, "flip": "random"},
        "px": (0, 0),
        "length": (128, 200),
    },
    # a choice of ours
    "cifar10-efficientnet-b0": {
        "network": ("efficientnet_b0", {"drop_rate": 0.2, "drop_path_rate": 0.2}),
        "optimizer": ("AdamW", {"betas": (0.9, 0.999), "eps": 1e-8}),
        "groups": {
            "backbone": (1e-3, 1e-2),
            "backbone, no decay": (1e-3, 0),
            "head": (4e-3, 1e-2),
            "head, no decay": (4e-3, 0),
        },
        "rates": [(0, 1e-5), (0.6, 5.05e-4), (1.2, 1e-3), (6.6, 5e-4), (12, 0)],
        "loss": {"label_smoothing": 0.1},
        "augment": {"crop_pad_px": 12, "crop_pad_mode": "reflect", "flip": "random"},
        "eval": {"crop_frac": 1.0},
        "px": (128, 128),
        "length": (128, 12),
    },
    # torchvision, ResNet50_Weights.IMAGENET1K_V1
    "imagenet-resnet50": {
        "network": ("resnet50", {}),
        "optimizer": ("SGD", {"momentum": 0.9, "nesterov": False}),
        "groups": {"backbone": (0.1, 1e-4), "head": (0.1, 1e-4)},
        "rates": [(0, 0.1), (29.99, 0.1), (30, 0.01), (60, 0.001), (89.99, 0.001)],
        "augment": RESIZED,
        "eval": {"crop_frac": 0.875, "interpolation": "bilinear"},
        "px": (224, 224),
        "length": (256, 90),
    },
    # torchvision, ResNet50_Weights.IMAGENET1K_V2: lr 0.5, warm-up from 0.01 of it, then cosine to 0
    # EMA: 1 - (1 - 0.99998) * 8 GPUs * 128 * 32 steps / 600 epochs
    "imagenet-resnet50-tv2": {
        "network": ("resnet50", {}),
        "optimizer": ("SGD", {"momentum": 0.9, "nesterov": False}),
        "groups": {
            "backbone": (0.5, 2e-5),
            "backbone, no decay": (0.5, 0),
            "head": (0.5, 2e-5),
            "head, no decay": (0.5, 0),
        },
        "rates": [(0, 0.005), (2.5, 0.2525), (5, 0.5), (302.5, 0.25), (600, 0)],
        "loss": {"label_smoothing": 0.1},
        "augment": RESIZED
        | {"ops": "trivialaugment", "erase_prob": 0.1, "erase_mode": "constant"}
        | {"mixup_alpha": 0.2, "cutmix_alpha": 1.0},
        "eval": {"crop_frac": pytest.approx(224 / 232), "interpolation": "bilinear"},
        "repeats": 4,
        "px": (176, 224),
        "length": (1024, 600),
        "ema": (pytest.approx(1 - 2e-5 * 8 * 128 * 32 / 600, abs=1e-7), 32),
    },
    # Wightman et al. 2021, table 2
    "imagenet-resnet50-a1": {
        "network": ("resnet50", {"drop_path_rate": 0.05}),
        "optimizer": ("Lamb", LAMB),
        "groups": {
            "backbone": (5e-3, 0.01),
            "backbone, no decay": (5e-3, 0),
            "head": (5e-3, 0.01),
            "head, no decay": (5e-3, 0),
        },
        "rates": [(0, 1e-4), (2.5, 2.55e-3), (5, 4.999143e-3), (300, 2.5005e-3), (600, 1e-6)],
        "loss": {"name": "bce", "label_smoothing": 0.1},
        "augment": RESIZED | RAND_7 | {"mixup_alpha": 0.2, "cutmix_alpha": 1.0},
        "eval": BICUBIC | {"crop_frac": 0.95},
        "repeats": 3,
        "px": (224, 224),
        "length": (2048, 600),
    },
    "imagenet-resnet50-a2": {
        "network": ("resnet50", {"drop_path_rate": 0.05}),
        "optimizer": ("Lamb", LAMB),
        "groups": {
            "backbone": (5e-3, 0.02),
            "backbone, no decay": (5e-3, 0),
            "head": (5e-3, 0.02),
            "head, no decay": (5e-3, 0),
        },
        "rates": [(0, 1e-4), (2.5, 2.55e-3), (5, 4.996574e-3), (150, 2.5005e-3), (300, 1e-6)],
        "loss": {"name": "bce", "bce_threshold": 0.2},
        "augment": RESIZED | RAND_7 | MIXED_A,
        "eval": BICUBIC | {"crop_frac": 0.95},
        "repeats": 3,
        "px": (224, 224),
        "length": (2048, 300),
    },
    "imagenet-resnet50-a3": {
        "network": ("resnet50", {}),
        "optimizer": ("Lamb", LAMB),
        "groups": {
            "backbone": (8e-3, 0.02),
            "backbone, no decay": (8e-3, 0),
            "head": (8e-3, 0.02),
            "head, no decay": (8e-3, 0),
        },
        "rates": [(0, 1e-4), (2.5, 4.05e-3), (5, 7.950760e-3), (50, 4.0005e-3), (100, 1e-6)],
        "loss": {"name": "bce", "bce_threshold": 0.2},
        "augment": RESIZED | {"ops": "randaugment", "ops_magnitude": 6.0} | MIXED_A,
        "eval": BICUBIC | {"crop_frac": 0.95},
        "px": (160, 224),
        "length": (2048, 100),
    },
    # timm's command for EfficientNet-B2, dropout 0.4; a step every 2.4 epochs of 0.97
    "imagenet-efficientnet-b4": {
        "network": ("efficientnet_b4", {"drop_rate": 0.4, "drop_path_rate": 0.2}),
        "optimizer": ("RMSpropTF", {"momentum": 0.9, "eps": 1e-3, "alpha": 0.9}),
        "groups": {
            "backbone": (0.016, 1e-5),
            "backbone, no decay": (0.016, 0),
            "head": (0.016, 1e-5),
            "head, no decay": (0.016, 0),
        },
        "rates": [(0, 1e-6), (1.5, 8.0005e-3), (3, 0.01552), (4.8, 0.0150544), (240, 7.608401e-4)],
        "loss": {"label_smoothing": 0.1},
        "augment": RESIZED | RAND_9 | {"erase_prob": 0.2},
        "eval": BICUBIC | {"crop_frac": 1.0},
        "px": (320, 384),
        "length": (256, 450),
        "ema": (0.9999, 1),
    },
    # DeiT III's commands
    "imagenet-vit-s16": {
        "network": (
            "deit3_small_patch16_224",
            {"init_values": 1e-4, "drop_path_rate": 0.05, "img_size": 224},
        ),
        "optimizer": ("Lamb", LAMB | {"eps": 1e-8}),
        "groups": {
            "backbone": (4e-3, 0.05),
            "backbone, no decay": (4e-3, 0),
            "head": (4e-3, 0.05),
            "head, no decay": (4e-3, 0),
        },
        "rates": [(0, 1e-6), (2.5, 2.0005e-3), (5, 3.999615e-3), (400, 2.005e-3), (800, 1e-5)],
        "loss": {"name": "bce", "bce_threshold": 1e-6},
        "augment": RESIZED | THREE,
        "eval": BICUBIC | {"crop_frac": 1.0},
        "repeats": 3,
        "px": (224, 224),
        "length": (2048, 800),
    },
    "imagenet-vit-b16": {
        "network": (
            "deit3_base_patch16_224",
            {"init_values": 1e-4, "drop_path_rate": 0.2, "img_size": 192},
        ),
        "optimizer": ("Lamb", LAMB | {"eps": 1e-8}),
        "groups": {
            "backbone": (3e-3, 0.05),
            "backbone, no decay": (3e-3, 0),
            "head": (3e-3, 0.05),
            "head, no decay": (3e-3, 0),
        },
        "rates": [(0, 1e-6), (2.5, 1.5005e-3), (5, 2.999712e-3), (400, 1.505e-3), (800, 1e-5)],
        "loss": {"name": "bce", "bce_threshold": 1e-6},
        "augment": RESIZED | THREE,
        "eval": BICUBIC | {"crop_frac": 1.0},
        "repeats": 3,
        "px": (192, 192),
        "length": (2048, 800),
    },
    "imagenet-vit-b16-224": {
        "network": (
            "deit3_base_patch16_224",
            {"init_values": 1e-4, "drop_path_rate": 0.2, "img_size": 224},
        ),
        "optimizer": ("AdamW", {"betas": (0.9, 0.999), "eps": 1e-8}),
        "groups": {
            "backbone": (1e-5, 0.1),
            "backbone, no decay": (1e-5, 0),
            "head": (1e-5, 0.1),
            "head, no decay": (1e-5, 0),
        },
        "rates": [(0, 1e-6), (2.5, 5.5e-6), (5, 1e-5), (12, 1e-5), (19.99, 1e-5)],
        "loss": {"label_smoothing": 0.1},
        "augment": RESIZED | RAND_9 | {"mixup_alpha": 0.8, "cutmix_alpha": 1.0},
        "eval": BICUBIC | {"crop_frac": 1.0},
        "px": (224, 224),
        "length": (512, 20),
        "from_package": ("init_values",),  # what the weights it starts from bring along
    },
}


def changed(section: Section, *leave_out: str) -> dict[str, Any]:
    """Return the keys of a section that are not at their defaults."""
    return {
        key: value
        for key, value in section
        if key not in leave_out and value != type(section).model_fields[key].default
    }


def test_every_published_training_has_a_row() -> None:
    published = {n for n in RECIPES if n.startswith("imagenet-")}
    assert len(published) >= 9
    assert published <= set(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_the_optimizer_that_is_built(name: str) -> None:
    row, config = ROWS[name], find_recipe(name)
    arch, args = row["network"]
    with torch.device("meta"):
        network = build(Architecture(arch, 1000, args))
    optimizer = make_optimizer(network, config.optim)
    kind, settings = row["optimizer"]
    assert type(optimizer).__name__ == kind
    groups = {group["name"]: group for group in optimizer.param_groups}
    for group in groups.values():
        assert {key: group[key] for key in settings} == settings
    found = {key: (group["initial_lr"], group["weight_decay"]) for key, group in groups.items()}
    assert found == {key: pytest.approx(value) for key, value in row["groups"].items()}
    spared = {id(p) for g in groups.values() if not g["weight_decay"] for p in g["params"]}
    names = {n for n, p in network.named_parameters() if id(p) in spared}
    vectors = {n for n, p in network.named_parameters() if p.ndim <= 1}
    if "head, no decay" not in row["groups"]:
        assert names == set()
    elif arch.startswith("deit3"):
        assert names == vectors | {"pos_embed", "cls_token"}
    else:
        assert names == vectors


@pytest.mark.parametrize("name", ROWS)
def test_the_rate_at_five_points(name: str) -> None:
    row, config = ROWS[name], find_recipe(name)
    total = total_steps(config.train, PER_EPOCH)
    batch, epochs = row["length"]
    assert total == epochs * PER_EPOCH
    warmup = warmup_steps(config.schedule, total=total, steps_per_epoch=PER_EPOCH, batch_size=batch)
    assert len(row["rates"]) == 5
    for epoch, rate in row["rates"]:
        step = round(epoch * PER_EPOCH)
        factor = lr_factor(
            config.schedule, step, total=total, warmup=warmup, steps_per_epoch=PER_EPOCH
        )
        assert config.optim.lr * factor == pytest.approx(rate, rel=1e-5, abs=1e-12), epoch


@pytest.mark.parametrize("name", ROWS)
def test_loss_augmentation_sizes_and_length(name: str) -> None:
    row, config = ROWS[name], find_recipe(name)
    assert changed(config.loss) == row.get("loss", {})
    assert changed(config.augment, "sizes") == row["augment"]
    assert changed(config.eval) == row.get("eval", {})
    assert config.data.repeats == row.get("repeats", 1)
    train_px, test_px = row["px"]
    assert config.model.image_px == test_px
    (size,) = config.augment.sizes or ((0.0, test_px),)
    assert size == (0, train_px)
    train = config.train
    assert (train.batch_size, train.epochs) == row["length"]
    ema = (train.ema_decay, train.ema_steps)
    assert ema == row.get("ema", (0, 1))
    assert not train.ema_warmup
    assert not config.optim.max_grad_norm
    model = config.model
    set_here = {"drop_rate": model.drop_rate, "drop_path_rate": model.drop_path_rate, **model.args}
    _, args = row["network"]
    wanted = {k: v for k, v in args.items() if k not in ("img_size", *row.get("from_package", ()))}
    assert {key: value for key, value in set_here.items() if value} == wanted


# The loss of logits (2, 1, -1), worked out by hand; the targets are (1, 0, 0), or where they are
# cut off at a threshold (0.9, 0.1, 0), of which 0.2 leaves one class and 1e-6 two.
LOSSES = {
    "cross-entropy": 0.3490122,  # log(1 + e^-1 + e^-3)
    "cross-entropy, smoothed by 0.1": 0.4823455,  # 0.9 of that + 0.1 of the mean over the classes
    "bce, smoothed by 0.1": 0.6289284,  # targets 0.9333, 0.0333 and 0.0333
    "bce, cut at 0.2": 0.5844840,  # (log(1 + e^-2) + log(1 + e) + log(1 + e^-1)) / 3
    "bce, cut at 1e-06": 0.2511508,  # log(1 + e) - 1 in the place of log(1 + e)
}


@pytest.mark.parametrize("name", ROWS)
def test_the_loss_that_is_built_gives_the_number_worked_out_by_hand(name: str) -> None:
    said = ROWS[name].get("loss", {})
    title = said.get("name", "cross-entropy")
    title += f", smoothed by {said['label_smoothing']}" if "label_smoothing" in said else ""
    title += f", cut at {said['bce_threshold']:g}" if "bce_threshold" in said else ""
    target = [[0.9, 0.1, 0.0]] if "bce_threshold" in said else [[1.0, 0.0, 0.0]]
    loss = make_loss(find_recipe(name).loss, class_counts=[5, 5, 5])
    found = loss(torch.tensor([[2.0, 1.0, -1.0]]), torch.tensor(target))
    assert float(found) == pytest.approx(LOSSES[title], abs=1e-6)


@pytest.mark.parametrize("name", ROWS)
def test_the_batches_that_are_built_have_the_size_copies_and_targets(name: str) -> None:
    row, config = ROWS[name], find_recipe(name)
    train_px, test_px = (px or 32 for px in row["px"])
    split = open_source("digits").splits["all"].subset(np.arange(12), "train")
    spec = Preprocess(height_px=test_px, width_px=test_px, mean=(0.5,) * 3, std=(0.2,) * 3)
    made = FileBatches(
        split,
        spec,
        config.augment,
        batch_size=7,
        seed=0,
        num_classes=10,
        num_workers=0,
        repeats=config.data.repeats,
        image_px=lambda _: train_px,
    )
    batches = made.batches(0)
    images, targets = next(batches)
    batches.close()
    assert images.shape == (7, 3, train_px, train_px)
    is_mixed = "mixup_alpha" in row["augment"] or "cutmix_alpha" in row["augment"]
    assert targets.shape == ((7, 10) if is_mixed else (7,))
    labels = targets.argmax(1) if is_mixed else targets
    num_different = -(-7 // row.get("repeats", 1))
    if not is_mixed:
        assert labels.tolist() == (labels[:num_different].tolist() * 7)[:7]
    unlike = {tuple(image.flatten()[:200].tolist()) for image in images}
    assert len(unlike) > 1

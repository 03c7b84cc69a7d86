"""Each recipe of a published training takes a few updates on photographs, from start to end."""

from itertools import islice
from pathlib import Path

import pytest

import fieldmark
from fieldmark.config import override
from fieldmark.cookbook import RECIPES, find_recipe
from shared_data import shared_path

pytestmark = [pytest.mark.slow, pytest.mark.shared]

NUM_CLASSES, PER_CLASS, PX, BATCH = 4, 6, 96, 8
PUBLISHED = sorted(name for name in RECIPES if name.startswith("imagenet-"))


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as ImageNet unpacks: photographs of ImageNet, few of them, in made-up classes."""
    root = tmp_path_factory.mktemp("imagenet")
    photos = sorted(shared_path("data", "imagenet-sample", "val").rglob("*.JPEG"))
    wanted = iter(photos[:: len(photos) // (2 * NUM_CLASSES * PER_CLASS)])
    for split in ("train", "val"):
        for label in range(NUM_CLASSES):
            folder = root / split / f"n0000000{label}"
            folder.mkdir(parents=True)
            for photo in islice(wanted, PER_CLASS):
                (folder / photo.name).symlink_to(photo)
    return root


def short(name: str, imagenet: Path) -> list[str]:
    """Return the settings that make a matter of seconds of a recipe, and change no kind of step."""
    config = find_recipe(name)
    settings = [
        f"data.source=imagenet:{imagenet}",
        "data.val_frac=0",
        "data.num_workers=0",
        "train.steps=3",
        f"train.batch_size={BATCH}",
        f"model.image_px={PX}",
        "package.golden=none",
        "eval.batch_size=8",
    ]
    if config.augment.sizes:
        scaled = PX * config.augment.sizes[0][1] // config.model.image_px // 16 * 16
        assert 0 < scaled < PX
        settings.append(f"augment.sizes=[[0, {scaled}]]")
    if config.schedule.warmup_epochs:
        settings.append("schedule.warmup_steps=1")
    return settings


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long) if name == "imagenet-vit-b16-224" else name
        for name in PUBLISHED
    ],
)
def test_three_updates_and_an_evaluation(name: str, imagenet: Path, tmp_path: Path) -> None:
    settings = short(name, imagenet)
    if name == "imagenet-vit-b16-224":
        first = fieldmark.train(
            "imagenet-vit-b16",
            [*short("imagenet-vit-b16", imagenet), "model.image_px=80"],
            out=tmp_path / "first",
        )
        settings.append(f"model.pretrained={first.path}")
    before = find_recipe(name)
    after = override(before, settings)
    assert after.optim == before.optim
    assert after.loss == before.loss
    report = fieldmark.train(name, settings, out=tmp_path / "run")
    assert report.facts["measured_on"] == "test"
    assert report.facts["top1_accuracy"]["n"] == NUM_CLASSES * PER_CLASS

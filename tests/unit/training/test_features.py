"""Features: what the head reads, kept in parts that say what they were made from."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from fieldmark.data.images import ArrayImages
from fieldmark.data.labelled import Split
from fieldmark.data.source import open_source
from fieldmark.errors import ModelError
from fieldmark.model import Architecture, build
from fieldmark.preprocess import Preprocess
from fieldmark.training import features as module
from fieldmark.training.features import (
    Features,
    extract,
    feature_predict,
    frozen_digest,
    linear_head,
)

SPEC = Preprocess(height_px=32, width_px=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


def images(count: int = 10) -> Split:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (count, 32, 32, 3), dtype=np.uint8)
    return Split("train", ArrayImages(pixels, "train"), np.arange(count) % 3)


def not_broken(name: str, reason: str) -> None:
    pytest.fail(f"{name}: {reason}")


def run(split: Split, predict: object, folder: Path, **changes: object) -> Features:
    given = {"key": {"weights": "a"}, "mirrored": False, "batch_size": 4} | changes
    return extract(
        split, SPEC, predict, folder=folder, on_broken=given.pop("on_broken", not_broken), **given
    )


@pytest.mark.parametrize(
    "name", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext", "airnet"]
)
def test_features_are_what_timm_gives_the_head_of_normalised_pixels(
    tmp_path: Path, name: str
) -> None:
    args = {"img_size": 32} if name == "test_vit" else {}
    network = build(Architecture(name, 3, args)).eval()
    split = images()
    assert isinstance(split.images, ArrayImages)
    predict = feature_predict(network, SPEC, torch.device("cpu"), channels_last=True)
    found = run(split, predict, tmp_path / "features", mirrored=True)
    for view, pixels in enumerate((split.images.pixels, split.images.pixels[:, :, ::-1])):
        x = torch.from_numpy(pixels.astype(np.float32) / 255).permute(0, 3, 1, 2)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (SPEC.mean, SPEC.std))
        with torch.no_grad():
            maps = network.forward_features((x - mean) / std)
            expected = network.forward_head(maps, pre_logits=True).numpy()
        assert found.values[view].shape == expected.shape
        assert np.abs(found.values[view] - expected).max() < 1e-4 * np.abs(expected).max()
    assert found.values.dtype == np.float32
    assert (found.labels == split.labels).all()
    assert np.abs(found.values[0] - found.values[1]).max() > 1e-3


class Counted:
    """Stands for a network: the mean of each channel; counts the images it is given."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        self.images += len(pixels)
        return pixels.mean(axis=(1, 2)).astype(np.float32)


def test_only_parts_that_are_missing_damaged_or_of_another_making_are_extracted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PART_IMAGES", 4)
    split, predict, folder = images(10), Counted(), tmp_path / "features"
    first = run(split, predict, folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        f"train-{start:08d}.npz" for start in (0, 4, 8)
    ]
    assert predict.images == 10
    again = run(split, predict, folder)
    assert predict.images == 10
    assert np.array_equal(first.values, again.values)
    assert first.seconds == again.seconds
    (folder / "train-00000004.npz").write_bytes((folder / "train-00000004.npz").read_bytes()[:90])
    (folder / "train-00000008.npz").unlink()
    assert np.array_equal(run(split, predict, folder).values, first.values)
    assert predict.images == 10 + 4 + 2
    run(split, predict, folder, key={"weights": "b"})
    assert predict.images == 16 + 10
    run(split, predict, folder, key={"weights": "b"}, mirrored=True)
    assert predict.images == 26 + 20


def test_a_flipped_byte_in_a_part_is_noticed(tmp_path: Path) -> None:
    split, predict, folder = images(10), Counted(), tmp_path / "features"
    first = run(split, predict, folder)
    (path,) = folder.iterdir()
    content = bytearray(path.read_bytes())
    content[content.index(first.values.tobytes()) + 5] ^= 1
    path.write_bytes(content)
    assert np.array_equal(run(split, predict, folder).values, first.values)
    assert predict.images == 20


@pytest.mark.parametrize("num_broken", [1, 16])
def test_broken_images_are_left_out_and_named_again_from_the_kept_part(
    tmp_path: Path, tiny_images: Path, num_broken: int
) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(tiny_images / "train", photos)
    for path in sorted((photos / "green").iterdir())[:num_broken]:
        path.write_bytes(path.read_bytes()[:50])
    source = open_source(f"folder:{photos}")
    for _ in range(2):
        broken: list[str] = []
        found = run(
            source.splits["all"],
            Counted(),
            tmp_path / "features",
            on_broken=lambda name, reason, broken=broken: broken.append(name),
        )
        assert broken == [f"green/{number:02d}.png" for number in range(num_broken)]
        assert np.bincount(found.labels).tolist() == [16, 16 - num_broken, 16, 16]
        red = found.values[0][found.labels == source.class_names.index("red")]
        assert (red.argmax(axis=1) == 0).all()


def test_a_part_without_any_whole_image_is_empty(tmp_path: Path, tiny_images: Path) -> None:
    photos = tmp_path / "photos"
    shutil.copytree(tiny_images / "train", photos)
    for path in photos.rglob("*.png"):
        path.write_bytes(b"")
    split = open_source(f"folder:{photos}").splits["all"]
    found = run(split, Counted(), tmp_path / "features", on_broken=lambda name, reason: None)
    assert found.values.shape == (1, 0, 3)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext"])
def test_a_plain_head_is_found(name: str) -> None:
    network = build(Architecture(name, 3, {"img_size": 32} if name == "test_vit" else {}))
    assert linear_head(network, 32) is network.get_classifier()


def test_heads_that_are_not_plain_are_refused() -> None:
    with pytest.raises(ModelError, match="AirNet has one without a bias"):
        linear_head(build(Architecture("airnet", 3)), 32)
    with pytest.raises(ModelError, match="VisionTransformerDistilled has tuple"):
        linear_head(timm.create_model("deit_tiny_distilled_patch16_224", img_size=32), 32)

    class Scaled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build(Architecture("test_resnet", 3))

        def __getattr__(self, name: str) -> object:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(super().__getattr__("inner"), name)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.inner(x)

    with pytest.raises(ModelError, match="Scaled changes them afterwards"):
        linear_head(Scaled(), 32)


def test_the_digest_is_of_everything_but_the_head() -> None:
    network = build(Architecture("test_resnet", 3))
    before = frozen_digest(network)
    with torch.no_grad():
        network.get_classifier().weight += 1
    assert frozen_digest(network) == before
    with torch.no_grad():
        network.bn1.running_mean[0] += 1e-3
    assert frozen_digest(network) != before

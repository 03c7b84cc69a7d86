"""Small real images: pieces of the two photos that come with scikit-learn, as files."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from fieldmark.preprocess import Preprocess

SPEC = Preprocess(height_px=32, width_px=32, mean=(0.49, 0.48, 0.45), std=(0.25, 0.24, 0.26))


@pytest.fixture(scope="session")
def photos() -> list[Image.Image]:
    """Return two photos of 640 x 427 pixels."""
    return [Image.fromarray(image) for image in load_sample_images().images]


@pytest.fixture
def spec() -> Preprocess:
    """Return a specification for 32 px."""
    return SPEC


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory: pytest.TempPathFactory, photos: list[Image.Image]) -> Path:
    """Return a folder of 3 classes with 10 JPEG files each, of different sizes. Do not change."""
    root = tmp_path_factory.mktemp("photos")
    write_classes(root, photos, {"bird": 10, "cat": 10, "dog": 10})
    return root


@pytest.fixture
def make_folder(tmp_path: Path, photos: list[Image.Image]) -> Callable[..., Path]:
    """Return a function: class (or split/class) -> number of images, as a new folder."""

    def make(classes: dict[str, int]) -> Path:
        write_classes(tmp_path / "made", photos, classes)
        return tmp_path / "made"

    return make


@pytest.fixture
def global_generators() -> Iterator[None]:
    """Fail a test that draws from a global generator."""
    import random

    import torch

    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    yield
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


def write_classes(root: Path, photos: list[Image.Image], classes: dict[str, int]) -> None:
    rng = np.random.default_rng(0)
    for name, count in classes.items():
        folder = root / name
        folder.mkdir(parents=True)
        for index in range(count):
            width, height = (int(side) for side in rng.integers(36, 90, 2))
            left, top = int(rng.integers(0, 640 - width)), int(rng.integers(0, 427 - height))
            piece = photos[index % 2].crop((left, top, left + width, top + height))
            piece.save(folder / f"{index:03}.jpg", quality=90)

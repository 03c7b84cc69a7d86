"""One small network, really packaged and exported once; each test gets its own copy."""

import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for packaging_data, beside this file

from packaging_data import (
    CLASS_NAMES,
    SIDE_PX,
    SPEC,
    Made,
    add_export,
    balance,
    draw_pixels,
    make_network,
    write_falcons,
)

from fieldmark.model import InferenceModule, eager_predict
from fieldmark.packaging.export import FORMATS, export_module
from fieldmark.packaging.golden import make_golden, synthetic_images
from fieldmark.packaging.manifest import Package, open_package


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than so small a network, on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    module = InferenceModule(make_network(), SPEC.mean, SPEC.std)
    balance(module)
    eager = eager_predict(module)
    golden = make_golden(synthetic_images(6, seed=7), SPEC, eager, CLASS_NAMES)
    folder = tmp_path_factory.mktemp("made") / "package"
    write_falcons(folder, module, golden, training={"seed": 3}, license="apache-2.0")
    exported = {}
    for kind in FORMATS:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a deprecation must not reach the user from here
            exported[kind] = export_module(module, kind, SIDE_PX, SIDE_PX)
        add_export(folder, kind, exported[kind])
    return Made(module, eager, golden, exported, folder)


@pytest.fixture
def folder(made: Made, tmp_path: Path) -> Path:
    """A package of the test's own, free to be damaged."""
    return Path(shutil.copytree(made.folder, tmp_path / "package"))


@pytest.fixture
def package(folder: Path) -> Package:
    return open_package(folder)


@pytest.fixture(scope="session")
def batches() -> list[tuple[np.ndarray, np.ndarray]]:
    """60 images in three batches, the last one smaller, with labels."""
    images = draw_pixels(60)
    labels = np.random.default_rng(2).integers(0, len(CLASS_NAMES), size=60)
    return [(images[i : i + 25], labels[i : i + 25]) for i in (0, 25, 50)]

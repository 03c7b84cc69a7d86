"""Fixtures that all tests share: small real things, made once a session."""

import os
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared_data import pytest_runtest_makereport  # noqa: F401  (a hook, found by its name)

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may ask a hub

CLASSES = ("blue", "green", "red", "striped")


def draw(kind: str, rng: np.random.Generator) -> Image.Image:
    """Return a 32 px image that a small network tells apart after a few updates."""
    pixels = rng.integers(0, 90, (32, 32, 3), dtype=np.uint8)
    if kind == "striped":
        pixels[:, :: int(rng.integers(3, 6))] = 220
    else:
        pixels[..., {"red": 0, "green": 1, "blue": 2}[kind]] += np.uint8(130)
    return Image.fromarray(pixels)


@pytest.fixture(autouse=True)
def no_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this machine may be reached, unless the test is marked `network`."""
    if request.node.get_closest_marker("network"):
        return
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else "local"
        if host not in ("127.0.0.1", "::1", "localhost", "local"):
            raise OSError(f"a test must not connect to {host}")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", local_only)


@pytest.fixture(scope="session")
def tiny_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train/ and test/, 4 classes, 16 and 8 PNG images of 32 px a class."""
    root = tmp_path_factory.mktemp("tiny-images")
    rng = np.random.default_rng(0)
    for split, count in (("train", 16), ("test", 8)):
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                draw(name, rng).save(folder / f"{number:02d}.png")
    return root


@pytest.fixture(scope="session")
def tiny_settings(tiny_images: Path) -> list[str]:
    """What makes the digits recipe a matter of seconds on the tiny images."""
    return [
        f"data.source=folder:{tiny_images}",
        "data.val_frac=0.25",
        "model.args.widths=[8,8,16]",
        "train.batch_size=16",
        "train.epochs=6",
        "augment.flip=random",
        "optim.lr=0.2",
    ]


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, tiny_settings: list[str]) -> Path:
    """A finished run on the tiny images; do not change it, copy it."""
    import fieldmark

    out = tmp_path_factory.mktemp("tiny") / "run"
    fieldmark.train("digits", tiny_settings, out=out)
    return out


@pytest.fixture(scope="session")
def tiny_package(tiny_run: Path) -> Path:
    """The package of the tiny run, really exported to ONNX and verified."""
    import fieldmark

    assert fieldmark.export(str(tiny_run)).passed
    return tiny_run / "package"


@pytest.fixture(scope="session")
def tiny_image_files(tiny_images: Path) -> list[Path]:
    """PNG files of the tiny test split."""
    return sorted((tiny_images / "test").rglob("*.png"))


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run the test in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path

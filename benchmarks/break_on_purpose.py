"""Break a package in ways that happen, and see `fieldmark verify` notice each.

    .venv/bin/python benchmarks/break_on_purpose.py PACKAGE --data SOURCE

Each break is made in a copy, with all checksums brought up to date where a careless tool would have
done so. Writes benchmarks/results/break_on_purpose.json: what verify said of the sound copy and of
each broken one.
"""

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import results_file
from onnx import numpy_helper

import fieldmark
from fieldmark.errors import FieldmarkError
from fieldmark.preprocess import Preprocess
from fieldmark.runtime.files import sha256_bytes

COMMAND = "benchmarks/break_on_purpose.py PACKAGE --data SOURCE"


def main() -> None:
    """Break, verify, write down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="with the variant onnx")
    parser.add_argument("--data", default="", help="images to compare on [the package's own]")
    parser.add_argument("--max-images", type=int, default=200)
    options = parser.parse_args()
    asked = {"data": options.data, "max_images": options.max_images}
    found = {"nothing": verified(options.package, asked)}
    for name in BREAKS:
        with broken(name, options.package) as folder:
            answer = verified(folder, asked)
            answer["sentences"] = [t.replace(str(folder), "PACKAGE") for t in answer["sentences"]]
            found[name] = answer
    caught = [name for name, answer in found.items() if not answer["passed"]]
    if options.data:  # a results file names no folder of this machine
        short = f"{options.data.partition(':')[0]}:{Path(options.data).name}"
        for answer in found.values():
            answer["sentences"] = [t.replace(options.data, short) for t in answer["sentences"]]
    results_file.write("break_on_purpose", COMMAND, {"caught": caught, "verify_said": found})
    sys.exit(0 if caught == list(BREAKS) else 1)


@contextmanager
def broken(name: str, package: Path) -> Iterator[Path]:
    """Yield a copy of a package that is broken while the block runs."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        copy = Path(shutil.copytree(package, Path(folder, "package")))
        restore = BREAKS[name](copy)
        if restore is not None:
            stack.callback(restore)
        yield copy


def verified(package: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Return whether verify passed, and its sentences."""
    try:
        result = fieldmark.verify(package, **asked)
    except FieldmarkError as error:
        return {"passed": False, "sentences": [str(error)]}
    sentences = [
        problem for variant in result.facts["variants"].values() for problem in variant["problems"]
    ]
    return {"passed": result.passed, "sentences": sentences}


def swap_channels(_: Path) -> Callable[[], None]:
    """Preprocessing gives blue, green, red: as OpenCV reads images."""
    sound = Preprocess.to_pixels
    Preprocess.to_pixels = lambda self, image: np.ascontiguousarray(  # type: ignore[method-assign]
        sound(self, image)[..., ::-1]
    )

    def restore() -> None:
        Preprocess.to_pixels = sound  # type: ignore[method-assign]

    return restore


def shift_labels(package: Path) -> None:
    """The list of classes starts with what was its last: off by one."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["classes"] = manifest["classes"][-1:] + manifest["classes"][:-1]

    edit(package, change)


def widen_crop(package: Path) -> None:
    """The crop takes more of the image than in training."""

    def change(manifest: dict[str, Any]) -> None:
        crop = manifest["preprocess"]["crop_frac"]
        manifest["preprocess"]["crop_frac"] = 1.0 if crop < 1 else 0.8

    edit(package, change)


def truncate(package: Path) -> None:
    """The model's file lost its end, as in a copy that was cut off."""
    file = package / onnx_file(package)
    file.write_bytes(file.read_bytes()[:-1000])


def alter_byte(package: Path) -> None:
    """One byte of the weights differs, as on a bad disk."""
    file = package / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x40
    file.write_bytes(bytes(data))


def alter_weight(package: Path) -> None:
    """One weight of the model's head was changed, and the checksums brought up to date."""
    name = onnx_file(package)
    model = onnx.load(package / name)
    weights = [t for t in model.graph.initializer if len(t.dims) == 2]
    head = numpy_helper.to_array(weights[-1]).copy()
    head[0, 0] += 10 * np.abs(head).max()
    weights[-1].CopyFrom(numpy_helper.from_array(head, weights[-1].name))
    data = model.SerializeToString()
    (package / name).write_bytes(data)

    def change(manifest: dict[str, Any]) -> None:
        manifest["files"][name] = {"sha256": sha256_bytes(data), "bytes": len(data)}

    edit(package, change)


BREAKS: dict[str, Callable[[Path], Callable[[], None] | None]] = {
    "two channels swapped in preprocessing": swap_channels,
    "labels shifted by one": shift_labels,
    "one weight altered, checksums made to fit": alter_weight,
    "one byte of the weights altered": alter_byte,
    "a file truncated": truncate,
    "a wider crop": widen_crop,
}


def onnx_file(package: Path) -> str:
    """Return the name of the variant's file."""
    manifest = json.loads((package / "manifest.json").read_text())
    name: str = manifest["variants"]["onnx"]["file"]
    return name


def edit(package: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the manifest, which no checksum covers."""
    file = package / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


if __name__ == "__main__":
    main()

"""The program of docs/how-to/javascript.md, run by Node: it accepts what is sound, nothing else."""

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "how-to" / "javascript.md").read_text()
CLIENT = ROOT / "tests" / "clients" / "javascript"
INSTALLED = ROOT / ".clients" / "javascript"
SAMPLES = "golden/samples.npz"

Check = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def check(tmp_path_factory: pytest.TempPathFactory) -> Check:
    """Run the page's program with these arguments, where onnxruntime-web is installed."""
    node = shutil.which("node")
    if node is None or not (INSTALLED / ".ready").is_file():
        if node is not None and os.environ.get("CI") == "true":
            pytest.fail(f"{INSTALLED} must hold onnxruntime-web. Run: make clients.", pytrace=False)
        pytest.skip("Node with onnxruntime-web is not here. Install Node and run: make clients.")
    folder = tmp_path_factory.mktemp("client")
    (program,) = re.findall(r"^```js\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (folder / "check.mjs").write_text(program)
    (folder / "node_modules").symlink_to(INSTALLED / "node_modules")

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [node, folder / "check.mjs", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)

    return run


@pytest.fixture
def package(tiny_package: Path, tmp_path: Path) -> Path:
    """A copy of the tiny package, to be damaged."""
    return Path(shutil.copytree(tiny_package, tmp_path / "package"))


def edit_manifest(package: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = package / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))


def write(package: Path, name: str, data: bytes) -> None:
    """Write a file of the package, and its checksum."""
    (package / name).write_bytes(data)
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    edit_manifest(package, lambda manifest: manifest["files"].update({name: entry}))


def rewrite_samples(
    package: Path,
    pixels: npt.NDArray[Any],
    logits: npt.NDArray[Any],
    save: Callable[..., None] = np.savez,
) -> None:
    """Write samples.npz, and its checksum."""
    save(package / SAMPLES, pixels=pixels, logits=logits)
    write(package, SAMPLES, (package / SAMPLES).read_bytes())


def recorded(package: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    with np.load(package / SAMPLES) as arrays:
        return arrays["pixels"], arrays["logits"]


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line that a refusal writes."""
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("check: "), line
    return line.removeprefix("check: ")


def add_int8(package: Path) -> None:
    """Add the variant "int8": the one that is there, with QDQ nodes, calibrated on the samples."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Samples(CalibrationDataReader):
        def __init__(self) -> None:
            self.feeds: Iterator[dict[str, npt.NDArray[np.uint8]]] = iter(
                [{"images": recorded(package)[0]}]
            )

        def get_next(self) -> dict[str, npt.NDArray[np.uint8]] | None:  # type: ignore[override]
            return next(self.feeds, None)

    variant = json.loads((package / "manifest.json").read_text())["variants"]["onnx"]
    name = "variants/int8.onnx"
    quantize_static(
        package / variant["file"],
        package / name,
        Samples(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=True,
    )
    write(package, name, (package / name).read_bytes())
    int8 = {**variant, "precision": "int8", "file": name}
    edit_manifest(package, lambda manifest: manifest["variants"].update(int8=int8))


def test_the_page_names_the_version_that_is_tested() -> None:
    (version,) = re.findall(r"^npm install onnxruntime-web@(\S+)$", PAGE, re.MULTILINE)
    assert json.loads((CLIENT / "package.json").read_text())["dependencies"] == {
        "onnxruntime-web": version
    }


def test_the_lock_holds_checksums_and_names_no_registry() -> None:
    packages = json.loads((CLIENT / "package-lock.json").read_text())["packages"]
    installed = {name: entry for name, entry in packages.items() if name}
    assert "node_modules/onnxruntime-web" in installed
    for name, entry in installed.items():
        assert entry["integrity"].startswith("sha512-"), name
        assert "resolved" not in entry, name


@pytest.mark.slow
def test_a_sound_package_is_reproduced(check: Check, tiny_package: Path) -> None:
    done = check(tiny_package)
    assert done.returncode == 0, done.stderr
    answers = json.loads((tiny_package / "golden/answers.json").read_text())["samples"]
    rows = [line for line in done.stdout.splitlines() if "'golden/" in line]
    assert len(rows) == len(answers) > 1
    for row, answer in zip(rows, answers, strict=True):
        assert f"'{answer['file']}'" in row
        assert row.count(f"'{answer['class_name']}'") == 2  # recorded, and here
    assert f"{len(rows)} of {len(rows)} answers compared" in done.stdout


@pytest.mark.slow
def test_a_temperature_changes_the_confidence_alone(check: Check, package: Path) -> None:
    logits = recorded(package)[1].astype(float)
    edit_manifest(package, lambda manifest: manifest.update(confidence={"temperature": 2.5}))
    done = check(package)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "'golden/" in line]
    shown = [float(re.findall(r"'([^']*)'", row)[-1]) for row in rows]
    powers = np.exp((logits - logits.max(axis=1, keepdims=True)) / 2.5)
    expected = (powers / powers.sum(axis=1, keepdims=True)).max(axis=1)
    assert shown == pytest.approx(expected, rel=6e-3)  # three digits are shown


@pytest.mark.slow
def test_a_changed_byte_of_the_model_is_found(check: Check, package: Path) -> None:
    (model,) = (package / "variants").glob("*.onnx")
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    assert f"variants/{model.name} must match its SHA-256" in reason(check(package))


@pytest.mark.slow
def test_swapped_channels_are_found_by_the_logits(check: Check, package: Path) -> None:
    pixels, logits = recorded(package)
    rewrite_samples(package, pixels[..., ::-1].copy(), logits)
    assert reason(check(package)).startswith("Logits must be within")


@pytest.mark.slow
def test_logits_that_are_no_numbers_are_found(check: Check, package: Path) -> None:
    pixels, logits = recorded(package)
    logits[1, 2] = np.nan
    rewrite_samples(package, pixels, logits)
    assert "Logits must be within" in reason(check(package))


@pytest.mark.slow
def test_classes_in_another_order_are_found_by_the_answers(check: Check, package: Path) -> None:
    edit_manifest(package, lambda manifest: manifest["classes"].reverse())
    answers = json.loads((package / "golden/answers.json").read_text())["samples"]
    assert f"golden/000.png must be '{answers[0]['class_name']}'" in reason(check(package))


@pytest.mark.slow
def test_another_recorded_probability_is_found(check: Check, package: Path) -> None:
    answers = json.loads((package / "golden/answers.json").read_text())
    answers["samples"][1]["probability"] /= 2
    write(package, "golden/answers.json", json.dumps(answers).encode())
    assert reason(check(package)).startswith("Probabilities must be within")


@pytest.mark.slow
def test_samples_in_another_form_are_refused(check: Check, package: Path) -> None:
    pixels, logits = recorded(package)
    rewrite_samples(package, pixels, logits, np.savez_compressed)
    assert reason(check(package)) == "pixels.npy must be stored uncompressed. Got zip method 8."
    rewrite_samples(package, pixels, logits.astype(object))
    assert "Got {'descr': '|O'" in reason(check(package))
    rewrite_samples(package, pixels, np.asfortranarray(logits))
    assert "Got {'descr': '<f4', 'fortran_order': True" in reason(check(package))
    rewrite_samples(package, pixels[:, 1:], logits)
    assert f"'shape': {pixels.shape}, }}. Got" in reason(check(package))
    write(package, SAMPLES, b"not a zip file")
    assert "must be a zip file" in reason(check(package))


@pytest.mark.slow
def test_an_int8_variant_is_reproduced_where_the_lead_is_clear(check: Check, package: Path) -> None:
    add_int8(package)
    done = check(package, "int8")
    assert done.returncode == 0, done.stderr
    (compared,) = re.findall(r"(\d+) of \d+ answers compared", done.stdout)
    assert int(compared) > 1
    edit_manifest(package, lambda manifest: manifest["classes"].reverse())
    assert "must be '" in reason(check(package, "int8"))


@pytest.mark.slow
def test_an_int8_variant_is_refused_if_no_answer_can_be_compared(
    check: Check, package: Path
) -> None:
    add_int8(package)
    pixels, logits = recorded(package)
    logits[0] += 1000  # the answers and their leads stay
    rewrite_samples(package, pixels, logits)
    assert reason(check(package, "int8")).startswith("A lead must exceed the largest difference")


@pytest.mark.slow
def test_what_cannot_be_checked_is_said(check: Check, package: Path, tmp_path: Path) -> None:
    assert "Got 'int8' of: onnx." in reason(check(package, "int8"))
    assert "A package must be named." in reason(check())
    assert "manifest.json" in reason(check(tmp_path))
    edit_manifest(package, lambda manifest: manifest.update(format_version=2))
    assert reason(check(package)) == "The package must be of format 1. Got 2."

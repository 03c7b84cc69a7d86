"""Opening a package: what is refused, and with which words."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging_data import CLASS_NAMES, SPEC, edit_manifest

from fieldmark.errors import IntegrityError, PackageError, UnknownName
from fieldmark.packaging.entries import GoldenCheck, Measured, Parity, Variant
from fieldmark.packaging.manifest import Package, manifest_id, open_package
from fieldmark.runtime.files import sha256_bytes


def test_opens_with_what_was_written(package: Package) -> None:
    assert package.class_names == CLASS_NAMES
    assert package.preprocess == SPEC
    assert package.manifest.name == "falcons"
    assert package.manifest.architecture.opens_in == "timm"
    assert package.manifest.training == {"seed": 3}
    assert package.manifest.license == "apache-2.0"
    assert set(package.manifest.variants) == {"onnx", "torchscript", "pt2", "openvino"}
    package.check_files()


def test_torch_free_modules_import_no_torch() -> None:
    code = (
        "import sys\n"
        "import fieldmark.packaging.golden, fieldmark.packaging.load, fieldmark.packaging.verify\n"
        "import fieldmark.packaging.maps, fieldmark.packaging.served\n"
        "import fieldmark.packaging.variants\n"
        "heavy = {'torch', 'timm', 'safetensors', 'onnx', 'datasets', 'sklearn', 'matplotlib'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")


def test_id_is_of_the_content_not_of_its_layout(folder: Path, package: Package) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    backwards = dict(reversed(content.items()))
    path.write_text(json.dumps(backwards, indent=7, ensure_ascii=True))
    assert open_package(folder).id == package.id == manifest_id(content)
    edit_manifest(folder, license="mit")
    assert open_package(folder).id != package.id


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, "does not exist"),
        (lambda p: p.write_text("x"), "Got a file"),
        (lambda p: p.mkdir(), "no manifest.json"),
        (lambda p: (p / "package").mkdir(parents=True) or _empty_manifest(p / "package"), "a run"),
        (lambda p: p.mkdir() or _timm_folder(p), "fieldmark package local-dir:"),
    ],
)
def test_not_a_package_says_what_it_is(tmp_path: Path, make: Any, words: str) -> None:
    make(tmp_path / "x")
    with pytest.raises(PackageError, match=words):
        open_package(tmp_path / "x")


def _empty_manifest(folder: Path) -> None:
    (folder / "manifest.json").write_text("{}")


def _timm_folder(folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")


def test_newer_format_says_upgrade_before_any_schema_error(folder: Path) -> None:
    edit_manifest(folder, format_version=2, fieldmark_version="9.1", unheard_of=True)
    with pytest.raises(PackageError, match=r"Got format 2\. Upgrade fieldmark; 9\.1 wrote it"):
        open_package(folder)


@pytest.mark.parametrize("text", ["{", "[1]", '{"format_version": NaN}', "[" * 100_000, "\xff"])
def test_what_is_not_a_manifest_is_one_sentence(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(PackageError, match=r"must be (readable JSON|a package manifest)"):
        open_package(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_json_are_refused_where_any_value_may_stand(
    folder: Path, value: float
) -> None:
    edit_manifest(folder, metrics={"val": {"loss": value}})  # json.dumps writes NaN and Infinity
    with pytest.raises(PackageError, match="is not JSON"):
        open_package(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"surprise": 1}, "surprise"),
        ({"classes": [{"name": "kestrel"}] * 5}, "'kestrel' 5 times"),
        ({"classes": [{"name": "kestrel"}]}, "Got 1 and 5"),
        ({"format_version": 0}, "format_version"),
        ({"golden": {"kind": "made up", "count": 0}}, "golden.kind"),
        ({"golden": {"kind": "data", "count": -1}}, "golden.count"),
        ({"files": {}}, "files must list 'config.json'"),
    ],
)
def test_schema_errors_name_the_key(folder: Path, changes: dict[str, Any], words: str) -> None:
    edit_manifest(folder, **changes)
    with pytest.raises(PackageError, match=words):
        open_package(folder)


def test_a_missing_key_is_named(folder: Path) -> None:
    path = folder / "manifest.json"
    content = json.loads(path.read_text())
    del content["preprocess"]["mean"]
    path.write_text(json.dumps(content))
    with pytest.raises(PackageError, match=r"preprocess\.mean must be set"):
        open_package(folder)


def test_deployable_cannot_be_claimed(folder: Path, package: Package) -> None:
    variants = {k: v.model_dump(mode="json") for k, v in package.manifest.variants.items()}
    variants["onnx"]["deployable"] = True
    edit_manifest(folder, variants=variants)
    with pytest.raises(PackageError, match="deployable"):
        open_package(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "/etc/passwd",
        "golden/../../outside",
        "a//b",
        "./a",
        "",
        "C:/x",
        "a\\b",
        "a\0b",
    ],
)
def test_names_that_leave_the_folder_are_refused(folder: Path, package: Package, name: str) -> None:
    files = package.manifest.model_dump(mode="json")["files"]
    entry = {"sha256": sha256_bytes(b"x"), "bytes": 1}
    edit_manifest(folder, files=files | {name: entry})
    with pytest.raises(PackageError, match="inside the package"):
        open_package(folder)
    variants = package.manifest.model_dump(mode="json")["variants"]
    variants["onnx"]["file"] = name
    edit_manifest(folder, files=files, variants=variants)
    with pytest.raises(PackageError, match="inside the package"):
        open_package(folder)


def test_links_that_leave_the_folder_are_refused(
    folder: Path, package: Package, tmp_path: Path
) -> None:
    outside = tmp_path / "outside"
    (folder / "config.json").rename(outside)  # the very content that the manifest lists
    (folder / "config.json").symlink_to(outside)
    with pytest.raises(PackageError, match="must be inside the package. It links to"):
        package.read("config.json")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("config.json")
    with pytest.raises(PackageError):
        package.read("config.json")


def test_a_package_behind_a_link_opens(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    open_package(tmp_path / "link").check_files()


def test_unlisted_files_are_not_read(folder: Path, package: Package) -> None:
    (folder / "extra").write_bytes(b"x")
    with pytest.raises(PackageError, match="must list 'extra'"):
        package.read("extra")


def test_missing_truncated_and_altered_files(folder: Path, package: Package) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()

    path.write_bytes(data[:-1])
    with pytest.raises(IntegrityError, match=f"must have {len(data)} bytes. Got {len(data) - 1}"):
        package.read("model.safetensors")
    path.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    with pytest.raises(IntegrityError, match="It was altered"):
        package.check_files()
    path.unlink()
    with pytest.raises(IntegrityError, match="It is missing"):
        package.check_files()
    path.write_bytes(data)
    assert package.read("model.safetensors") == data
    package.check_files()


def test_a_damaged_variant_says_how_to_make_it_anew(folder: Path, package: Package) -> None:
    file = package.manifest.variants["onnx"].file
    (folder / file).write_bytes(b"")
    with pytest.raises(IntegrityError, match=f"Run: fieldmark export {folder} --to onnx"):
        package.read(file)


def test_variant_lookup(package: Package) -> None:
    assert package.variant("onnx", "onnx").kind == "onnx"
    with pytest.raises(UnknownName, match="Did you mean 'onnx'"):
        package.variant("onxx", "onnx")
    with pytest.raises(PackageError, match="must be onnx. Got torchscript"):
        package.variant("torchscript", "onnx")


PASSED = GoldenCheck(
    num_samples=8,
    max_level_difference=0,
    allowed_level_difference=0,
    max_abs_delta_logit=1e-6,
    tolerance=1e-3,
    num_wrong_answers=0,
    instruction_set="x86_64",
)


def _parity(agreement: float) -> Parity:
    return Parity(
        top1_agreement=Measured(value=agreement, low=0.0, high=1.0, n=2000),
        max_abs_delta_logit=1e-5,
        mean_abs_delta_logit=1e-6,
        accuracy_drop=Measured(value=0.0, low=-0.01, high=0.01, n=2000),
        data="val",
        instruction_set="x86_64",
    )


@pytest.mark.parametrize(
    ("golden", "parity", "deployable", "words"),
    [
        (PASSED, _parity(1.0), True, ""),
        (PASSED, _parity(0.999), True, ""),
        (PASSED, _parity(0.9985), False, "at least 99.90%"),
        (PASSED, None, False, "not measured on real images"),
        (None, _parity(1.0), False, "not checked"),
        (PASSED.model_copy(update={"num_samples": 0}), _parity(1.0), False, "no golden samples"),
        (PASSED.model_copy(update={"max_level_difference": 1}), _parity(1.0), False, "decode"),
        (PASSED.model_copy(update={"max_abs_delta_logit": 2e-3}), _parity(1.0), False, "within"),
        (PASSED.model_copy(update={"max_abs_delta_logit": None}), _parity(1.0), False, "finite"),
        (PASSED.model_copy(update={"num_wrong_answers": 1}), _parity(1.0), False, "1 of 8 wrong"),
    ],
)
def test_deployable_is_computed_from_measurements(
    golden: GoldenCheck | None, parity: Parity | None, deployable: bool, words: str
) -> None:
    variant = Variant(
        kind="onnx",
        precision="float32",
        file="variants/x.onnx",
        inputs=(),
        outputs=(),
        golden=golden,
        parity=parity,
    )
    assert variant.deployable is deployable
    assert words in " ".join(variant.obstacles())
    assert bool(variant.obstacles()) is not deployable
    assert "deployable" not in variant.model_dump()


@pytest.mark.parametrize(("kind", "file"), [("onnx", "variants/x.bin"), ("openvino", None)])
def test_a_weights_file_is_openvinos_alone(
    folder: Path, package: Package, kind: str, file: str | None
) -> None:
    variants = package.manifest.model_dump(mode="json")["variants"]
    variants[kind]["weights_file"] = file
    edit_manifest(folder, variants=variants)
    with pytest.raises(PackageError, match="weights_file must be set for openvino"):
        open_package(folder)


def test_a_weights_file_must_be_listed(folder: Path, package: Package) -> None:
    content = package.manifest.model_dump(mode="json")
    file = package.manifest.variants["openvino"].weights_file
    edit_manifest(folder, files={k: v for k, v in content["files"].items() if k != file})
    with pytest.raises(PackageError, match=f"files must list '{file}'"):
        open_package(folder)

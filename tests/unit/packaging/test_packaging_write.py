"""Writing and changing packages: timm can read them, and no interruption breaks one."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from packaging_data import CLASS_NAMES, Made, make_network, write_falcons

import fieldmark.packaging.folder as folder_module
from fieldmark.errors import PackageError
from fieldmark.model import Architecture
from fieldmark.packaging.entries import GoldenCheck
from fieldmark.packaging.folder import exchange
from fieldmark.packaging.golden import check_golden
from fieldmark.packaging.manifest import Package, open_package
from fieldmark.packaging.write import add_variant, record_parity, write_package
from fieldmark.preprocess import Preprocess

CHECK = GoldenCheck(
    num_samples=6,
    max_level_difference=0,
    allowed_level_difference=0,
    max_abs_delta_logit=0.0,
    tolerance=1e-3,
    num_wrong_answers=0,
    instruction_set="x86_64",
)


def _names(folder: Path) -> set[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in files} - {".lock"}


@pytest.mark.parametrize(
    ("name", "side_px", "args"),
    [
        ("test_resnet", 64, {}),
        ("test_vit", 96, {}),  # its positions depend on the size, which timm must learn of
        ("test_vit", 32, {"img_size": 32, "patch_size": 8}),
    ],
)
def test_plain_timm_opens_it_with_equal_logits(
    tmp_path: Path, name: str, side_px: int, args: dict[str, Any]
) -> None:
    built = args or ({"img_size": side_px} if name == "test_vit" else {})
    network = make_network(name, **built)
    spec = Preprocess(
        height_px=side_px,
        width_px=side_px,
        crop_frac=0.9,
        interpolation="bilinear",
        mean=(0.1, 0.2, 0.3),
        std=(0.4, 0.5, 0.6),
    )
    write_package(
        tmp_path / "p",
        network=network.to(memory_format=torch.channels_last),
        architecture=Architecture(name, len(CLASS_NAMES), args),
        class_names=CLASS_NAMES,
        class_descriptions=[f"the {n}" for n in CLASS_NAMES],
        preprocess=spec,
        golden=None,
        golden_kind="synthetic",
        name=name,
        license="mit",
    )
    opened = timm.create_model(f"local-dir:{tmp_path / 'p'}", pretrained=True).eval()
    images = torch.randn(3, 3, side_px, side_px)
    with torch.no_grad():
        expected = network(images)
        torch.testing.assert_close(opened(images), expected, rtol=0, atol=1e-5)
    assert expected.abs().max() > 0.5
    config = timm.data.resolve_model_data_config(opened)
    assert tuple(config["input_size"]) == (3, side_px, side_px)
    assert (config["crop_pct"], config["interpolation"]) == (0.9, "bilinear")
    assert (tuple(config["mean"]), tuple(config["std"])) == (spec.mean, spec.std)
    assert tuple(opened.pretrained_cfg["label_names"]) == CLASS_NAMES
    assert opened.pretrained_cfg["label_descriptions"]["hobby"] == "the hobby"
    adapted = timm.create_model(f"local-dir:{tmp_path / 'p'}", pretrained=True, num_classes=3)
    assert adapted.get_classifier().out_features == 3


def test_writes_nothing_but_the_package(made: Made, tmp_path: Path) -> None:
    package = write_falcons(tmp_path / "deep" / "p", made.module, made.golden)
    assert _names(package.path) == {"manifest.json", *package.manifest.files}
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["p"]
    assert package.manifest.golden.model_dump() == {"kind": "synthetic", "count": 6}
    assert check_golden(package, made.eager).passed


def test_the_working_directory_is_a_name_too(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_falcons(Path("p"), made.module, made.golden)
    open_package("p").check_files()


def test_an_existing_folder_is_refused(made: Made, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write_falcons(tmp_path / "empty", made.module, made.golden)
    with pytest.raises(PackageError, match="must be empty or not exist"):
        write_falcons(tmp_path / "empty", made.module, made.golden)
    (tmp_path / "file").write_text("x")
    with pytest.raises(PackageError, match="Got a file"):
        write_falcons(tmp_path / "file", made.module, made.golden)


@pytest.mark.parametrize("manifest", [None, "{}", '{"name": "an extension"}', "[]", "not json"])
def test_only_a_package_can_be_replaced(made: Made, tmp_path: Path, manifest: str | None) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(PackageError, match="must be a package to be replaced"):
        write_falcons(tmp_path, made.module, made.golden, replace=True)
    assert (tmp_path / "thesis.txt").read_text() == "x"


@pytest.mark.parametrize("at_once", [True, False])
def test_replacing(
    folder: Path, made: Made, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    if not at_once:  # as on a system without such a call
        monkeypatch.setattr(folder_module, "_exchange_at_once", lambda *_: False)
    package = write_falcons(folder, made.module, made.golden, name="second", replace=True)
    assert package.manifest.name == "second"
    assert package.manifest.variants == {}
    assert _names(folder) == {"manifest.json", *package.manifest.files}
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


@pytest.mark.skipif(sys.platform != "linux", reason="the call is Linux's")
def test_exchange_is_one_step_on_linux(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert folder_module._exchange_at_once(tmp_path / "a", tmp_path / "b")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b"]
    exchange(tmp_path / "a", tmp_path / "b")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["a"]


def test_a_failing_exchange_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "_exchange_at_once", lambda *_: False)
    (tmp_path / "old").mkdir()
    with pytest.raises(OSError, match="No such file"):
        exchange(tmp_path / "absent", tmp_path / "old")
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"class_names": ("a", "a", "b", "c", "d")}, "'a' 2 times"),
        ({"architecture": Architecture("test_resnet", 4)}, "Got 5 and 4"),
    ],
)
def test_parts_that_do_not_fit_write_nothing(
    made: Made, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(PackageError, match=words):
        write_falcons(tmp_path / "p", made.module, made.golden, **changes)
    assert list(tmp_path.iterdir()) == []


def test_golden_samples_of_another_size_write_nothing(
    made: Made, package: Package, tmp_path: Path
) -> None:
    larger = package.preprocess.model_copy(update={"height_px": 40})
    with pytest.raises(PackageError, match="40 x 32 px"):
        write_falcons(tmp_path / "p", made.module, made.golden, preprocess=larger)
    assert not (tmp_path / "p").exists()


def test_values_that_are_not_json_are_an_error_of_the_caller(made: Made, tmp_path: Path) -> None:
    for metrics in ({"loss": float("nan")}, {"loss": {1, 2}}):
        with pytest.raises((ValueError, TypeError)):
            write_falcons(tmp_path / "p", made.module, made.golden, metrics=metrics)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_refuses_is_one_sentence(
    made: Made, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fieldmark.packaging.write.write_atomic", full)
    with pytest.raises(PackageError, match="cannot be written. No space left on device"):
        write_falcons(tmp_path / "p", made.module, made.golden)
    with pytest.raises(PackageError, match="cannot be written. No space left on device"):
        add_variant(folder, "onnx", b"x", kind="onnx")


def test_a_variant_is_named_by_its_content_and_replaces_the_older(folder: Path) -> None:
    old = open_package(folder).manifest.variants["onnx"].file
    record_parity(folder, "onnx", file=old, golden=CHECK, parity=None)
    (folder / "variants" / "notes.txt").write_text("mine")
    package = add_variant(folder, "onnx", b"new bytes", kind="onnx", opset=20)
    variant = package.manifest.variants["onnx"]
    assert variant.file != old
    assert variant.file.startswith("variants/onnx-")
    assert variant.golden is None  # it was measured of the other bytes
    assert not (folder / old).exists()
    assert (folder / "variants" / "notes.txt").read_text() == "mine"
    assert old not in package.manifest.files
    assert package.read(variant.file) == b"new bytes"
    assert add_variant(folder, "onnx", b"new bytes", kind="onnx", opset=20).id == package.id
    package.check_files()


def test_both_files_of_openvino_have_one_name_and_are_replaced_together(folder: Path) -> None:
    old = open_package(folder).manifest.variants["openvino"].files
    assert [Path(file).suffix for file in old] == [".xml", ".bin"]
    assert len({Path(file).stem for file in old}) == 1  # as OpenVINO itself looks for the second
    graph = (folder / old[0]).read_bytes()
    package = add_variant(folder, "openvino", graph, kind="openvino", weights=b"other")
    new = package.manifest.variants["openvino"].files
    assert not {*old} & {*new}  # the graph is the same, but not what it means
    assert [package.read(file) for file in new] == [graph, b"other"]
    assert {path.name for path in (folder / "variants").glob("openvino*")} == {
        Path(file).name for file in new
    }
    assert package.num_bytes(package.manifest.variants["openvino"]) == len(graph) + 5
    package.check_files()


@pytest.mark.parametrize("name", ["", "../x", "a/b", "A", "-x", "x" * 65])
def test_names_of_variants_are_plain(folder: Path, name: str) -> None:
    before = _names(folder)
    with pytest.raises(PackageError, match="a variant's name must be"):
        add_variant(folder, name, b"x", kind="onnx")
    assert _names(folder) == before


def test_changing_what_is_no_package_leaves_no_lock_there(tmp_path: Path) -> None:
    with pytest.raises(PackageError, match=r"no manifest\.json"):
        add_variant(tmp_path, "onnx", b"x", kind="onnx")
    assert list(tmp_path.iterdir()) == []


def test_measurements_of_a_file_that_was_replaced_are_refused(folder: Path) -> None:
    file = open_package(folder).manifest.variants["onnx"].file
    package = record_parity(folder, "onnx", file=file, golden=CHECK, parity=None)
    assert package.manifest.variants["onnx"].golden == CHECK
    add_variant(folder, "onnx", b"other", kind="onnx")
    with pytest.raises(PackageError, match="changed meanwhile"):
        record_parity(folder, "onnx", file=file, golden=CHECK, parity=None)
    with pytest.raises(PackageError, match="changed meanwhile"):
        record_parity(folder, "gone", file=file, golden=CHECK, parity=None)


def test_a_reader_is_told_when_a_variant_was_replaced(folder: Path, package: Package) -> None:
    add_variant(folder, "onnx", b"other", kind="onnx")
    with pytest.raises(PackageError, match="changed since it was opened. Open it again"):
        package.read(package.manifest.variants["onnx"].file)


def test_manifest_is_readable_by_people(folder: Path) -> None:
    text = (folder / "manifest.json").read_text()
    assert text.startswith('{\n  "format_version": 1,\n')
    assert json.loads(text)["classes"][0]["name"] == "kestrel"

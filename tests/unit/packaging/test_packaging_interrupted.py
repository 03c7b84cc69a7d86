"""Changers at the same time, and killed ones: the folder opens, as the old or the new."""

import os
import resource
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging_data import Made, edit_manifest, write_falcons

import fieldmark.packaging.folder as folder_module
from fieldmark.errors import PackageError
from fieldmark.model import InferenceModule
from fieldmark.packaging.entries import VariantKind
from fieldmark.packaging.folder import exchange, locked
from fieldmark.packaging.manifest import open_package
from fieldmark.packaging.write import add_variant


def _names(folder: Path) -> set[str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix() for path in files} - {".lock"}


def test_changers_at_the_same_time_lose_nothing(folder: Path) -> None:
    names = [f"v{i}" for i in range(8)]
    threads = [
        threading.Thread(target=add_variant, args=(folder, n, n.encode()), kwargs={"kind": "onnx"})
        for n in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    package = open_package(folder)
    assert set(package.manifest.variants) == {"onnx", "torchscript", "pt2", "openvino", *names}
    package.check_files()


def test_a_lock_that_is_never_given_back_is_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "LOCK_WAIT_S", 0.1)
    with locked(folder), pytest.raises(PackageError, match="two processes at once"):
        add_variant(folder, "onnx", b"x", kind="onnx")
    add_variant(folder, "onnx", b"x", kind="onnx")


def test_a_lock_of_a_folder_that_was_replaced_guards_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    opened = folder_module._open_lock
    replaced = []

    def replace_once(folder: Path) -> Any:
        file = opened(folder)
        if not replaced:
            replaced.append(True)
            exchange(tmp_path / "a", tmp_path / "b")
        return file

    monkeypatch.setattr(folder_module, "_open_lock", replace_once)
    with locked(tmp_path / "a"), (tmp_path / "a" / ".lock").open() as file:
        monkeypatch.undo()
        assert not folder_module._try_lock(file, tmp_path / "a" / ".lock")  # we do hold it


def test_a_folder_that_cannot_be_locked_is_one_sentence(folder: Path) -> None:
    (folder / ".lock").unlink(missing_ok=True)
    (folder / ".lock").mkdir()
    with pytest.raises(PackageError, match="must be writable"):
        add_variant(folder, "onnx", b"x", kind="onnx")


def _run_and_die(step: int, change: Callable[[], object]) -> bool:
    """Run `change` in a child that dies at its `step`-th touch of a file; return whether it did."""
    events = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "fcntl.flock"}
    child = os.fork()
    if child == 0:
        count = 0

        def die(event: str, _: object) -> None:
            nonlocal count
            if event in events:
                count += 1
                if count == step:
                    os._exit(9)

        sys.addaudithook(die)
        try:
            change()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["onnx", "openvino"])  # of one file, and of two
def test_killed_at_any_step_a_change_leaves_the_old_or_the_new(
    folder: Path, tmp_path: Path, kind: VariantKind
) -> None:
    old = open_package(folder).id
    outcomes = []
    for step in range(1, 200):
        copy = Path(shutil.copytree(folder, tmp_path / f"copy{step}"))

        def change(copy: Path = copy) -> None:
            weights = b"more" if kind == "openvino" else b""
            add_variant(copy, kind, b"new bytes", kind=kind, weights=weights)

        died = _run_and_die(step, change)
        package = open_package(copy)
        package.check_files()
        outcomes.append(package.id == old)
        change()  # the lock died with its process, and what was left lying about goes
        after = open_package(copy)
        assert _names(copy) == {"manifest.json", *after.manifest.files}
        shutil.rmtree(copy)
        if not died:
            break
    else:
        pytest.fail("the change never ended")
    assert len(outcomes) > 8
    assert outcomes[0]
    assert not outcomes[-1]
    assert outcomes == sorted(outcomes, reverse=True)  # once new, never old again


def test_a_disk_that_fills_up_within_a_file_leaves_the_old(folder: Path) -> None:
    before, names = open_package(folder), _names(folder)
    child = os.fork()
    if child == 0:
        try:
            # Enough for the variant, but not for the whole manifest, which comes after it.
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
            add_variant(folder, "onnx", b"new bytes", kind="onnx", opset=20)
        except PackageError:
            os._exit(3)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    assert (folder / "manifest.json").stat().st_size > 500
    assert open_package(folder).id == before.id
    open_package(folder).check_files()
    assert names <= _names(folder)
    after = add_variant(folder, "onnx", b"other bytes", kind="onnx", opset=20)
    assert _names(folder) == {"manifest.json", *after.manifest.files}


@pytest.mark.slow
def test_killed_at_any_step_replacing_leaves_the_old_or_the_new(
    folder: Path, made: Made, tmp_path: Path
) -> None:
    edit_manifest(folder, name="old")
    small = InferenceModule(torch.nn.Linear(2, 5), (0.5,) * 3, (0.5,) * 3)
    names = []
    for step in range(1, 400, 2):
        place = tmp_path / f"place{step}"
        copy = Path(shutil.copytree(folder, place / "p"))

        def change(copy: Path = copy) -> None:
            write_falcons(copy, small, None, name="new", replace=True)

        died = _run_and_die(step, change)
        package = open_package(copy)
        package.check_files()
        names.append(package.manifest.name)
        shutil.rmtree(place)
        if not died:
            break
    else:
        pytest.fail("the change never ended")
    assert names[0] == "old"
    assert names[-1] == "new"
    assert names == sorted(names, reverse=True)

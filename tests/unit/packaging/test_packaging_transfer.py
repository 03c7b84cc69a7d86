"""Packages through file systems: complete and checked, or not there."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from packaging_data import edit_manifest

from fieldmark.errors import ConfigError, IntegrityError, PackageError, PlaceError
from fieldmark.packaging import transfer
from fieldmark.packaging.draft import as_it_is, with_golden, with_license
from fieldmark.packaging.golden import read_golden
from fieldmark.packaging.manifest import CARD, Package, open_package
from fieldmark.packaging.places import MARKER, FileSystemPlace, open_place
from fieldmark.packaging.transfer import check_destination, send, take

CARD_TEXT = b"# card\n"


def put(
    package: Package, place: FileSystemPlace, *, replace: bool = False, card: bytes = CARD_TEXT
) -> str:
    there = check_destination(place)
    draft = as_it_is(package)
    return send(draft, card, place, there=there, keep_card=True, replace=replace)


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def memory() -> Iterator[str]:
    yield "memory://packages/falcons"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def share(tmp_path: Path) -> Path:
    """The folder of the place below."""
    return tmp_path / "far" / "share"


@pytest.fixture
def place(share: Path) -> FileSystemPlace:
    return FileSystemPlace(f"file://{share}")


@pytest.fixture
def other(made: Any, tmp_path: Path) -> Package:
    """Another package, with one variant fewer and so fewer files."""
    from packaging_data import write_falcons

    return write_falcons(tmp_path / "other", made.module, None, name="other")


def test_a_package_comes_back_as_it_went(package: Package, memory: str, tmp_path: Path) -> None:
    place = FileSystemPlace(memory)
    assert put(package, place) == "package"
    assert place.read(MARKER, 100) is None
    got = take(place, tmp_path / "got", expect=package.id)
    got.check_files()
    assert got.id == package.id
    assert names(got.path) == {"manifest.json", CARD, *package.manifest.files}
    for name in package.manifest.files:
        assert (got.path / name).read_bytes() == (package.path / name).read_bytes()
    assert (got.path / CARD).read_bytes() == CARD_TEXT
    assert put(package, place) == "nothing"
    assert put(package, place, card=b"# edited\n") == "card"
    assert place.read(CARD, 100) == b"# edited\n"


def test_a_folder_of_something_else_is_refused(
    package: Package, place: FileSystemPlace, share: Path
) -> None:
    share.mkdir(parents=True)
    for name in ("thesis.tex", "a", "b", "c"):
        (share / name).write_text("x")
    with pytest.raises(PlaceError, match=r"must be empty, or hold a package\. Got a, b, c and 1 m"):
        check_destination(place)
    shutil.rmtree(share)
    share.write_text("a file")
    with pytest.raises(PlaceError, match="must be empty, or hold a package. Got share"):
        check_destination(place)


def test_another_package_is_replaced_only_when_asked(
    package: Package, other: Package, place: FileSystemPlace, share: Path
) -> None:
    put(package, place)
    with pytest.raises(PlaceError, match="It holds 'falcons' with the id .* give --replace"):
        put(other, place)
    assert open_package(share).id == package.id
    assert put(other, place, replace=True) == "package"
    assert names(share) == {"manifest.json", CARD, *other.manifest.files}
    open_package(share).check_files()
    (share / "manifest.json").write_text("{")
    with pytest.raises(PlaceError, match="It holds one that cannot be read: .*--replace"):
        put(other, place)
    assert put(other, place, replace=True) == "package"


def test_what_is_written_is_read_back(
    package: Package, place: FileSystemPlace, share: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = place._fs.open

    def lossy(path: str, mode: str = "rb", **more: Any) -> Any:
        file = opened(path, mode, **more)
        if mode == "wb" and path.endswith("config.json"):
            write = file.write
            file.write = lambda data: write(data[:-1] + b"?")
        return file

    monkeypatch.setattr(place._fs, "open", lossy)
    with pytest.raises(IntegrityError, match="config.json must hold the .* bytes that were sent"):
        put(package, place)
    monkeypatch.undo()
    with pytest.raises(PackageError, match="It has no manifest.json"):
        open_package(share)
    assert put(package, place) == "package"


@pytest.mark.parametrize("damage", ["flip", "shorter", "longer", "missing"])
def test_a_file_that_is_not_as_the_manifest_says_is_refused(
    package: Package, place: FileSystemPlace, share: Path, tmp_path: Path, damage: str
) -> None:
    put(package, place)
    file = share / "model.safetensors"
    data = file.read_bytes()
    changed = {"flip": bytes([data[0] ^ 1]) + data[1:], "shorter": data[:-1], "longer": data + b"x"}
    file.write_bytes(changed[damage]) if damage in changed else file.unlink()
    with pytest.raises((IntegrityError, PlaceError), match="model.safetensors"):
        take(place, tmp_path / "got")
    assert not list(tmp_path.glob("*got*"))


def test_no_more_than_the_manifest_says_is_taken(
    package: Package, tmp_path: Path, share: Path, place: FileSystemPlace
) -> None:
    put(package, place)
    taken = 0

    class Endless(FileSystemPlace):
        def chunks(self, name: str, at_most: int) -> Iterator[bytes]:
            nonlocal taken
            while taken < 10_000_000:  # far more than it was told to give
                taken += 1000
                yield b"x" * 1000

    with pytest.raises(IntegrityError, match="It has more"):
        take(Endless(f"file://{share}"), tmp_path / "got")
    first = next(iter(package.manifest.files.values()))
    assert taken <= first.bytes + 1000
    assert not list(tmp_path.glob("*got*"))


def test_what_would_fill_the_disk_is_refused_first(
    package: Package, place: FileSystemPlace, share: Path, tmp_path: Path
) -> None:
    put(package, place)
    files = json.loads((share / "manifest.json").read_text())["files"]
    files["model.safetensors"]["bytes"] = 10**18
    edit_manifest(share, files=files)
    with pytest.raises(PackageError, match=r"must have 1e\+06 TB free"):
        take(place, tmp_path / "got")
    assert not list(tmp_path.glob("*got*"))


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "manifest.json", "a\\b"])
def test_a_manifest_cannot_name_files_elsewhere(
    package: Package, place: FileSystemPlace, share: Path, tmp_path: Path, name: str
) -> None:
    put(package, place)
    files = json.loads((share / "manifest.json").read_text())["files"]
    edit_manifest(share, files=files | {name: files["config.json"]})
    with pytest.raises(PackageError, match="relative path inside|must not list itself"):
        take(place, tmp_path / "deep" / "got")
    assert not list(tmp_path.rglob("*evil*"))
    assert not (tmp_path / "deep").exists()


def test_only_files_that_the_manifest_names_are_taken(
    package: Package, place: FileSystemPlace, share: Path, tmp_path: Path
) -> None:
    put(package, place)
    (share / "run_me.py").write_text("raise SystemExit")
    (share / CARD).write_bytes(b"x" * (transfer.MAX_CARD_BYTES + 1))
    got = take(place, tmp_path / "got")
    assert names(got.path) == {"manifest.json", *package.manifest.files}


def test_an_id_that_was_not_expected_is_refused_before_anything_is_taken(
    package: Package, place: FileSystemPlace, tmp_path: Path
) -> None:
    put(package, place)
    with pytest.raises(IntegrityError, match=f"Got {package.id}"):
        take(place, tmp_path / "got", expect="0" * 64)
    assert not list(tmp_path.glob("*got*"))


def test_what_exists_is_not_written_over(
    package: Package, place: FileSystemPlace, tmp_path: Path
) -> None:
    put(package, place)
    (tmp_path / "got").mkdir()
    with pytest.raises(PackageError, match="got must not exist"):
        take(place, tmp_path / "got")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(PackageError, match="link must not exist"):
        take(place, tmp_path / "link")


def test_a_place_that_fails_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PlaceError, match="It has no manifest.json"):
        take(FileSystemPlace("memory://nothing/here"), tmp_path / "got")
    with pytest.raises(ConfigError, match="must name a folder"):
        FileSystemPlace("file:///")
    with pytest.raises(ConfigError, match="must be hf:OWNER/NAME"):
        open_place("hf:a/b/c", is_source=True)
    words = FileSystemPlace("memory://user:secret@host/x?sig=abc").words
    assert words == "memory://host/x"


def test_a_draft_changes_what_it_says_and_nothing_else(package: Package) -> None:
    draft = as_it_is(package)
    assert draft.id == package.id
    assert with_license(draft, "apache-2.0") is draft
    other = with_license(draft, "mit")
    assert other.manifest.license == "mit"
    assert json.loads(other.read("config.json"))["pretrained_cfg"]["license"] == "mit"
    assert other.manifest.variants == draft.manifest.variants
    none = with_golden(other, None)
    assert none.manifest.golden.count == 0
    assert not [name for name in none.manifest.files if name.startswith("golden/")]
    assert none.manifest.variants["onnx"].golden is None
    golden = with_golden(none, read_golden(package))
    assert golden.manifest.golden.kind == "synthetic"
    assert len(read_golden(golden).encoded) == 6
    for name, entry in golden.manifest.files.items():
        with golden.open(name) as file:
            assert hashlib.sha256(file.read()).hexdigest() == entry.sha256
    assert open_package(package.path).id == package.id


def killed_at(step: int, work: Callable[[], object]) -> bool:
    """Run `work` in a child that kills itself at its `step`-th touch of a file."""
    events = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}
    child = os.fork()
    if child == 0:
        count = 0

        def die(event: str, _: object) -> None:
            nonlocal count
            if event in events:
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(die)
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL)
    return status != 0


@pytest.mark.slow
def test_killed_at_any_step_a_push_opens_only_when_it_is_whole(
    package: Package, other: Package, tmp_path: Path
) -> None:
    for old in (None, other):
        opened = []
        for step in range(1, 400):
            share = tmp_path / f"share{step}"
            place = FileSystemPlace(f"file://{share}")
            if old is not None:
                put(old, place)
            died = killed_at(step, lambda place=place: put(package, place, replace=True))
            try:
                found = open_package(share)
            except PackageError:
                opened.append("")
            else:
                found.check_files()
                opened.append(found.manifest.name)
            put(package, place, replace=True)
            assert open_package(share).id == package.id
            assert names(share) == {"manifest.json", CARD, *package.manifest.files}
            shutil.rmtree(share)
            if not died:
                break
        else:
            pytest.fail("the push never ended")
        assert len(opened) > 20
        assert opened[-1] == "falcons"
        order = ["" if old is None else "other", "", "falcons"]
        assert [name for i, name in enumerate(opened) if i == 0 or name != opened[i - 1]] == (
            order if old is not None else order[1:]
        )


@pytest.mark.slow
def test_killed_at_any_step_a_pull_leaves_nothing_that_opens(
    package: Package, place: FileSystemPlace, tmp_path: Path
) -> None:
    put(package, place)
    ended = []
    for step in range(1, 400):
        home = tmp_path / f"home{step}"
        out = home / "got"
        died = killed_at(step, lambda out=out: take(place, out))
        ended.append(out.exists())
        if out.exists():
            open_package(out).check_files()
            with contextlib.suppress(FileNotFoundError):
                (out / ".lock").unlink()
        else:
            take(place, out).check_files()
        assert [path.name for path in home.iterdir()] == ["got"]
        assert names(out) == {"manifest.json", CARD, *package.manifest.files}
        shutil.rmtree(home)
        if not died:
            break
    else:
        pytest.fail("the pull never ended")
    assert len(ended) > 20
    assert ended == sorted(ended)

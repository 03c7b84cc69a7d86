"""Sending a package to a place and taking one from it, checked on either side. Torch-free."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Literal

from fieldmark.errors import ConfigError, IntegrityError, PackageError, PlaceError
from fieldmark.packaging.draft import Draft
from fieldmark.packaging.entries import FileEntry
from fieldmark.packaging.folder import LOCK, locked
from fieldmark.packaging.manifest import (
    CARD,
    MANIFEST,
    Manifest,
    Package,
    open_package,
    read_manifest,
)
from fieldmark.packaging.places import MAX_MANIFEST_BYTES, Place
from fieldmark.runtime.files import size_text, sync_folder, write_atomic
from fieldmark.runtime.log import track, warn

MAX_CARD_BYTES = 1_000_000
Sent = Literal["package", "card", "nothing"]


def check_destination(place: Place) -> bytes | None:
    """Return the manifest that is at a place to be written to, or None: nothing is.

    Raises:
        PlaceError: it cannot be reached, or holds something else than a package.
    """
    place.check_writer()
    text = place.read(MANIFEST, MAX_MANIFEST_BYTES)
    strangers = place.strangers() if text is None else []
    if strangers:
        more = f" and {len(strangers) - 3} more" if len(strangers) > 3 else ""
        raise PlaceError(
            f"{place.words} must be empty, or hold a package. "
            f"Got {', '.join(strangers[:3])}{more}. Choose another place."
        )
    return text


def send(
    draft: Draft, card: bytes, place: Place, *, there: bytes | None, keep_card: bool, replace: bool
) -> Sent:
    """Send a package and say what was sent: a package that is there already is not sent again.

    Args:
        there: the manifest that is at the place, as `check_destination` found it.
        keep_card: `card` was written by a person, and goes in the place of another one there.
        replace: put the package in the place of another one.

    Raises:
        PlaceError: the place refuses, or holds another package.
        IntegrityError: what was read back is not what was sent.
    """
    old: set[str] = set()
    if there is not None:
        try:
            manifest, found = read_manifest(there, place.words)
            old, holds = set(manifest.files), f"{manifest.name!r} with the id {found[:12]}"
        except PackageError as error:
            found, holds = "", f"one that cannot be read: {error}"
        if found == draft.id:
            place.finish()
            if keep_card and place.read(CARD, MAX_CARD_BYTES) != card:
                place.send_card(card)
                return "card"
            return "nothing"
        if not replace:
            raise PlaceError(
                f"{place.words} must be empty, or hold this package, whose id is {draft.id[:12]}. "
                f"It holds {holds.rstrip('.')}. Choose another place, or give --replace."
            )
    place.send(draft, card, old)
    return "package"


def take(place: Place, out: Path, *, expect: str = "") -> Package:
    """Return the package taken from a place into `out`, each file checked as it comes.

    It is built in a hidden folder beside `out`, without a manifest until all else is there, and
    then renamed.

    Args:
        expect: the id that the package must have; "" takes any.

    Raises:
        PlaceError: the place cannot be reached, or holds no package.
        PackageError: `out` exists, or there is no room.
        IntegrityError: another id than expected, or a file that is not what the manifest says.
    """
    if out.exists() or out.is_symlink():
        raise PackageError(f"{out} must not exist. Choose another folder with --out.")
    text = place.read(MANIFEST, MAX_MANIFEST_BYTES + 1)
    if text is None:
        raise PlaceError(f"{place.words} must hold a package. It has no {MANIFEST}.")
    if len(text) > MAX_MANIFEST_BYTES:
        raise PackageError(
            f"{place.words}/{MANIFEST} must have at most {size_text(MAX_MANIFEST_BYTES)}. "
            "It has more, so it is no manifest."
        )
    manifest, found = read_manifest(text, place.words)
    if expect and found != expect:
        raise IntegrityError(
            f"{place.words} must hold the package with the id {expect}. Got {found}, "
            f"{manifest.name!r}. Ask who gave you the id."
        )
    if MANIFEST in manifest.files:
        raise PackageError(f"{place.words}/{MANIFEST} must not list itself. It does.")
    out = Path(os.path.abspath(out))
    new = out.with_name(f".{out.name}.pull")
    try:
        _check_room(manifest, out)
        new.mkdir(parents=True, exist_ok=True)
        with locked(new):  # against another pull to the same folder
            try:
                _fill(place, new, manifest, text)
                new.rename(out)
            finally:
                shutil.rmtree(new, ignore_errors=True)
        sync_folder(out.parent)
    except OSError as error:
        raise PackageError(f"{out} cannot be written. {error.strerror or error}.") from error
    (out / LOCK).unlink(missing_ok=True)
    return open_package(out)


def check_expected(expect: str) -> str:
    """Return the id in lower case, or raise ConfigError: it is not one."""
    if expect and (len(expect) != 64 or set(expect.lower()) - set("0123456789abcdef")):
        raise ConfigError(
            f"--expect must be the id of a package: 64 digits of 0-9 and a-f. Got {expect!r}."
        )
    return expect.lower()


def _fill(place: Place, new: Path, manifest: Manifest, text: bytes) -> None:
    for path in new.iterdir():  # of a pull that was killed
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
    for name in track(manifest.files, "taking", len(manifest.files), "files"):
        target = new / name
        target.parent.mkdir(parents=True, exist_ok=True)
        _take_file(place, name, target, manifest.files[name])
    if CARD not in manifest.files:
        card = place.read(CARD, MAX_CARD_BYTES + 1)
        if card is not None and len(card) > MAX_CARD_BYTES:
            warn(f"{CARD} of {place.words} is left out: more than {size_text(MAX_CARD_BYTES)}")
        elif card is not None:
            write_atomic(new / CARD, card)
    write_atomic(new / MANIFEST, text)


def _take_file(place: Place, name: str, target: Path, entry: FileEntry) -> None:
    """Copy one file, never more than it should have, and compare its checksum."""
    digest, num_bytes = hashlib.sha256(), 0
    with target.open("xb") as file:
        for chunk in place.chunks(name, entry.bytes + 1):
            num_bytes += len(chunk)
            if num_bytes > entry.bytes:
                break
            digest.update(chunk)
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())
    if num_bytes != entry.bytes:
        more = "more" if num_bytes > entry.bytes else f"only {num_bytes}"
        raise IntegrityError(
            f"{name} of {place.words} must have {entry.bytes} bytes. It has {more}. Pull again; "
            "if that does not help, it was altered there."
        )
    if digest.hexdigest() != entry.sha256:
        raise IntegrityError(
            f"{name} of {place.words} must match its SHA-256 in the manifest. It was altered on "
            "the way or there. Pull again."
        )


def _check_room(manifest: Manifest, out: Path) -> None:
    """Refuse what would fill the disk, before anything is taken."""
    parent = next(path for path in out.parents if path.exists())
    needed = sum(entry.bytes for entry in manifest.files.values())
    free = shutil.disk_usage(parent).free
    if needed > free:
        raise PackageError(
            f"{parent} must have {size_text(needed)} free for this package. "
            f"It has {size_text(free)}. Make room, or choose another disk."
        )

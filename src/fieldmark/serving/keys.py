"""API keys: a file of names and hashes, and the door that asks for one.

A key is 256 random bits, so its SHA-256 cannot be turned back by guessing and needs no salt. The
file never holds a key itself. A change of the file is noticed while the service runs, so that
taking a key away needs no restart.
"""

import datetime as dt
import hashlib
import hmac
import math
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Literal

from pydantic import Field, ValidationError

from fieldmark.errors import ConfigError, FieldmarkError, UnknownName
from fieldmark.packaging.entries import Entry
from fieldmark.runtime import log
from fieldmark.runtime.files import write_json

PREFIX = "fm_"
LOOK_EVERY_S = 1.0  # at the file
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class KeyEntry(Entry):
    """One key, as the file holds it."""

    name: str = Field(pattern=_NAME.pattern + "$")
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    created: dt.date
    expires: dt.date | None = None  # the first day on which it is no longer taken, UTC
    images_per_minute: int | None = Field(None, gt=0)


class KeyFile(Entry):
    """The content of the file."""

    format_version: Literal[1] = 1
    keys: tuple[KeyEntry, ...] = ()


def read_keys(path: Path) -> KeyFile:
    """Return the content of a file of keys.

    Raises:
        ConfigError: it is not there, or is no such file.
    """
    try:
        found = KeyFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"keys must be a file that can be read. Got {path}: {error.strerror}. "
            f"Make it: fieldmark keys add NAME --file {path}."
        ) from error
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"]) or "its JSON"
        raise ConfigError(
            f"keys must be a file that `fieldmark keys` wrote. {path} is damaged at {where}."
        ) from None
    names = [entry.name for entry in found.keys]
    if len(set(names)) < len(names):
        raise ConfigError(f"keys in {path} must have different names. Two have the same.")
    return found


def add_key(
    path: Path,
    name: str,
    *,
    expires: dt.date | None = None,
    images_per_minute: int | None = None,
) -> str:
    """Add a key to the file, which is made where there is none; return the key, kept nowhere else.

    Raises:
        ConfigError: the name is in use or cannot be one, or the file cannot be read or written.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            "name must have 1 to 64 letters, digits, dots, dashes or underscores, the first a "
            f"letter or digit. Got {name!r}."
        )
    if expires is not None and expires <= _today():
        raise ConfigError(f"expires must be a day to come. Got {expires}.")
    if images_per_minute is not None and images_per_minute < 1:
        raise ConfigError(f"per_minute must be at least 1. Got {images_per_minute}.")
    found = read_keys(path) if path.exists() else KeyFile()
    if name in {entry.name for entry in found.keys}:
        raise ConfigError(
            f"name must be new in {path}. {name!r} is in use: run fieldmark keys remove {name}."
        )
    key = PREFIX + secrets.token_urlsafe(32)
    entry = KeyEntry(
        name=name,
        sha256=_hash(key),
        created=_today(),
        expires=expires,
        images_per_minute=images_per_minute,
    )
    _write(path, (*found.keys, entry))
    return key


def remove_key(path: Path, name: str) -> None:
    """Remove a key from the file: a running service stops taking it within a second or two.

    Raises:
        UnknownName: there is no such key.
        ConfigError: the file cannot be read or written.
    """
    found = read_keys(path)
    names = [entry.name for entry in found.keys]
    if name not in names:
        raise UnknownName.among("key", name, names)
    _write(path, tuple(entry for entry in found.keys if entry.name != name))


def _write(path: Path, entries: tuple[KeyEntry, ...]) -> None:
    try:
        write_json(path, KeyFile(keys=entries).model_dump(mode="json"), prepare=_as_before(path))
    except OSError as error:
        raise ConfigError(
            f"keys must be a file that can be written. Got {path}: {error.strerror}."
        ) from error


def _as_before(path: Path) -> Callable[[Path], None]:
    """Return what gives a new file the owner, group and mode of the one that it will replace.

    Before it does: a service that looks in between must be able to read it.
    """
    before = path.stat() if path.exists() else None

    def prepare(new: Path) -> None:
        made = new.stat()
        if before is not None and (before.st_uid, before.st_gid) != (made.st_uid, made.st_gid):
            os.chown(new, before.st_uid, before.st_gid)
        os.chmod(new, 0o600 if before is None else stat.S_IMODE(before.st_mode))

    return prepare


class BadKey(FieldmarkError):
    """No key, or one that is not taken."""

    code = "bad_key"
    reason = "key"  # of a refusal, as the metrics name it
    http_status = 401


@dataclass(slots=True)
class Allowance:
    """The images that a key may still send: as many as a minute allows, refilled all the time."""

    per_minute: int
    left: float
    since: float = field(default_factory=lambda: monotonic())

    def take(self, num_images: int) -> float:
        """Take some and return 0, or take none and return the seconds until there are enough.

        More than a minute's worth at once is taken when the allowance is full, and owed.
        """
        now = monotonic()
        rate = self.per_minute / 60
        self.left = min(self.per_minute, self.left + (now - self.since) * rate)
        self.since = now
        wanted = min(num_images, self.per_minute)
        if self.left < wanted:
            return (wanted - self.left) / rate
        self.left -= num_images
        return 0.0


class Keys:
    """The keys of a file, read again when it changes. Belongs to one event loop."""

    def __init__(self, path: Path) -> None:
        """Read the file, or raise ConfigError."""
        self._path = path
        self._stamp = self._stat()
        self._failed: tuple[float, int, int] | None = None  # the stamp of what could not be read
        self._entries = read_keys(path).keys
        self._looked = monotonic()
        self._allowances: dict[str, Allowance] = {}

    def name_of(self, headers: Mapping[str, str]) -> str:
        """Return the name of the key that a request carries.

        Raises:
            BadKey: it carries none, or one that is not taken.
        """
        key = _carried(headers)
        if key is None:
            raise BadKey("a request must carry a key: Authorization: Bearer KEY. It has none.")
        self._look()
        entry = _find(self._entries, key)
        if entry is None:
            raise BadKey("the key must be one of this service. It is not. Ask for another.")
        if entry.expires is not None and entry.expires <= _today():
            raise BadKey(f"the key must be valid. It expired on {entry.expires}. Ask for another.")
        return entry.name

    def wait_s(self, name: str, num_images: int) -> float:
        """Take images from what a key may send; return 0, or the seconds until it may."""
        entry = next((one for one in self._entries if one.name == name), None)
        if entry is None or entry.images_per_minute is None:
            return 0.0
        found = self._allowances.get(name)
        if found is None or found.per_minute != entry.images_per_minute:
            found = Allowance(entry.images_per_minute, entry.images_per_minute)
            self._allowances[name] = found
        return found.take(num_images)

    def _look(self) -> None:
        now = monotonic()
        if now - self._looked < LOOK_EVERY_S:
            return
        self._looked = now
        stamp = self._stat()
        if stamp == self._stamp:
            return
        try:
            self._entries = read_keys(self._path).keys
        except ConfigError as error:
            if stamp != self._failed:  # once for each change
                log.warn(f"{error} The keys known before are still taken.")
            self._failed = stamp
        else:
            self._stamp = stamp
            log.say(f"{self._path} was read again: {len(self._entries)} keys")

    def _stat(self) -> tuple[float, int, int]:
        try:
            found = self._path.stat()
        except OSError:
            return math.nan, 0, 0  # equal to nothing: it is looked at again
        return found.st_mtime_ns, found.st_size, found.st_ino


def _carried(headers: Mapping[str, str]) -> str | None:
    kind, _, key = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key", "").strip() or None


def _find(entries: Iterable[KeyEntry], key: str) -> KeyEntry | None:
    """Return the entry of a key; how long that takes does not tell how near a guess is."""
    wanted = _hash(key)
    found = None
    for entry in entries:
        if hmac.compare_digest(entry.sha256, wanted):
            found = entry
    return found


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def _today() -> dt.date:
    return dt.datetime.now(dt.UTC).date()

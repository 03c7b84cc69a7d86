"""Where packages are sent to and taken from: any file system that fsspec knows. Torch-free.

On a file system there is no way to change many files at once. So the manifest, without which
nothing opens, goes first and comes last, and while it is away a marker says whose files these are.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import IO, Any, Protocol

from pydantic import TypeAdapter, ValidationError

from fieldmark.errors import (
    ConfigError,
    FieldmarkError,
    IntegrityError,
    MissingDependency,
    PlaceError,
    require,
)
from fieldmark.packaging.draft import Draft
from fieldmark.packaging.entries import FileEntry, RelativePath
from fieldmark.packaging.manifest import CARD, MANIFEST
from fieldmark.runtime.files import sha256_bytes
from fieldmark.runtime.log import track

MARKER = ".fieldmark-push.json"
CHUNK_BYTES = 1 << 20
MAX_MANIFEST_BYTES = 100_000_000
HUB = "hf:"
_PASSWORD = re.compile(r"//[^/@\s]*@")
_QUERY = re.compile(r"\?\S+")
_NAMES = TypeAdapter(list[RelativePath])


class Place(Protocol):
    """A folder somewhere else. Every method raises PlaceError where the other side refuses."""

    words: str  # its address, without passwords

    def read(self, name: str, at_most: int) -> bytes | None:
        """Return a file's content, cut after `at_most` bytes; None: there is no such file."""

    def chunks(self, name: str, at_most: int) -> Iterator[bytes]:
        """Yield a file's content in parts, and stop after `at_most` bytes."""

    def check_writer(self) -> None:
        """Raise PlaceError where it is known beforehand that nothing can be written."""

    def strangers(self) -> list[str]:
        """Return names that lie here and are not of a package, nor of one that is half sent."""

    def send(self, draft: Draft, card: bytes, old: Iterable[str]) -> None:
        """Put the package here in the place of the files `old`; read back what was written.

        Raises:
            IntegrityError: what is here now is not what was sent.
        """

    def send_card(self, card: bytes) -> None:
        """Put another model card beside the package that is here."""

    def finish(self) -> None:
        """Remove what a killed `send` of the package that is here has left."""


def open_place(address: str, *, is_source: bool) -> Place:
    """Return the place of an address: hf:OWNER/NAME[@REVISION], or a URL.

    Args:
        is_source: it is read, so that a repository must exist.

    Raises:
        ConfigError: it is neither.
        MissingDependency: the library for it is not installed.
    """
    if address.startswith(HUB):
        from fieldmark.packaging.hub import open_hub

        return open_hub(address, must_exist=is_source)
    if "://" not in address:
        name = "SOURCE" if is_source else "DESTINATION"
        raise ConfigError(
            f"{name} must be hf:OWNER/NAME or a URL such as file:///srv/packages/birds. "
            f"Got {address!r}. For a folder of this machine write file:// before its full path, "
            "or copy it with cp -r."
        )
    require("fsspec", "hub", "push and pull")
    return FileSystemPlace(address)


class FileSystemPlace:
    """A folder of a file system that fsspec opens: file://, s3://, gs://, memory:// ..."""

    def __init__(self, url: str) -> None:
        """Open the file system of `url`."""
        from fsspec.core import url_to_fs

        self.words = without_secrets(url.rstrip("/"))
        protocol = url.partition("://")[0]
        try:
            fs, path = url_to_fs(url)
        except ImportError as error:
            raise MissingDependency(
                f"{self.words} needs another library. {one_line(error)}."
            ) from error
        except ValueError as error:
            raise ConfigError(
                f"{self.words} must be of a file system that fsspec knows. "
                f"Got {protocol}://. {one_line(error)}."
            ) from error
        self._fs: Any = fs
        self._root = str(path).rstrip("/")
        if not self._root:
            raise ConfigError(f"{url} must name a folder in that file system. It names its root.")
        fs.invalidate_cache()

    def read(self, name: str, at_most: int) -> bytes | None:
        """Return a file's content, cut after `at_most` bytes; None: there is no such file."""
        with explained(self.words):
            try:
                with self._fs.open(self._path(name), "rb") as file:
                    return bytes(file.read(at_most))
            except (FileNotFoundError, NotADirectoryError):
                return None

    def chunks(self, name: str, at_most: int) -> Iterator[bytes]:
        """Yield a file's content in parts, and stop after `at_most` bytes."""
        with (
            explained(f"{self.words}/{name}"),
            self._fs.open(self._path(name), "rb") as file,
        ):
            yield from read_chunks(file, at_most)

    def check_writer(self) -> None:
        """Do nothing: a file system says so when it is written to."""

    def strangers(self) -> list[str]:
        """Return the names in the folder, unless a marker says that they are ours."""
        with explained(self.words):
            try:
                found = [str(path) for path in self._fs.ls(self._root, detail=False)]
            except FileNotFoundError:
                return []
        names = {path.rstrip("/").rsplit("/", 1)[-1] for path in found}
        return [] if MARKER in names else sorted(names)

    def send(self, draft: Draft, card: bytes, old: Iterable[str]) -> None:
        """Write marker, files, model card and manifest; remove the files `old` and the marker."""
        files = draft.manifest.files
        stale = ({*old} | self._marked()) - {*files}
        with explained(self.words):
            self._make_parents([MARKER])
            self._write(MARKER, json.dumps(sorted({*files} | stale)).encode())
            if self._fs.exists(self._path(MANIFEST)):
                self._fs.rm_file(self._path(MANIFEST))
            self._make_parents(files)  # after the marker: a folder alone would be a stranger
            for name in track(files, "sending", len(files), "files"):
                with draft.open(name) as source, self._fs.open(self._path(name), "wb") as target:
                    while chunk := source.read(CHUNK_BYTES):
                        target.write(chunk)
                self._read_back(name, files[name])
            self._write(CARD, card)
            self._write(MANIFEST, draft.text)
        self._remove(stale)

    def send_card(self, card: bytes) -> None:
        """Put another model card beside the package that is here."""
        with explained(self.words):
            self._write(CARD, card)

    def finish(self) -> None:
        """Remove what a killed `send` of the package that is here has left."""
        marked = self._marked()
        if marked:
            text = self.read(MANIFEST, MAX_MANIFEST_BYTES) or b"{}"
            self._remove(marked - {*json.loads(text).get("files", {})})

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _marked(self) -> set[str]:
        """Return the names that an unfinished `send` may have written."""
        text = self.read(MARKER, MAX_MANIFEST_BYTES)
        if text is None:
            return set()
        try:
            return set(_NAMES.validate_json(text))
        except ValidationError:  # it was being written
            return {MARKER}

    def _make_parents(self, names: Iterable[str]) -> None:
        for folder in sorted({self._path(name).rsplit("/", 1)[0] for name in names}):
            self._fs.makedirs(folder, exist_ok=True)

    def _write(self, name: str, data: bytes) -> None:
        self._fs.pipe_file(self._path(name), data)
        self._read_back(name, FileEntry(sha256=sha256_bytes(data), bytes=len(data)))

    def _read_back(self, name: str, entry: FileEntry) -> None:
        digest, num_bytes = hashlib.sha256(), 0
        for chunk in self.chunks(name, entry.bytes + 1):
            digest.update(chunk)
            num_bytes += len(chunk)
        if (num_bytes, digest.hexdigest()) != (entry.bytes, entry.sha256):
            raise IntegrityError(
                f"{self.words}/{name} must hold the {entry.bytes} bytes that were sent. "
                f"Read back, it has {num_bytes} bytes, or others. Push again."
            )

    def _remove(self, stale: Iterable[str]) -> None:
        with explained(self.words):
            for name in sorted({*stale} - {MARKER}):
                with contextlib.suppress(FileNotFoundError):
                    self._fs.rm_file(self._path(name))
            with contextlib.suppress(FileNotFoundError):
                self._fs.rm_file(self._path(MARKER))


def read_chunks(file: IO[bytes], at_most: int) -> Iterator[bytes]:
    """Yield what an open file has left, at most `at_most` bytes of it."""
    while at_most > 0 and (chunk := file.read(min(CHUNK_BYTES, at_most))):
        at_most -= len(chunk)
        yield chunk


@contextmanager
def explained(words: str) -> Iterator[None]:
    """Turn what a file system raises into a PlaceError of one sentence."""
    try:
        yield
    except FieldmarkError:
        raise
    except FileNotFoundError as error:
        raise PlaceError(f"{words} must exist. It does not.") from error
    except PermissionError as error:
        raise PlaceError(
            f"{words} must be open to you. {one_line(error)}. Check the rights there."
        ) from error
    # Each file system raises what its own library does, and those have no base but Exception.
    except Exception as error:  # noqa: BLE001
        raise PlaceError(
            f"{words} must be reachable and allow this. {one_line(error)}. Try again."
        ) from error


def one_line(error: BaseException) -> str:
    """Return an error's text in one line, without passwords and signed queries."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return without_secrets(" ".join(text.split()))[:200].rstrip(".") or type(error).__name__


def without_secrets(text: str) -> str:
    """Return `text` without the user and password, and without the query, of any URL in it."""
    return _QUERY.sub("", _PASSWORD.sub("//", text))

"""Files that are either the old one or the new one, whatever happens in between."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# No space on the disk, none in the user's share of it, and the limit of a file's size.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_atomic(
    path: Path, *parts: bytes | memoryview, prepare: Callable[[Path], None] = lambda new: None
) -> None:
    """Write the parts under a temporary name, flush them to the disk, then rename to `path`.

    Args:
        prepare: is called with the temporary file before that, to change its mode or owner.

    Raises:
        OSError: nothing changed, and the temporary file is gone. When there was no room, the
            error's text has the bytes needed and those free.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _room_explained(path, sum(len(part) for part in parts)):
        try:
            with temporary.open("wb") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
            prepare(temporary)
            temporary.replace(path)
        finally:
            with contextlib.suppress(OSError):  # never in the place of the error that led here
                temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def append_whole(path: Path, data: bytes) -> None:
    """Add `data` to the end of a file and flush it to the disk, or leave the file as it was.

    Raises:
        OSError: as for `write_atomic`. Only a process that is killed leaves a part of the data.
    """
    with _room_explained(path, len(data)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            before = os.fstat(descriptor).st_size
            try:
                rest = memoryview(data)
                while rest:  # the last bytes of a disk are written before it is found to be full
                    rest = rest[os.write(descriptor, rest) :]
                os.fsync(descriptor)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, before)
                raise
        finally:
            os.close(descriptor)
    if not before:
        sync_folder(path.parent)


def is_disk_full(error: BaseException | None) -> bool:
    """Whether this error, or one that it was raised from, says that there is no room."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        hidden = error.__suppress_context__
        error = error.__cause__ or (None if hidden else error.__context__)
    return False


def remove_temporary(folder: Path) -> None:
    """Delete what a killed process left half written in `folder`; another must not be writing."""
    for path in list(folder.glob(".*.tmp")):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_json(
    path: Path, value: Any, *, prepare: Callable[[Path], None] = lambda new: None
) -> None:
    """Write `value` as indented JSON, atomically; NaN is refused. `prepare`: see write_atomic."""
    text = json.dumps(value, indent=2, sort_keys=False, allow_nan=False, ensure_ascii=False)
    write_atomic(path, (text + "\n").encode(), prepare=prepare)


def read_json(path: Path) -> Any:
    """Return the parsed content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def sync_folder(folder: Path) -> None:
    """Make renames in `folder` durable, where the system can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows cannot open a folder
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def sha256_bytes(data: bytes | memoryview) -> str:
    """Return the SHA-256 of `data`, hex."""
    return hashlib.sha256(data).hexdigest()


def size_text(num_bytes: float) -> str:
    """Return bytes as text a person reads: 512 bytes, 3.2 MB, 15 GB (powers of ten)."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if num_bytes >= size:
            return f"{num_bytes / size:.3g} {unit}"
    return f"{num_bytes:.0f} bytes"


@contextlib.contextmanager
def _room_explained(path: Path, num_bytes: int) -> Iterator[None]:
    """Add to an error of a full disk how many bytes were needed, and how many are free."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        text = f"{error.strerror} ({size_text(num_bytes)} needed{_free(path, error.errno)})"
        raise OSError(error.errno, text, str(path)) from error


def _free(path: Path, number: int) -> str:
    if number != errno.ENOSPC:  # a share or a limit was used up: the disk may have room
        return ""
    try:
        return f", {size_text(shutil.disk_usage(path.parent).free)} free"
    except OSError:
        return ""

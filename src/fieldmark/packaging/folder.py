"""Changing a folder so that a reader finds the old content or the new. Torch-free."""

import ctypes
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fieldmark.errors import PackageError

LOCK = ".lock"
LOCK_WAIT_S = 30.0  # a change takes as long as copying one model file
_POLL_S = 0.05
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes and threads from changing `folder` while the block runs.

    The kernel drops the lock with the process, so that a killed one leaves none behind.

    Raises:
        PackageError: another holds it for LOCK_WAIT_S, or the folder cannot be written to.
    """
    deadline = time.monotonic() + LOCK_WAIT_S
    while True:
        with _open_lock(folder) as file:
            if _try_lock(file, folder / LOCK):
                yield
                return
        if time.monotonic() > deadline:
            raise PackageError(
                f"{folder} must not be changed by two processes at once. "
                f"Another has been changing it for {LOCK_WAIT_S:.0f} s. Wait for it and retry."
            )
        time.sleep(_POLL_S)


def exchange(first: Path, second: Path) -> None:
    """Exchange the names of two folders side by side, at once where the system can do it."""
    if _exchange_at_once(first, second):
        return
    aside = first.with_name(first.name + ".old")
    second.rename(aside)
    try:
        first.rename(second)
    except OSError:
        aside.rename(second)
        raise
    aside.rename(first)


def _open_lock(folder: Path) -> IO[str]:
    try:
        return (folder / LOCK).open("a")
    except OSError as error:
        raise PackageError(f"{folder} must be writable. {error.strerror}.") from error


def _try_lock(file: IO[str], path: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The folder may have been replaced while we waited: then this lock guards nothing.
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _exchange_at_once(first: Path, second: Path) -> bool:
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    names = os.fsencode(first), os.fsencode(second)
    return bool(rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)

"""A disk that is small enough to be really full."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(folder: Path, num_bytes: int) -> Iterator[Path]:
    """Yield `folder`, made to be a file system in memory of so many bytes; skip if not allowed."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a file system needs root")
    try:
        yield folder
    finally:
        # Lazily: a lock that a failed test still holds must not keep it mounted for ever.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)

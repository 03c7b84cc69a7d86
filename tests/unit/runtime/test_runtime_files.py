"""Files on a disk that is really full, and under a limit that is really reached."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_disk import mounted

from fieldmark.runtime.files import (
    append_whole,
    is_disk_full,
    remove_temporary,
    size_text,
    write_atomic,
)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB in memory."""
    with mounted(tmp_path / "disk", 2**20) as folder:
        yield folder


def test_on_a_full_disk_the_old_file_stays_and_no_other_is_left(small_disk: Path) -> None:
    path = small_disk / "file"
    write_atomic(path, b"old ", b"content")
    (small_disk / "other").write_bytes(bytes(900_000))
    with pytest.raises(OSError, match="200 kB needed, 1.* kB free") as caught:
        write_atomic(path, bytes(100_000), memoryview(bytes(100_000)))
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    assert is_disk_full(caught.value)
    assert path.read_bytes() == b"old content"
    assert sorted(entry.name for entry in small_disk.iterdir()) == ["file", "other"]
    (small_disk / "other").unlink()
    write_atomic(path, bytes(200_000))
    assert path.stat().st_size == 200_000


def test_on_a_full_disk_nothing_of_a_line_is_added(small_disk: Path) -> None:
    path = small_disk / "lines"
    append_whole(path, b"first\n")
    (small_disk / "other").write_bytes(bytes(1_040_000))
    with pytest.raises(OSError, match="needed"):
        append_whole(path, b"x" * 200_000)  # a part of it finds room
    assert path.read_bytes() == b"first\n"
    (small_disk / "other").unlink()
    append_whole(path, b"second\n")
    assert path.read_bytes() == b"first\nsecond\n"


LIMITED = """
import os, resource, sys
from pathlib import Path
from fieldmark.runtime.files import append_whole, is_disk_full, write_atomic
folder = Path(sys.argv[1])
append_whole(folder / "lines", b"first\\n")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
for write in (write_atomic, append_whole):
    try:
        write(folder / "lines", bytes(2000))
    except OSError as error:
        print(is_disk_full(error), error.strerror)
print(sorted(os.listdir(folder)), (folder / "lines").read_bytes())
"""


def test_a_limit_of_the_file_size_is_met_as_a_full_disk_is(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "True File too large (2 kB needed)",
        "True File too large (2 kB needed)",
        "['lines'] b'first\\n'",
    ]


def test_a_cause_is_found_however_it_was_wrapped() -> None:
    full = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    outer = ValueError("x")
    outer.__cause__ = full
    assert is_disk_full(outer)
    hidden = ValueError("x")
    hidden.__context__, hidden.__suppress_context__ = full, True
    assert not is_disk_full(hidden)
    assert not is_disk_full(OSError(errno.EACCES, "no"))
    assert not is_disk_full(None)


def test_temporary_files_and_folders_are_removed_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".package.12.tmp").mkdir()
    (tmp_path / ".package.12.tmp" / "weights").write_bytes(b"x")
    for name in (".config.json.12.tmp", "config.json", ".lock", "notes.tmp"):
        (tmp_path / name).write_bytes(b"x")
    remove_temporary(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "config.json", "notes.tmp"]


def test_sizes_are_written_as_people_read_them() -> None:
    texts = [size_text(n) for n in (0, 999, 1000, 3_210_000, 14_200_000_000, 2e12)]
    assert texts == ["0 bytes", "999 bytes", "1 kB", "3.21 MB", "14.2 GB", "2 TB"]

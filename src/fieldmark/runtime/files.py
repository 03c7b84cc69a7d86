"""Files that are either the old one or the new one, whatever happens in between."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` under a temporary name, flush it to the disk, then rename it to `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN is refused."""
    text = json.dumps(value, indent=2, sort_keys=False, allow_nan=False, ensure_ascii=False)
    write_atomic(path, (text + "\n").encode())


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


def sha256_bytes(data: bytes) -> str:
    """Return the SHA-256 of `data`, hex."""
    return hashlib.sha256(data).hexdigest()

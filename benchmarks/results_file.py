"""Results files: what was measured, where, with what, how often, and how far it spread.

A benchmark of minutes writes its file once, at the end (`write`). One of hours adds a row for each
thing it has measured (`append_row`) and asks before each whether it has that row (`has_row`), so
that it may be killed at any time and goes on where it was.
"""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fieldmark.runtime.cpu import cpu_name, instruction_set, num_cores
from fieldmark.runtime.files import write_atomic

Row = dict[str, Any]
Summarise = Callable[[list[Row]], dict[str, Any]]

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("fieldmark", "torch", "torchvision", "timm", "numpy", "pillow", "onnxruntime")


def machine() -> dict[str, Any]:
    """Return the facts that figures depend on."""
    return {
        "cpu": cpu_name(),
        "instruction_set": instruction_set(),
        "cores": num_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in LIBRARIES},
    }


def spread(values: Sequence[float]) -> dict[str, float | int]:
    """Return n, median, minimum and maximum."""
    return {
        "n": len(values),
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
    }


def write(name: str, command: str, content: dict[str, Any]) -> Path:
    """Write benchmarks/results/NAME.json and return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    head = {"command": command, "machine": machine(), "commit": _commit()}
    path.write_text(json.dumps(head | content, indent=2) + "\n")
    print(f"wrote {path}", file=sys.stderr)
    return path


def rows(name: str) -> list[Row]:
    """Return the rows of benchmarks/results/NAME.json, oldest first; none without a file."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return []
    found: list[Row] = json.loads(path.read_text())["rows"]
    return found


def has_row(found: Sequence[Row], key: Mapping[str, Any]) -> bool:
    """Return whether a row has all these values."""
    return any(all(row.get(name) == value for name, value in key.items()) for row in found)


def append_row(name: str, command: str, row: Row, summarise: Summarise | None = None) -> Path:
    """Add a row with its machine, commit and date to benchmarks/results/NAME.json, atomically.

    Args:
        summarise: all rows -> what stands above them, anew with each row.
    """
    where = {"commit": _commit(), "date": time.strftime("%F"), "machine": machine()}
    return write_rows(name, command, [*rows(name), row | where], summarise)


def write_rows(
    name: str, command: str, found: list[Row], summarise: Summarise | None = None
) -> Path:
    """Write all rows, each on one line, below their summary; return the file's path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    head = json.dumps({"command": command} | (summarise(found) if summarise else {}), indent=2)
    lines = ",\n".join(f"    {json.dumps(row)}" for row in found)
    text = head.removesuffix("\n}") + ',\n  "rows": [\n' + lines + "\n  ]\n}\n"
    write_atomic(path, text.encode())
    return path


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"

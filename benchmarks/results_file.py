"""Results files: what was measured, where, with what, how often, and how far it spread."""

import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fieldmark.runtime.cpu import cpu_name, instruction_set, num_cores

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


def _commit() -> str:
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"

"""Fail unless the newest release in CHANGELOG.md is the version of the package."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSION_RE = r'^__version__ = "([^"]+)"$'
RELEASE_RE = r"^## \[(\d[^\]]*)\] - \d{4}-\d{2}-\d{2}$"


def find_first(pattern: str, path: Path) -> str:
    """Return the first group of the first match, or stop with a sentence."""
    match = re.search(pattern, path.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        sys.exit(f"{path.relative_to(ROOT)} must have a line like {pattern}.")
    return match[1]


version = find_first(VERSION_RE, ROOT / "src/fieldmark/__init__.py")
release = find_first(RELEASE_RE, ROOT / "CHANGELOG.md")
if version != release:
    sys.exit(f"CHANGELOG.md must open with version {version}. Got {release}. Add a section for it.")

"""Paths of this machine in what a package records, shortened before it goes elsewhere."""

import re
from typing import Any

# What is not prose: names of files in the package, of classes, and the preprocessing.
_KEPT = {"files", "classes", "preprocess", "architecture", "format_version", "license"}
_FOLDER_SPEC = re.compile(r"((?:folder|imagenet|local-dir):)(.+)", re.DOTALL)
_WHOLE_PATH = re.compile(r"((?:hf:)?)((?:/(?!/)|~|\.\.?/).+)", re.DOTALL)
# A path of two parts or more within a sentence; not the path of https://host/path.
_PATH_INSIDE = re.compile(r"(?<![\w/.])~?/(?!/)(?:[^\s/,;'\"()]+/)+[^\s/,;'\"()]*")
_FILE_URL = re.compile(r"file:/+(?=/)")


def shorten_paths(content: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a manifest's content with local paths reduced to their last parts.

    "folder:/home/me/photos" becomes "folder:photos", wherever it is named. Class names, names of
    files in the package and addresses on the web stay.

    Returns:
        The content, and the texts that were shortened, sorted.
    """
    prose = {key: value for key, value in content.items() if key not in _KEPT}
    known = sorted({text for text in _texts(prose) if _short(text) != text}, key=len, reverse=True)
    shortened: set[str] = set()

    def replace(text: str) -> str:
        new = _short(text)
        if new == text:
            for long in known:  # before the pattern, which ends a path at a space
                new = new.replace(long, _short(long))
            new = _PATH_INSIDE.sub(lambda match: _last(match[0]), _FILE_URL.sub("file:", new))
        if new != text:
            shortened.add(text)
        return new

    changed = {key: _mapped(value, replace) for key, value in prose.items()}
    # A path that is named alone and within a sentence is told once.
    once = [t for t in shortened if not any(t != other and other in t for other in shortened)]
    return content | changed, sorted(once)


def _short(text: str) -> str:
    """Return `text` shortened if all of it is a path, with or without the word before it."""
    match = _FOLDER_SPEC.fullmatch(text) or _WHOLE_PATH.fullmatch(text)
    return text if match is None else match[1] + _last(match[2])


def _last(path: str) -> str:
    return path.rstrip("/").rsplit("/", 1)[-1] or "data"


def _texts(value: Any) -> list[str]:
    found: list[str] = []
    _mapped(value, lambda text: found.append(text) or text)  # type: ignore[func-returns-value]
    return found


def _mapped(value: Any, change: Any) -> Any:
    """Return `value` with `change` applied to each text in it; keys stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_mapped(item, change) for item in value]
    if isinstance(value, dict):
        # `file` of a variant names a file of the package.
        return {
            key: item if key == "file" else _mapped(item, change) for key, item in value.items()
        }
    return value

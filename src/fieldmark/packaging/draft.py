"""A package as it will be sent: the one on the disk, with some files changed in memory. Torch-free.

Nothing of it is written to the disk here, so that a process that is killed leaves no copy behind.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fieldmark.packaging.entries import GoldenCheck
from fieldmark.packaging.golden import GoldenSamples
from fieldmark.packaging.manifest import (
    MANIFEST,
    TIMM_CONFIG,
    Package,
    read_manifest,
)
from fieldmark.packaging.privacy import shorten_paths
from fieldmark.runtime.files import sha256_bytes


@dataclass(frozen=True, slots=True)
class Draft(Package):
    """A package of which some files are in memory, and the others in the folder `path`."""

    text: bytes  # of its manifest.json
    new: Mapping[str, bytes]  # content of the files that are not those in the folder

    def read(self, relative: str) -> bytes:
        """Return the content of a file, checked where it comes from the folder."""
        # Not super(): a dataclass with slots is another class than the one compiled here.
        return self.new[relative] if relative in self.new else Package.read(self, relative)

    def open(self, relative: str) -> IO[bytes]:
        """Return a file open for reading; whoever copies it compares the checksum."""
        if relative in self.new:
            return io.BytesIO(self.new[relative])
        return self._located(relative).open("rb")

    def content(self, relative: str) -> bytes | Path:
        """Return a file's bytes, or where they lie."""
        return self.new[relative] if relative in self.new else self._located(relative)

    @property
    def total_bytes(self) -> int:
        """Size of all files that the manifest lists."""
        return sum(entry.bytes for entry in self.manifest.files.values())


def as_it_is(package: Package) -> Draft:
    """Return the package unchanged, with the id that it has."""
    text = (package.path / MANIFEST).read_bytes()
    manifest, package_id = read_manifest(text, package.path)
    return Draft(package.path, manifest, package_id, text, {})


def with_golden(draft: Draft, golden: GoldenSamples | None) -> Draft:
    """Return the draft with these golden samples, drawn ones, in the place of its own.

    What variants did with the old ones is dropped: see `with_checks`.
    """
    content = json.loads(draft.text)
    new = golden.files() if golden is not None else {}
    content["golden"] = (
        {"kind": "synthetic", "count": len(golden.encoded)}
        if golden is not None
        else {"kind": "none", "count": 0}
    )
    content["files"] = {
        name: entry for name, entry in content["files"].items() if not name.startswith("golden/")
    }
    for variant in content.get("variants", {}).values():
        variant["golden"] = None
    kept = {name: data for name, data in draft.new.items() if not name.startswith("golden/")}
    return _changed(draft, content, kept, new)


def with_checks(draft: Draft, checks: Mapping[str, GoldenCheck]) -> Draft:
    """Return the draft with what variants, by name, did with its golden samples."""
    if not checks:
        return draft
    content = json.loads(draft.text)
    for name, check in checks.items():
        content["variants"][name]["golden"] = check.model_dump(mode="json")
    return _changed(draft, content, draft.new, {})


def with_license(draft: Draft, license: str) -> Draft:
    """Return the draft under this licence, which timm's config names too."""
    content = json.loads(draft.text)
    if content.get("license", "") == license:
        return draft
    content["license"] = license
    config = json.loads(draft.read(TIMM_CONFIG))
    if isinstance(config.get("pretrained_cfg"), dict):
        config["pretrained_cfg"]["license"] = license
    return _changed(draft, content, draft.new, {TIMM_CONFIG: _json_bytes(config)})


def with_short_paths(draft: Draft) -> tuple[Draft, list[str]]:
    """Return the draft without paths of this machine, and the texts that were shortened."""
    content, shortened = shorten_paths(json.loads(draft.text))
    return (_changed(draft, content, draft.new, {}) if shortened else draft), shortened


def _changed(
    draft: Draft, content: dict[str, Any], kept: Mapping[str, bytes], new: Mapping[str, bytes]
) -> Draft:
    for name, data in new.items():
        content["files"][name] = {"sha256": sha256_bytes(data), "bytes": len(data)}
    text = _json_bytes(content)
    manifest, package_id = read_manifest(text, draft.path)
    return Draft(draft.path, manifest, package_id, text, {**kept, **new})


def _json_bytes(content: Any) -> bytes:
    return (json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()

"""What a package says of itself, and the opening of one. Torch-free.

A package is a folder:

    manifest.json         all below by size and SHA-256, and what was measured; written last
    model.safetensors     the network's weights, named as timm names them
    config.json           timm's own, for timm.create_model("local-dir:PACKAGE", pretrained=True)
    golden/               original images, the pixels and logits they must give, answers.json
    variants/             exported models, named by content: onnx-1a2b3c4d.onnx; of OpenVINO
                          two files of one name, .xml and .bin
    README.md             the model card, where there is one: for people, may be edited, not checked
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, Self

from pydantic import Field, JsonValue, ValidationError, model_validator

from fieldmark.errors import IntegrityError, PackageError, UnknownName
from fieldmark.packaging.entries import (
    ArchitectureEntry,
    ClassEntry,
    Confidence,
    Entry,
    FileEntry,
    GoldenEntry,
    RelativePath,
    Variant,
    VariantKind,
)
from fieldmark.preprocess import Preprocess
from fieldmark.runtime.files import sha256_bytes

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
CARD = "README.md"
WEIGHTS = "model.safetensors"
TIMM_CONFIG = "config.json"
GOLDEN_SAMPLES = "golden/samples.npz"
GOLDEN_ANSWERS = "golden/answers.json"


class Manifest(Entry):
    """The content of manifest.json."""

    format_version: Literal[1]
    created: str  # ISO 8601, UTC
    fieldmark_version: str
    name: str = Field(min_length=1)
    architecture: ArchitectureEntry
    classes: tuple[ClassEntry, ...]
    preprocess: Preprocess
    training: dict[str, JsonValue] | None = None
    metrics: dict[str, JsonValue] = {}  # for each split
    golden: GoldenEntry
    confidence: Confidence | None = None  # None: probabilities are the softmax of the logits
    variants: dict[str, Variant] = {}
    files: dict[RelativePath, FileEntry]
    license: str = ""
    source: str = ""  # of the weights

    def num_bytes(self, variant: Variant) -> int:
        """Return the size of all files of a variant."""
        return sum(self.files[file].bytes for file in variant.files)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        num_classes = self.architecture.num_classes
        if len(self.classes) != num_classes:
            raise ValueError(
                f"classes must be as many as architecture.num_classes. "
                f"Got {len(self.classes)} and {num_classes}"
            )
        name, count = Counter(entry.name for entry in self.classes).most_common(1)[0]
        if count > 1:
            raise ValueError(f"class names must differ. Got {name!r} {count} times")
        needed = {WEIGHTS, TIMM_CONFIG}
        needed.update(*(variant.files for variant in self.variants.values()))
        if self.golden.count:
            needed |= {GOLDEN_SAMPLES, GOLDEN_ANSWERS}
        missing = sorted(needed - self.files.keys())
        if missing:
            raise ValueError(f"files must list {missing[0]!r}")
        return self


@dataclass(frozen=True, slots=True)
class Package:
    """An opened package. Its files are read, and checked, when they are asked for."""

    path: Path
    manifest: Manifest
    id: str  # SHA-256 of the manifest, hex

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names in the order of the logits."""
        return tuple(entry.name for entry in self.manifest.classes)

    @property
    def class_descriptions(self) -> tuple[str, ...]:
        """Descriptions in the order of the logits, empty where there is none."""
        return tuple(entry.description for entry in self.manifest.classes)

    @property
    def preprocess(self) -> Preprocess:
        """How an encoded image becomes the model's input."""
        return self.manifest.preprocess

    @property
    def temperature(self) -> float:
        """What logits are divided by before softmax; 1 where confidence was not calibrated."""
        confidence = self.manifest.confidence
        return 1.0 if confidence is None else confidence.temperature

    def variant(self, name: str, kind: VariantKind) -> Variant:
        """Return the variant of this name and kind, or raise PackageError saying what to run."""
        variant = self.manifest.variants.get(name)
        if variant is None:
            if name == kind:
                raise PackageError(
                    f"{self.path} must have the variant {name!r}. Got none. "
                    f"Run: fieldmark export {self.path} --to {kind}."
                )
            raise UnknownName.among(f"variant of {self.path}", name, self.manifest.variants)
        if variant.kind != kind:
            raise PackageError(
                f"variant {name!r} of {self.path} must be {kind}. Got {variant.kind}."
            )
        return variant

    def num_bytes(self, variant: Variant) -> int:
        """Return the size of all files of a variant."""
        return self.manifest.num_bytes(variant)

    def read(self, relative: str) -> bytes:
        """Return the content of a file that the manifest lists, its size and SHA-256 checked.

        Raises:
            PackageError: the manifest does not list it, or it lies outside the folder.
            IntegrityError: it is missing, truncated or altered.
        """
        path = self._located(relative)
        entry = self.manifest.files[relative]
        self._check_size(relative, path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise IntegrityError(f"{path} must be readable. {error.strerror}.") from error
        if sha256_bytes(data) != entry.sha256:
            self._altered(relative)
        return data

    def check_files(self) -> None:
        """Check size and SHA-256 of every file, or raise IntegrityError or PackageError."""
        for relative in self.manifest.files:
            self.read(relative)

    def _located(self, relative: str) -> Path:
        if relative not in self.manifest.files:
            raise PackageError(f"{self.path / MANIFEST} must list {relative!r}. It does not.")
        path = self.path / relative
        # A link may lead elsewhere although its name stays inside. `realpath` survives loops.
        target = Path(os.path.realpath(path))
        if not target.is_relative_to(os.path.realpath(self.path)):
            raise PackageError(
                f"{relative} of {self.path} must be inside the package. It links to {target}. "
                "Copy the package with its files."
            )
        return path

    def _check_size(self, relative: str, path: Path) -> None:
        if not path.is_file():
            raise IntegrityError(
                f"{path} must exist. It is missing.{self._changed() or self._remedy(relative)}"
            )
        size, expected = path.stat().st_size, self.manifest.files[relative].bytes
        if size != expected:
            raise IntegrityError(
                f"{path} must have {expected} bytes. Got {size}, so it is truncated or altered."
                f"{self._remedy(relative)}"
            )

    def _altered(self, relative: str) -> NoReturn:
        raise IntegrityError(
            f"{self.path / relative} must match its SHA-256 in the manifest. It was altered."
            f"{self._remedy(relative)}"
        )

    def _changed(self) -> str:
        """A variant's file vanishes when another process exports anew."""
        try:
            changed = open_package(self.path).id != self.id
        except PackageError:
            return ""
        return " The package was changed since it was opened. Open it again." if changed else ""

    def _remedy(self, relative: str) -> str:
        for variant in self.manifest.variants.values():
            if relative in variant.files:
                return f" Run: {variant.made_by(self.path)}."
        return " Copy the package again, or write it anew."


def open_package(path: str | Path) -> Package:
    """Return the package in a folder; only its manifest is read.

    Raises:
        PackageError: the folder is not a package, is of a newer format, or its manifest is wrong.
    """
    folder = Path(path)
    file = folder / MANIFEST
    if not file.is_file():
        raise PackageError(_not_a_package(folder))
    try:
        text = file.read_bytes()
    except OSError as error:
        raise PackageError(f"{file} must be readable. {error.strerror}.") from error
    manifest, package_id = read_manifest(text, folder)
    return Package(folder, manifest, package_id)


def read_manifest(text: bytes, holder: str | Path) -> tuple[Manifest, str]:
    """Return the manifest that a file's content describes, and the package's id.

    Args:
        holder: where the manifest lies: a folder, or the address of one.

    Raises:
        PackageError: it is not JSON, of a newer format, or wrong.
    """
    file = f"{holder}/{MANIFEST}"
    try:
        content = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise PackageError(
            f"{file} must be readable JSON. {_one_line(error)}. Write the package anew."
        ) from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if type(version) is int and version > FORMAT_VERSION:
        raise PackageError(
            f"{holder} must have package format {FORMAT_VERSION} or older. Got format {version}. "
            f"Upgrade fieldmark; {content.get('fieldmark_version', 'a newer version')} wrote it."
        )
    return parse_manifest(text, file), manifest_id(content)


def find_package(path: Path) -> Path | None:
    """Return the package at `path`: itself, or that of a run; None if there is none."""
    if (path / MANIFEST).is_file():
        return path
    if (path / "package" / MANIFEST).is_file():
        return path / "package"
    return None


def package_folder(model: str | Path) -> Path:
    """Return the package that a path means: itself, or that of a run.

    Raises:
        PackageError: neither.
    """
    found = find_package(Path(model))
    return found if found is not None else open_package(model).path


def parse_manifest(text: str | bytes, where: str | Path) -> Manifest:
    """Return the manifest a JSON text describes; `where` names it in the PackageError."""
    try:
        return Manifest.model_validate_json(text, strict=True)
    except ValidationError as error:
        raise PackageError(f"{where} must be a package manifest. {_sentence(error)}") from error


def manifest_id(content: Any) -> str:
    """Return the SHA-256, hex, of parsed JSON in canonical form: sorted keys, ASCII, no space.

    It is taken of what the file says rather than of the model that read it, so that a later
    version, with more fields, gives a package the same id.
    """
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _not_a_package(folder: Path) -> str:
    if not folder.exists():
        return f"{folder} must be a package. It does not exist."
    if not folder.is_dir():
        return f"{folder} must be a package, which is a folder. Got a file."
    start = f"{folder} must be a package. It has no {MANIFEST}."
    if (folder / "package" / MANIFEST).is_file():
        return f"{start} It is a run: use {folder / 'package'}."
    if (folder / TIMM_CONFIG).is_file() and any(folder.glob("*.safetensors")):
        return f"{start} Run: fieldmark package local-dir:{folder} --out PACKAGE."
    return start


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__


def _sentence(error: ValidationError) -> str:
    return " ".join(_parts(error.errors()[:3]))


def _parts(items: Iterable[Any]) -> Iterable[str]:
    for item in items:
        where = ".".join(str(part) for part in item["loc"] if part != "[key]")
        if item["type"] == "value_error":
            yield item["msg"].removeprefix("Value error, ") + "."
        elif item["type"] == "missing":
            yield f"{where} must be set."
        else:
            yield f"{where}: {item['msg']}. Got {str(item['input'])[:80]!r}."

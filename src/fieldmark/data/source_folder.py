"""Folders of image files: one folder per class, with or without train, val and test above them."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fieldmark.data.classes import imagenet_descriptions
from fieldmark.data.images import FileImages
from fieldmark.data.labelled import SPLIT_NAMES, Source, Split, fingerprint
from fieldmark.errors import DataError
from fieldmark.runtime.log import warn

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_TYPES = ", ".join(suffix[1:] for suffix in SUFFIXES)


@dataclass
class _Files:
    """The image files of one split, sorted, and what was met beside them."""

    paths: list[str] = field(default_factory=list)  # relative to the source's root, with /
    sizes: list[int] = field(default_factory=list)
    class_of: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


def open_folder(root: Path, spec: str) -> Source:
    """Return train, val and test as the folder has them, or all of a folder of class folders.

    A folder is divided if one of its folders is called train, val (valid, validation) or test and
    has folders itself, or if all its folders are called so; else its folders are the classes.
    """
    children = _subfolders(root)
    named = {name: SPLIT_NAMES[name.lower()] for name in children if name.lower() in SPLIT_NAMES}
    is_divided = any(_subfolders(root / name) for name in named) or (
        bool(named) and len(named) == len(children)
    )
    if not is_divided:
        return _source(root, spec, {"all": ""}, ignored=[])
    for split in sorted(set(named.values())):
        same = [name for name, meaning in named.items() if meaning == split]
        if len(same) > 1:
            raise DataError(f"{spec} must have one {split} split. Got {same}. Rename one of them.")
    ignored = [f"{name}/" for name in children if name not in named]
    return _source(root, spec, {named[name]: name for name in named}, ignored)


def open_imagenet(root: Path, spec: str) -> Source:
    """Return ImageNet as its archives unpack: train/<wnid>/ and val/<wnid>/.

    The public validation images are the benchmark, so they are the split "test".
    """
    folders = {split: name for split, name in (("train", "train"), ("test", "val"))}
    present = {split: name for split, name in folders.items() if (root / name).is_dir()}
    if not present:
        raise DataError(f"{spec} must hold train/ and val/. Got neither. Check the path.")
    if "test" in present and not _subfolders(root / "val"):
        count = sum(1 for entry in os.scandir(root / "val") if _is_image(entry.name))
        raise DataError(
            f"{spec} must have one folder per class in val/. Got {count} images directly in it. "
            "Move each into val/<wnid>/, as the script valprep.sh of "
            "soumith/imagenetloader.torch does."
        )
    return _source(root, spec, present, ignored=[])


def _source(root: Path, spec: str, folders: Mapping[str, str], ignored: list[str]) -> Source:
    """Build the source of split name -> folder below `root`, which is "" for the root itself."""
    found = {
        split: _files(root, folders[split])
        for split in ("train", "val", "test", "all")
        if split in folders
    }
    classes = {split: _subfolders(root / folders[split]) for split in found}
    class_names = tuple(sorted({name for names in classes.values() for name in names}))
    for split, files in found.items():
        _check(spec, split, folders[split], files, class_names)
    ignored = [*ignored, *(name for files in found.values() for name in files.ignored)]
    if ignored:
        warn(
            f"{spec}: {len(ignored)} other entries were ignored, such as {ignored[0]}. "
            f"Images are files called {_TYPES} in a class folder."
        )
    class_index = {name: index for index, name in enumerate(class_names)}
    splits, contents = {}, []
    for split, files in found.items():
        labels = np.array([class_index[name] for name in files.class_of], dtype=np.int64)
        splits[split] = Split(split, FileImages(root, files.paths), labels)
        contents.append((splits[split], _content(files)))
    return Source(
        spec,
        class_names,
        imagenet_descriptions(class_names),
        splits,
        fingerprint(class_names, contents),
    )


def _check(spec: str, split: str, folder: str, files: _Files, class_names: tuple[str, ...]) -> None:
    where = f"{spec} ({folder}/)" if folder else spec
    if not files.paths:
        raise DataError(
            f"{where} must hold one folder of images per class. Got no images in such folders. "
            f"Images are files called {_TYPES}."
        )
    present = set(files.class_of)
    empty = [name for name in class_names if name not in present]
    if empty and split in ("train", "all"):
        listed = ", ".join(repr(name) for name in empty[:5])
        raise DataError(
            f"each class of {where} must have images to train on. Got none for {len(empty)} of "
            f"{len(class_names)} classes: {listed}. Add images, or remove the class folder."
        )
    for name in class_names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(
                f"class names must be valid UTF-8. Got {name!r} in {where}. Rename the folder."
            ) from None


def _files(root: Path, folder: str) -> _Files:
    files = _Files()
    top = root / folder
    prefix = f"{folder}/" if folder else ""
    above = (_identity(root), _identity(top))
    for entry in _visible(top):
        if not entry.is_dir():
            # Beside whole splits or class folders lie things like README.md: only images count.
            if _is_image(entry.name):
                files.ignored.append(prefix + entry.name)
            continue
        inside = []
        for path, size in _walk(top / entry.name, f"{prefix}{entry.name}/", above):
            if _is_image(path):
                inside.append((path, size))
            else:
                files.ignored.append(path)
        # Sorted by the whole relative path: the order of a file system is not reproducible.
        for path, size in sorted(inside):
            files.paths.append(path)
            files.sizes.append(size)
            files.class_of.append(entry.name)
    return files


def _walk(
    folder: Path, prefix: str, above: tuple[tuple[int, int], ...]
) -> Iterator[tuple[str, int]]:
    """Yield (relative path, size) of all visible files, following links but never in a circle."""
    identity = _identity(folder)
    if identity in above:
        return
    for entry in _visible(folder):
        if entry.is_dir():
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", (*above, identity))
        else:
            try:
                yield prefix + entry.name, entry.stat().st_size
            except OSError:  # a link to nothing: reading it later names it as broken
                yield prefix + entry.name, 0


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _visible(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            found = [entry for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise DataError(f"{folder} must be readable. {error.strerror}.") from error
    return sorted(found, key=lambda entry: entry.name)


def _subfolders(folder: Path) -> list[str]:
    return [entry.name for entry in _visible(folder) if entry.is_dir()]


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _content(files: _Files) -> Iterator[bytes]:
    for path, size in zip(files.paths, files.sizes, strict=True):
        yield f"{path}\0{size}".encode("utf-8", "surrogateescape")

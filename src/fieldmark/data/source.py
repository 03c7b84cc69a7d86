"""Opening a source of labelled images from its spec, such as "digits" or "folder:photos"."""

from pathlib import Path

from fieldmark.data.images import Images
from fieldmark.data.labelled import Source, Split
from fieldmark.errors import DataError, UnknownName, require, suggestion

__all__ = ["KINDS", "Images", "Source", "Split", "open_source"]

KINDS = (
    "cifar10",
    "cifar100",
    "digits",
    "folder:PATH",
    "imagenet:PATH",
    "hf:NAME_OR_PATH",
)


def open_source(spec: str, *, image_column: str = "", label_column: str = "") -> Source:
    """Return the labelled images that `spec` names; nothing is decoded yet.

    Args:
        spec: one of KINDS.
        image_column: which column holds the images, for an hf: source with several.
        label_column: which column holds the labels, for an hf: source with several.

    Raises:
        UnknownName: the spec names no kind of source.
        DataError: the source is not there, or does not hold labelled images.
    """
    kind, colon, rest = spec.partition(":")
    if spec == "digits":
        require("sklearn", "train", "data.source=digits")
        from fieldmark.data.source_arrays import open_digits

        return open_digits()
    if spec in ("cifar10", "cifar100"):
        require("torchvision", "train", f"data.source={spec}")
        from fieldmark.data.source_arrays import open_cifar

        return open_cifar(spec)
    if kind in ("folder", "imagenet", "hf") and not rest:
        example = next(known for known in KINDS if known.startswith(kind))
        raise DataError(f"data.source must be {example}. Got {spec!r}. Name what to open.")
    if colon and kind == "folder":
        from fieldmark.data.source_folder import open_folder

        return open_folder(_existing_folder(rest, spec), spec)
    if colon and kind == "imagenet":
        from fieldmark.data.source_folder import open_imagenet

        return open_imagenet(_existing_folder(rest, spec), spec)
    if colon and kind == "hf":
        require("datasets", "train", "a data.source that starts with hf:")
        from fieldmark.data.source_hf import open_hf

        return open_hf(rest, spec, image_column=image_column, label_column=label_column)
    raise _unknown(spec, kind)


def _existing_folder(text: str, spec: str) -> Path:
    path = Path(text).expanduser()
    if path.is_dir():
        return path
    found = "a file" if path.exists() else "a path that does not exist"
    near = suggestion(path.name, _folders_in(path.parent)) if not path.exists() else ""
    raise DataError(f"{spec} must be a folder of images. Got {found}.{near or ' Check it.'}")


def _folders_in(parent: Path) -> list[str]:
    try:
        return [child.name for child in parent.iterdir() if child.is_dir()]
    except OSError:
        return []


def _unknown(spec: str, kind: str) -> UnknownName:
    known = {name.partition(":")[0]: name for name in KINDS}
    kinds = ", ".join(KINDS)
    if Path(spec).expanduser().is_dir():
        return UnknownName(
            f"data.source {spec!r} does not exist. Did you mean 'folder:{spec}'? Kinds: {kinds}."
        )
    near = suggestion(kind, known)
    hint = near if near.startswith(" Did you mean") else ""
    return UnknownName(f"data.source {spec!r} does not exist.{hint} Kinds: {kinds}.")

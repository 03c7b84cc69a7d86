"""Data sets of the Hugging Face hub, and local folders of parquet, arrow or image files."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from fieldmark.data.images import read_file
from fieldmark.data.labelled import SPLIT_NAMES, Labels, Source, Split, fingerprint
from fieldmark.errors import DataError, ImageError, UnknownName, suggestion
from fieldmark.preprocess import decode
from fieldmark.runtime.log import warn

# What a label column is called where no feature type says so.
LABEL_NAMES = ("label", "labels", "fine_label", "coarse_label", "class", "target", "category")
# Above this, the fingerprint takes each image's size instead of reading all images.
HASHED_BYTES = 2_000_000_000


class ColumnImages:
    """Encoded images in a column of a memory-mapped table: nothing is copied until it is read."""

    def __init__(self, dataset: "datasets.Dataset", column: str, split: str) -> None:
        # The data set and not its column is kept: it is pickled to a worker as the names of its
        # files, a column as all its bytes.
        self._dataset, self._column, self._split = dataset, column, split

    def __len__(self) -> int:
        return len(self._dataset)

    def name(self, index: int) -> str:
        """Return the split and the row."""
        return f"{self._split}[{index}]"

    def encoded(self, index: int) -> bytes:
        """Return the bytes in the row, or of the file that the row names."""
        row = self._dataset.data.column(self._column)[index].as_py() or {}
        if row.get("bytes") is not None:
            return row["bytes"]
        if row.get("path"):
            return read_file(Path(row["path"]))
        raise ImageError("image must not be empty. Got a row without bytes or path.")

    def image(self, index: int) -> Image.Image:
        """Return the decoded image."""
        return decode(self.encoded(index))

    def content(self) -> Iterator[bytes]:
        """Yield what the fingerprint takes of the column: sizes, and the bytes if not too many."""
        column = self._dataset.data.column(self._column)
        sizes = [_sizes(chunk) for chunk in column.chunks]
        yield from (block.tobytes() for block in sizes)
        if sum(int(block[block > 0].sum()) for block in sizes) > HASHED_BYTES:
            return
        for chunk in column.chunks:
            for value in pc.struct_field(chunk, "bytes"):
                yield value.as_buffer().to_pybytes() if value.is_valid else b""


def open_hf(name: str, spec: str, *, image_column: str = "", label_column: str = "") -> Source:
    """Return a data set by its hub name or local folder.

    Columns are found by their types (Image, ClassLabel). A single part is all there is, whatever
    it is called, because `datasets` calls every undivided data set "train".
    """
    parts = _named_splits(_load(name, spec), spec)
    features = next(iter(parts.values())).features
    image = _image_column(features, image_column, spec)
    label = _label_column(features, label_column, spec)
    raw = _raw_labels(parts, label, spec)
    class_names, labels = _index_labels(raw, features[label], spec)
    splits, contents = {}, []
    for split in raw:
        _check_range(labels[split], len(class_names), split, spec)
        try:
            part = parts[split].cast_column(image, datasets.Image(decode=False))
        except (TypeError, ValueError, pa.ArrowException) as error:
            raise DataError(
                f"column {image!r} of {spec} must hold images. {_brief(error)}"
            ) from error
        images = ColumnImages(part, image, split)
        splits[split] = Split(split, images, labels[split])
        contents.append((splits[split], images.content()))
    return Source(spec, class_names, None, splits, fingerprint(class_names, contents))


def _load(name: str, spec: str) -> dict[str, "datasets.Dataset"]:
    path = Path(name).expanduser()
    is_local = path.exists()
    if not is_local and (name.startswith(("/", ".", "~")) or name.count("/") > 1):
        raise DataError(f"{spec} must exist. Got a path that does not. Check it.")
    try:
        with _quiet():
            loaded = datasets.load_dataset(str(path.resolve()) if is_local else name)
    # `datasets` reaches networks, file formats and scripts, and raises nearly anything.
    except Exception as error:  # noqa: BLE001
        if is_local:
            raise DataError(
                f"{spec} must be a folder that Hugging Face datasets can load (parquet, arrow, or "
                f"images). {_brief(error)}"
            ) from error
        raise DataError(_hub_failure(name, spec, error)) from error
    return dict(loaded)


def _hub_failure(name: str, spec: str, error: Exception) -> str:
    if isinstance(error, ConnectionError):
        return (
            f"{spec} must be a local folder or a data set of the Hugging Face hub. There is no "
            f"folder {name!r}, and the hub cannot be reached. Connect, or give a path."
        )
    return (
        f"{spec} must be a local folder or a data set of the Hugging Face hub. {_brief(error)} "
        "Check the name."
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and retry messages of `datasets` and the hub client."""
    had_bars = not datasets.are_progress_bars_disabled()
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        if had_bars:
            datasets.enable_progress_bars()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _named_splits(
    loaded: dict[str, "datasets.Dataset"], spec: str
) -> dict[str, "datasets.Dataset"]:
    if len(loaded) == 1 and SPLIT_NAMES.get(next(iter(loaded))) != "test":
        return {"all": next(iter(loaded.values()))}
    found: dict[str, str] = {}
    for name in loaded:
        split = SPLIT_NAMES.get(name.lower())
        if split in found:
            raise DataError(
                f"{spec} must have one {split} split. Got {found[split]!r} and {name!r}."
            )
        if split:
            found[split] = name
    if not found:
        raise DataError(
            f"{spec} must have a split called train, validation or test. Got {sorted(loaded)}."
        )
    ignored = sorted(set(loaded) - set(found.values()))
    if ignored:
        warn(f"{spec}: other splits are ignored: {', '.join(ignored)}.")
    order = [split for split in ("train", "val", "test") if split in found]
    return {split: loaded[found[split]] for split in order}


def _image_column(features: Any, chosen: str, spec: str) -> str:
    if chosen:
        return _existing(features, chosen, "data.image_column", spec)
    found = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    return _the_one(found, features, "image", spec)


def _label_column(features: Any, chosen: str, spec: str) -> str:
    if chosen:
        return _existing(features, chosen, "data.label_column", spec)
    found = [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if not found:
        found = [name for name in features if name in LABEL_NAMES]
    return _the_one(found, features, "label", spec)


def _the_one(found: list[str], features: Any, kind: str, spec: str) -> str:
    if len(found) == 1:
        return found[0]
    got = " and ".join(repr(name) for name in found) or f"none among {', '.join(features)}"
    raise DataError(
        f"{spec} must have one {kind} column. Got {got}. Choose by data.{kind}_column=NAME."
    )


def _existing(features: Any, name: str, key: str, spec: str) -> str:
    if name not in features:
        raise UnknownName(
            f"{key} {name!r} does not exist in {spec}.{suggestion(name, list(features))}"
        )
    return name


def _raw_labels(
    parts: dict[str, "datasets.Dataset"], column: str, spec: str
) -> dict[str, pa.ChunkedArray]:
    """Return the label column of each split that has labels."""
    raw = {}
    for split, part in parts.items():
        values = part.data.column(column)
        _check_type(values.type, column, spec)
        if _is_hidden(values):
            warn(f"{spec}: split {split} is ignored: it has no images, or its labels are hidden.")
            continue
        if values.null_count:
            row = next(index for index, value in enumerate(values) if not value.is_valid)
            raise DataError(
                f"each image of {spec} must have a label. Got {values.null_count} without one, "
                f"the first {split}[{row}]. Remove them."
            )
        raw[split] = values
    if not raw:
        raise DataError(f"{spec} must have labelled images. Got none in {', '.join(parts)}.")
    return raw


def _check_type(kind: pa.DataType, column: str, spec: str) -> None:
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        raise DataError(
            f"column {column!r} of {spec} must hold one label per image. Got lists of labels, and "
            "images with several labels are not supported."
        )
    is_number = pa.types.is_integer(kind) or pa.types.is_boolean(kind)
    if not (is_number or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(
            f"column {column!r} of {spec} must hold whole numbers or text. Got {kind}. "
            "Choose another by data.label_column=NAME."
        )


def _is_hidden(values: pa.ChunkedArray) -> bool:
    """Whether there is nothing to learn: no rows, no label, or -1 everywhere as in test sets."""
    if values.null_count == len(values):
        return True
    return pa.types.is_integer(values.type) and pc.unique(values).to_pylist() == [-1]


def _index_labels(
    raw: dict[str, pa.ChunkedArray], feature: Any, spec: str
) -> tuple[tuple[str, ...], dict[str, Labels]]:
    """Return class names and each split's labels as indices into them."""
    if isinstance(feature, datasets.ClassLabel):
        names = tuple(feature.names)
        return names, {split: values.to_numpy().astype(np.int64) for split, values in raw.items()}
    # Plain numbers sort as numbers and plain text as text; both are names afterwards.
    values = sorted({value for column in raw.values() for value in pc.unique(column).to_pylist()})
    known = pa.array(values)
    labels = {
        split: pc.index_in(column, value_set=known.cast(column.type)).to_numpy().astype(np.int64)
        for split, column in raw.items()
    }
    return tuple(str(value) for value in values), labels


def _check_range(labels: Labels, num_classes: int, split: str, spec: str) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise DataError(
            f"each label of {spec} must be from 0 to {num_classes - 1}. Got {labels[wrong[0]]} in "
            f"{split}[{wrong[0]}]. Correct or remove it."
        )


def _sizes(chunk: pa.Array) -> Labels:
    lengths = pc.binary_length(pc.struct_field(chunk, "bytes"))
    return lengths.fill_null(-1).to_numpy(zero_copy_only=False).astype("<i8")


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{text[:300] or type(error).__name__}".rstrip(".") + "."

"""Classify files, folders and standard input as a stream, in order and in bounded memory."""

import csv
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from fieldmark.errors import ConfigError, ImageError
from fieldmark.preprocess import MAX_BYTES, Pixels
from fieldmark.runtime.cpu import num_cores
from fieldmark.runtime.files import sync_folder
from fieldmark.serving.predictor import Prediction, Predictor

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
STDIN = "-"


@dataclass(frozen=True, slots=True)
class FileResult:
    """The answer for one file: predictions, or why there are none."""

    file: str
    predictions: tuple[Prediction, ...] = ()
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return file, and its predictions or the error."""
        if self.error is not None:
            return {"file": self.file, "error": self.error}
        return {"file": self.file, "predictions": [asdict(ranked) for ranked in self.predictions]}


@dataclass(frozen=True, slots=True)
class _Found:
    """A file to decode, or (with an error) something that is none."""

    file: str
    error: str | None = None


def classify_files(
    predictor: Predictor,
    paths: Iterable[str | Path],
    *,
    top_k: int = 5,
    batch_size: int = 32,
    threads: int = 0,
) -> Iterator[FileResult]:
    """Yield a result for each file, in the order of `paths`; a bad file does not stop the rest.

    At most 2 * batch_size images are held at a time: while one batch is in the model, the next is
    decoded.

    Args:
        paths: files of any name, folders, which are searched for SUFFIXES in sorted order, hidden
            names left out, and "-" for one image on standard input.
        top_k: how many classes of each; at most all of them.
        threads: that decode; 0: as many as this process may use.

    Raises:
        ModelError: the model itself fails.
    """
    pool = ThreadPoolExecutor(threads or num_cores(), thread_name_prefix="decode")
    found = iter(find_files(paths))
    waiting: deque[tuple[_Found, Future[Pixels]]] = deque()
    try:
        while True:
            for item in islice(found, 2 * batch_size - len(waiting)):
                waiting.append((item, pool.submit(_decode, predictor, item)))
            if not waiting:
                return
            batch = [waiting.popleft() for _ in range(min(batch_size, len(waiting)))]
            yield from _classify(predictor, batch, top_k)
    finally:
        # The caller may stop in the middle: then nothing more is decoded.
        pool.shutdown(cancel_futures=True)


def find_files(paths: Iterable[str | Path]) -> Iterator[_Found]:
    """Yield the files that `paths` name, walking folders only as far as is asked."""
    for path in map(str, paths):
        if path == STDIN or not os.path.isdir(path):
            yield _Found(path)
            continue
        is_empty = True
        for item in _walk(path, ()):
            is_empty = False
            yield item
        if is_empty:
            yield _Found(path, f"folder must hold images ({' '.join(SUFFIXES)}). Found none.")


def write_csv(results: Iterable[FileResult], path: Path, *, top_k: int) -> tuple[int, int]:
    """Write results as they come and return how many there were, and how many with an error.

    `path` appears, or is replaced, when all are written: never half a file.

    Args:
        top_k: the columns: class_1, probability_1, ... class_K, probability_K.
    """
    num_files = num_errors = 0
    with _replacing(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        ranks = range(1, top_k + 1)
        columns = [name for rank in ranks for name in (f"class_{rank}", f"probability_{rank}")]
        writer.writerow(["file", *columns, "error"])
        for result in results:
            num_files += 1
            num_errors += result.error is not None
            cells: list[object] = []
            for prediction in result.predictions[:top_k]:
                cells += [prediction.class_name, prediction.probability]
            cells += [""] * (2 * top_k - len(cells))
            writer.writerow([result.file, *cells, result.error or ""])
    return num_files, num_errors


def _classify(
    predictor: Predictor, batch: Sequence[tuple[_Found, Future[Pixels]]], top_k: int
) -> Iterator[FileResult]:
    errors: dict[int, str] = {}
    decoded: list[Pixels] = []
    for index, (_, future) in enumerate(batch):
        try:
            decoded.append(future.result())
        except ImageError as error:
            errors[index] = str(error)
    ranked = iter(predictor.classify_pixels(np.stack(decoded), top_k) if decoded else ())
    for index, (item, _) in enumerate(batch):
        if index in errors:
            yield FileResult(item.file, error=errors[index])
        else:
            yield FileResult(item.file, tuple(next(ranked)))


def _decode(predictor: Predictor, item: _Found) -> Pixels:
    if item.error is not None:
        raise ImageError(item.error)
    try:
        encoded = _read(item.file)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise ImageError(f"file must be readable. {reason}.") from error
    return predictor.decode(encoded)


def _read(file: str) -> bytes:
    """Read one byte more than is accepted, so that `decode` refuses it and memory is bounded."""
    if file == STDIN:
        return sys.stdin.buffer.read(MAX_BYTES + 1)
    if not os.path.exists(file):
        raise ImageError("file must exist. It does not.")
    if not os.path.isfile(file):
        raise ImageError("file must be a regular file. Got a device or a pipe.")
    with open(file, "rb") as opened:
        return opened.read(MAX_BYTES + 1)


def _walk(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[_Found]:
    """Yield the images in a folder and below it; `above` are the folders that lead here."""
    try:
        status = os.stat(folder)
        here = (status.st_dev, status.st_ino)
        if here in above:  # a link back up
            return
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        yield _Found(folder, f"folder must be readable. {error.strerror}.")
        return
    for name in names:
        path = os.path.join(folder, name)
        if os.path.isdir(path):
            yield from _walk(path, (*above, here))
        elif name.lower().endswith(SUFFIXES):
            yield _Found(path)


@contextmanager
def _replacing(path: Path) -> Iterator[TextIO]:
    """Open a file beside `path`, which takes its name only if the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        # A name that is not UTF-8 is written back byte for byte.
        file = temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="")
    except OSError as error:
        raise ConfigError(f"{path} must be writable. {error.strerror}.") from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)

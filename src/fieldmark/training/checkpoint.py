"""Checkpoints that are whole or not there, and say so themselves.

A file is one line of JSON (step, best step, further facts, size and SHA-256 of what follows, and
a SHA-256 of the line itself) and then what torch.save wrote. It is written under a temporary name,
flushed, and renamed.
"""

import io
import json
import pickle
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fieldmark.errors import CheckpointError, DiskFull
from fieldmark.runtime.files import is_disk_full, sha256_bytes, write_atomic
from fieldmark.runtime.files import remove_temporary as remove_temporary
from fieldmark.runtime.log import warn

IS_STOP = "is_stop"  # in a header's `extra`: a signal made it, and only a resumed run reads it
MAGIC = "fieldmark-checkpoint-1"
_HEADER_MAX_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Best:
    """The checkpoint that validation prefers so far."""

    step: int
    top1_accuracy: float
    loss: float


@dataclass(frozen=True, slots=True)
class Header:
    """What a checkpoint says of itself."""

    step: int
    best: Best | None
    sha256: str
    num_bytes: int
    extra: dict[str, Any] = field(default_factory=dict)  # plain JSON values


class _OtherVersion(CheckpointError):
    """A checkpoint that is whole, but that this torch does not load."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the file of the checkpoint after update `step`."""
    return folder / f"step-{step:08d}.ckpt"


def save_checkpoint(
    folder: Path,
    step: int,
    state: dict[str, Any],
    best: Best | None,
    extra: dict[str, Any] | None = None,
) -> Path:
    """Write the state after update `step`.

    Args:
        state: tensors and plain values only.
        extra: facts for the header, which is read without the state; plain JSON values.

    Raises:
        DiskFull: there is no room; earlier checkpoints are untouched, and nothing of this one is
            left.
        CheckpointError: it cannot be written for another reason.
        ValueError: `extra` does not fit into the header.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()  # a view: with copies, saving might need more than an update
    header = {
        "magic": MAGIC,
        "step": step,
        "best": None if best is None else [best.step, best.top1_accuracy, best.loss],
        "extra": extra or {},
        "sha256": sha256_bytes(payload),
        "num_bytes": len(payload),
    }
    line = json.dumps(header | {"header_sha256": _digest(header)}).encode() + b"\n"
    if len(line) > _HEADER_MAX_BYTES:
        raise ValueError(f"extra must fit into {_HEADER_MAX_BYTES} bytes. Got {len(line)}.")
    path = checkpoint_path(folder, step)
    try:
        write_atomic(path, line, payload)
    except OSError as error:
        kind = DiskFull if is_disk_full(error) else CheckpointError
        raise kind(
            f"checkpoint {path} cannot be written: {error.strerror or error}. "
            "Earlier checkpoints are untouched."
        ) from error
    return path


def read_header(path: Path) -> Header:
    """Return a checkpoint's header without reading the rest.

    Raises:
        CheckpointError: the file is not a checkpoint, or its first line is damaged.
    """
    with path.open("rb") as file:
        return _parse_header(path, file.readline(_HEADER_MAX_BYTES))


def load_checkpoint(path: Path) -> tuple[Header, dict[str, Any]]:
    """Return header and state (tensors on the CPU) after checking size and checksum.

    Raises:
        CheckpointError: the file is truncated, altered, or no checkpoint.
    """
    with path.open("rb") as file:
        header = _parse_header(path, file.readline(_HEADER_MAX_BYTES))
        payload = file.read()
    if len(payload) != header.num_bytes:
        raise CheckpointError(
            f"checkpoint {path} is truncated: {len(payload)} of {header.num_bytes} bytes."
        )
    if sha256_bytes(payload) != header.sha256:
        raise CheckpointError(f"checkpoint {path} was altered: its checksum does not match.")
    try:
        state: dict[str, Any] = torch.load(
            io.BytesIO(payload), map_location="cpu", weights_only=True
        )
    except (pickle.UnpicklingError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise _OtherVersion(
            f"checkpoint {path} is whole, but torch {torch.__version__} does not load it: {reason} "
            "Resume with the versions in the run's environment.json."
        ) from error
    return header, state


def load_newest(folder: Path) -> tuple[Header, dict[str, Any]] | None:
    """Return the newest checkpoint that is whole; each damaged one is named and put aside.

    Raises:
        CheckpointError: the newest is whole, but this torch does not load it. Earlier ones would
            fare no better, and falling back on them would throw training away.
    """
    for path in sorted(folder.glob("step-*.ckpt"), reverse=True):
        try:
            return load_checkpoint(path)
        except _OtherVersion:
            raise
        except CheckpointError as error:
            warn(f"{error} It is put aside, and the one before it is used, or the beginning.")
            path.rename(path.with_suffix(".damaged"))  # so that it is not counted when pruning
    return None


@contextmanager
def must_fit(step: int) -> Iterator[None]:
    """Turn what `load_state_dict` raises into a sentence, while a checkpoint's parts are loaded.

    Raises:
        CheckpointError: network, optimizer or average of the run are not those of the checkpoint.
    """
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"the checkpoint after update {step} must fit the run's network and optimizer. "
            f"{reason[:300]}. Resume with the versions in the run's environment.json."
        ) from error


def drop_stops(folder: Path) -> None:
    """Delete the checkpoints that signals made."""
    _delete(path for path in folder.glob("step-*.ckpt") if _is_stop(path))


def _is_stop(path: Path) -> bool:
    try:
        return bool(read_header(path).extra.get(IS_STOP))
    except CheckpointError:
        return False


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the best that each of those names.

    One that a signal made stays while it is the newest, and does not count.
    """
    paths = sorted(folder.glob("step-*.ckpt"), reverse=True)
    stops = {path for path in paths if _is_stop(path)}
    _delete(stops - set(paths[:1]))
    paths = [path for path in paths if path not in stops]
    kept = set(paths[:keep])
    for path in paths[:keep]:
        try:
            best = read_header(path).best
        except CheckpointError:
            continue
        if best is not None:
            kept.add(checkpoint_path(folder, best.step))
    _delete(path for path in paths if path not in kept)


def _delete(paths: Iterable[Path]) -> None:
    for path in list(paths):
        path.unlink(missing_ok=True)


def _digest(header: dict[str, Any]) -> str:
    return sha256_bytes(json.dumps(header, sort_keys=True).encode())


def _parse_header(path: Path, line: bytes) -> Header:
    try:
        values = json.loads(line)
        if values["magic"] != MAGIC:
            raise ValueError(values["magic"])
        digest = values.pop("header_sha256", None)
        if digest is not None and digest != _digest(values):
            raise ValueError(digest)
        best = None if values["best"] is None else Best(*values["best"])
        return Header(
            int(values["step"]),
            best,
            str(values["sha256"]),
            int(values["num_bytes"]),
            dict(values.get("extra", {})),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged: its header cannot be read."
        ) from error

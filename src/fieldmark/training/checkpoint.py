"""Checkpoints that are whole or not there, and say so themselves.

A file is one line of JSON (step, best step, size and SHA-256 of what follows) and then what
torch.save wrote. It is written under a temporary name, flushed, and renamed.
"""

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fieldmark.errors import CheckpointError
from fieldmark.runtime.files import sha256_bytes, write_atomic
from fieldmark.runtime.log import warn

MAGIC = "fieldmark-checkpoint-1"
_HEADER_MAX_BYTES = 4096


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


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the file of the checkpoint after update `step`."""
    return folder / f"step-{step:08d}.ckpt"


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], best: Best | None) -> Path:
    """Write the state after update `step`; tensors and plain values only."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getvalue()
    header = {
        "magic": MAGIC,
        "step": step,
        "best": None if best is None else [best.step, best.top1_accuracy, best.loss],
        "sha256": sha256_bytes(payload),
        "num_bytes": len(payload),
    }
    path = checkpoint_path(folder, step)
    try:
        write_atomic(path, json.dumps(header).encode() + b"\n" + payload)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {path} cannot be written: {error.strerror or error}. "
            "Older checkpoints are untouched; make room and resume."
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
    first, _, payload = path.read_bytes().partition(b"\n")
    header = _parse_header(path, first)
    if len(payload) != header.num_bytes:
        raise CheckpointError(
            f"checkpoint {path} is truncated: {len(payload)} of {header.num_bytes} bytes."
        )
    if sha256_bytes(payload) != header.sha256:
        raise CheckpointError(f"checkpoint {path} was altered: its checksum does not match.")
    state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    return header, state


def load_newest(folder: Path) -> tuple[Header, dict[str, Any]] | None:
    """Return the newest checkpoint that is whole; each damaged one is named and put aside."""
    for path in sorted(folder.glob("step-*.ckpt"), reverse=True):
        try:
            return load_checkpoint(path)
        except CheckpointError as error:
            warn(f"{error} It is put aside, and the one before it is used, or the beginning.")
            path.rename(path.with_suffix(".damaged"))  # so that it is not counted when pruning
    return None


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints and the best that each of those names."""
    paths = sorted(folder.glob("step-*.ckpt"), reverse=True)
    kept = set(paths[:keep])
    for path in paths[:keep]:
        try:
            best = read_header(path).best
        except CheckpointError:
            continue
        if best is not None:
            kept.add(checkpoint_path(folder, best.step))
    _delete(path for path in paths if path not in kept)


def remove_temporary(folder: Path) -> None:
    """Delete what a killed process left half written."""
    _delete(folder.glob(".*.tmp"))


def _delete(paths: Iterable[Path]) -> None:
    for path in list(paths):
        path.unlink(missing_ok=True)


def _parse_header(path: Path, line: bytes) -> Header:
    try:
        values = json.loads(line)
        if values["magic"] != MAGIC:
            raise ValueError(values["magic"])
        best = None if values["best"] is None else Best(*values["best"])
        return Header(int(values["step"]), best, str(values["sha256"]), int(values["num_bytes"]))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {path} is damaged: its header cannot be read."
        ) from error

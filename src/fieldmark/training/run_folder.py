"""The folder of a run: configuration, environment, decisions, metrics, checkpoints, package."""

import contextlib
import fcntl
import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, TypeVar

import torch

from fieldmark.config import RunConfig
from fieldmark.config.load import from_json
from fieldmark.errors import DataError, DiskFull, RunError
from fieldmark.runtime.cpu import cpu_name, instruction_set
from fieldmark.runtime.files import (
    append_whole,
    is_disk_full,
    read_json,
    remove_temporary,
    sync_folder,
    write_atomic,
    write_json,
)
from fieldmark.runtime.log import warn
from fieldmark.training.ranks import Alone, Ranks
from fieldmark.training.signals import stop_error

T = TypeVar("T")
_LIBRARIES = ("fieldmark", "torch", "torchvision", "timm", "numpy", "pillow")


class RunFolder:
    """One run on disk, locked by this process until the `with` block ends.

    Of several ranks, the first has the folder and writes. Others follow: they know what it has
    decided, and write nothing. Unless it says otherwise, a method is called by all of them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.ranks: Ranks = Alone()
        self._lock: IO[str] | None = lock_folder(path)
        self._config: RunConfig | None = None
        self._broken: list[tuple[str, str]] = []
        remove_temporary(path)
        decisions = _read_lines(path / "decisions.jsonl")
        self._decisions = {line["kind"]: line for line in decisions}
        _repair(path / "decisions.jsonl", decisions)

    @classmethod
    def shared(cls, ranks: Ranks, open_first: Callable[[], "RunFolder"]) -> "RunFolder":
        """Return the run that rank 0 opens, on each rank."""
        run = open_first() if ranks.rank == 0 else cls.__new__(cls)
        facts = None
        if ranks.rank == 0 and ranks.world > 1:
            facts = (run.path, run.config(), run._decisions)
        facts = ranks.share(facts)
        if ranks.rank > 0 and facts is not None:
            run.path, run._config, run._decisions = facts
            run._lock, run._broken = None, []
        run.ranks = ranks
        return run

    @property
    def writes(self) -> bool:
        """Whether this process writes the run's files."""
        return self.ranks.rank == 0

    @classmethod
    def create(cls, path: Path, config: RunConfig) -> "RunFolder":
        """Make a new run; an existing folder that is not empty is refused.

        Raises:
            RunError: the folder exists; the message says how to resume.
            DiskFull: there is no room for its first files.
        """
        if path.exists() and not _is_vacant(path):
            raise RunError(
                f"--out {path} must not exist yet. Resume with: fieldmark train --resume "
                f"--out {path}, or choose another folder."
            )
        with _room_for(path, "run the same command again"):
            path.mkdir(parents=True, exist_ok=True)
            sync_folder(path.parent)
            run = cls(path)
            run.checkpoints.mkdir(exist_ok=True)
            write_json(path / "config.json", config.model_dump(mode="json"))
        return run

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """Open an existing run to go on with it.

        Raises:
            RunError: there is no run, or another process holds it.
        """
        if not (path / "config.json").is_file():
            raise RunError(f"{path} must be a run to resume. Found no config.json in it.")
        with _room_for(path, "resume"):
            run = cls(path)
            run.checkpoints.mkdir(exist_ok=True)
        return run

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def package(self) -> Path:
        """The folder of the package that training ends with."""
        return self.path / "package"

    def must_be_here(self) -> None:
        """Raise RunError if the folder is no longer the one that this process holds.

        A run that is being ended and whose folder is made anew meanwhile would else leave its last
        checkpoint to the run that is there now.
        """
        if self._lock is None:
            return
        held = os.fstat(self._lock.fileno())
        try:
            here = (self.path / ".lock").stat()
        except FileNotFoundError:
            here = None
        if here is None or (here.st_dev, here.st_ino) != (held.st_dev, held.st_ino):
            raise RunError(
                f"{self.path} must stay where it is while the run trains. It was removed or "
                "replaced, so nothing more is saved there. Start the run anew."
            )

    def config(self) -> RunConfig:
        """Return the configuration the run was started with."""
        return self._config or from_json(read_json(self.path / "config.json"))

    def decide(self, kind: str, value: T, why: str) -> T:
        """Return what was decided of `kind` the first time, recording it if it is new."""
        known = self._decisions.get(kind)
        if known is not None:
            decided: T = known["value"]
            return decided
        value = self.ranks.share(value)
        self._record(kind, value, why)
        return value

    def _record(self, kind: str, value: Any, why: str) -> None:
        line = {"kind": kind, "value": value, "why": why}
        if self.writes:
            append_whole(self.path / "decisions.jsonl", _to_text([line]))
        self._decisions[kind] = line

    def leave_out(self, kind: str, reason: str) -> None:
        """Note what this rank alone found not usable; `exchange` lets the others know."""
        if self.ranks.world == 1:
            self.decide(kind, reason, "left out of training")
        else:
            self._broken.append((kind, reason))

    def exchange(self) -> None:
        """Record what each rank has left out since the last exchange."""
        if self.ranks.world == 1:
            return
        for found in self.ranks.gather(self._broken):
            for kind, reason in found:
                if kind not in self._decisions:
                    self._record(kind, reason, "left out of training")
        self._broken = []

    def must_agree(self, fact: Any, what: str) -> None:
        """Raise DataError unless all ranks know the same fact."""
        known = self.ranks.gather(fact)
        if any(other != known[0] for other in known):
            raise DataError(
                f"every process must read the same {what}. Got {known}, by rank. Check the disks "
                "of the machines, and start again."
            )

    def decide_once(self, kind: str, find: Callable[[], tuple[T, str]]) -> T:
        """As `decide`, but for what is costly to find: `find` -> (value, why) is called once."""
        if kind in self._decisions:
            decided: T = self._decisions[kind]["value"]
            return decided
        return self.decide(kind, *find())

    def check_environment(self, environment: dict[str, Any]) -> list[str]:
        """Record the environment the first time; later return what differs, as sentences."""
        if not self.writes:
            return []
        path = self.path / "environment.json"
        if not path.exists():
            write_json(path, environment)
            return []
        before = read_json(path)
        return [
            f"{key} was {before.get(key)!r} and is {environment.get(key)!r}"
            for key in sorted({*before, *environment})
            if before.get(key) != environment.get(key)
        ]

    def append_metrics(self, lines: Iterable[dict[str, Any]]) -> None:
        """Add lines to metrics.jsonl and flush them to the disk."""
        if self.writes:
            append_whole(self.path / "metrics.jsonl", _to_text(lines))

    def decisions(self, prefix: str) -> dict[str, Any]:
        """Return what was decided of the kinds that begin with `prefix`, without it."""
        return {
            kind.removeprefix(prefix): line["value"]
            for kind, line in self._decisions.items()
            if kind.startswith(prefix)
        }

    def train_metrics(self) -> list[dict[str, Any]]:
        """Return the lines of all updates, oldest first."""
        lines = _read_lines(self.path / "metrics.jsonl") if self.writes else []
        return self.ranks.share([line for line in lines if line["kind"] == "train"])

    def rewind_metrics(self, step: int) -> None:
        """Drop lines after update `step`: a killed run wrote them and they will come again."""
        if not self.writes:
            return
        path = self.path / "metrics.jsonl"
        _repair(path, [line for line in _read_lines(path) if line["step"] <= step])

    def write_diagnosis(self, found: dict[str, Any]) -> Path:
        """Write what was measured when training went wrong; return the file."""
        path = self.path / "diagnosis.json"
        if self.writes:
            write_json(path, found)
        return path

    def discard(self) -> None:
        """Delete a run in which nothing was trained yet."""
        if self.writes:
            shutil.rmtree(self.path, ignore_errors=True)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Release the lock; say how to go on after a full disk or a signal.

        Raises:
            DiskFull, Interrupted, Preempted: in the place of what ended the block.
        """
        if self._lock is not None:
            self._lock.close()
        if isinstance(error, KeyboardInterrupt):
            raise stop_error(error, f"stopped before the run had ended. {self._next()}") from None
        if error is not None and is_disk_full(error):
            raise DiskFull(f"{_reason(error, self.path)} Make room. {self._next()}") from error

    def _next(self) -> str:
        """What to do with the run after it was cut short."""
        if not (self.path / "config.json").is_file():  # discarded, or not yet begun
            return "Nothing was trained yet: run the same command again."
        return f"Resume with: fieldmark train --resume --out {self.path}"


def describe_environment(device: torch.device, threads: int, num_ranks: int = 1) -> dict[str, Any]:
    """Return the facts that can change a bit of the result."""
    versions = {}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "machine": platform.node(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": cpu_name(),
        "instruction_set": instruction_set(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": threads,
        "ranks": num_ranks,
        "python": platform.python_version(),
        **versions,
    }


def default_folder(name: str) -> Path:
    """Return the first of runs/NAME, runs/NAME-2, ... that does not exist."""
    base = Path("runs")
    path, number = base / name, 1
    while path.exists():
        number += 1
        path = base / f"{name}-{number}"
    return path


@contextlib.contextmanager
def _room_for(path: Path, action: str) -> Iterator[None]:
    """Say in a sentence that there is no room for a run's first files."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise DiskFull(f"{_reason(error, path)} Make room and {action}.") from error


def _reason(error: BaseException, path: Path) -> str:
    """An error of a full disk as a sentence."""
    if not isinstance(error, OSError):
        return str(error)
    return f"{error.filename or path} cannot be written: {error.strerror}."


def _is_vacant(path: Path) -> bool:
    """Whether nothing but the beginnings of a run that was killed at once is there."""
    if not path.is_dir():
        return False
    beginnings = {".lock", "checkpoints"}
    names = {entry.name for entry in path.iterdir()}
    return names <= beginnings and not any((path / "checkpoints").glob("*"))


def lock_folder(path: Path) -> IO[str]:
    """Hold the folder for this process alone, until the returned file is closed.

    A POSIX record lock, because worker processes do not inherit it: after a kill they may
    outlive the trainer by seconds, and must not keep the run from being resumed.
    """
    file = (path / ".lock").open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise RunError(f"{path} is in use by {holder}. Wait for it, or stop it.") from error
    file.truncate(0)
    with contextlib.suppress(OSError):  # a courtesy to others, for which a full disk has no room
        holder = f"process {os.getpid()} on {platform.node()} since {time.strftime('%F %T')}"
        os.write(file.fileno(), holder.encode())
    return file


def _repair(path: Path, lines: list[dict[str, Any]]) -> None:
    """Let the file hold exactly these lines: a kill may have left half a one after them."""
    text = _to_text(lines)
    if path.exists() and path.read_bytes() != text:
        write_atomic(path, text)


def _to_text(lines: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines that are whole. A killed process, or machine, may have spoilt the last.

    Raises:
        RunError: another line than the last is no JSON.
    """
    if not path.exists():
        return []
    texts = path.read_bytes().split(b"\n")[:-1]  # the last piece is empty, or cut short
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            if number < len(texts):
                raise RunError(f"line {number} of {path} must be JSON. It was damaged.") from error
            warn(f"line {number} of {path} is damaged and left out")
    return lines

"""How much memory the process may still take, how much it took, and how it holds it."""

import contextlib
import ctypes
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER = 2**31 - 1
_NO_LIMIT = 2**60  # cgroup v1 writes a number near 2**63 for "none"


@dataclass(frozen=True, slots=True)
class Room:
    """What a process may still take, and what sets the limit."""

    num_bytes: int
    source: str  # reads on after "left by"


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed instead of giving it back; return whether that was possible.

    A training step frees and allocates the same hundreds of megabytes of activations again and
    again. By default each large block is a mapping of its own, whose pages the kernel must fault
    in and clear every time. What that costs is in benchmarks/results/train_step.json.
    """
    return _mallopt(_M_MMAP_MAX, 0) and _mallopt(_M_TRIM_THRESHOLD, _NEVER)


def share_one_heap() -> bool:
    """Let all threads allocate from one heap of glibc; return whether that was possible.

    Else each thread has its own, where what another one frees is not found, so that a busy service
    goes on growing for longer. Call it before there are threads.
    """
    return _mallopt(_M_ARENA_MAX, 1)


def _mallopt(option: int, value: int) -> bool:
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(option, value))  # musl has none


def available_bytes(*, proc: Path = Path("/proc"), sys_fs: Path = Path("/sys/fs")) -> Room:
    """Return the smallest of what the machine, the control groups and `ulimit -v` leave.

    A page cache can be dropped, so it does not count as taken. Swap does not count as room:
    training from it is slower than a smaller batch.

    Args:
        proc, sys_fs: where the kernel shows its facts.
    """
    rooms = [_machine(proc), *_control_groups(proc, sys_fs / "cgroup"), *_address_space(proc)]
    smallest = min(rooms, key=lambda room: room.num_bytes)
    return Room(max(0, smallest.num_bytes), smallest.source)


def resident_bytes() -> int | None:
    """Return the memory that this process holds now, or None where the kernel does not show it."""
    return _field(Path("/proc/self/status"), "VmRSS")


def peak_resident_bytes() -> int:
    """Return the most memory that this process held at once, without its child processes.

    From the kernel's VmHWM: ru_maxrss also counts what the process was forked from.
    """
    peak = _field(Path("/proc/self/status"), "VmHWM")
    if peak is not None:
        return peak
    units = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * units


def _machine(proc: Path) -> Room:
    available = _field(proc / "meminfo", "MemAvailable")
    if available is not None:
        return Room(available, "this machine")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Room(total, "this machine, if nothing else runs on it")


def _control_groups(proc: Path, root: Path) -> list[Room]:
    """The room in each control group above this process that has a limit, of either version."""
    rooms = []
    for line in _text(proc / "self" / "cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            bases = [root, root / "unified"]
            names = ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            bases = [root / "memory"]
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        for base in bases:
            for group in _ancestors(base, path):
                room = _group_room(group, *names)
                if room is not None:
                    rooms.append(room)
    return rooms


def _ancestors(base: Path, path: str) -> list[Path]:
    """The group and those above it. In a container only the uppermost may be visible."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    return [base.joinpath(*parts[:count]) for count in range(len(parts), -1, -1)]


def _group_room(group: Path, limit_file: str, usage_file: str, cache_key: str) -> Room | None:
    limit, usage = _text(group / limit_file).strip(), _text(group / usage_file).strip()
    if not limit.isdigit() or not usage.isdigit() or int(limit) >= _NO_LIMIT:
        return None
    cache = 0
    for line in _text(group / "memory.stat").splitlines():
        key, _, value = line.partition(" ")
        if key == cache_key:
            cache = int(value)
    return Room(int(limit) - (int(usage) - cache), f"the control group's {limit_file}")


def _address_space(proc: Path) -> list[Room]:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    taken = _field(proc / "self" / "status", "VmSize")
    if limit == resource.RLIM_INFINITY or taken is None:
        return []
    return [Room(limit - taken, "ulimit -v")]


def _field(path: Path, key: str) -> int | None:
    """Return a field of kilobytes, in bytes."""
    for line in _text(path).splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return None


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text()
    return ""

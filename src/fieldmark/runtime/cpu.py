"""How many cores this process may use, and what its processor can do."""

import os
import platform
from pathlib import Path

_FLAGS = (
    *("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp"),
)


def num_cores() -> int:
    """Return the cores this process may use: the smaller of its affinity and its cgroup quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, min(cores, int(quota)) if quota else cores)


def cpu_name() -> str:
    """Return the processor's name as the system gives it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def instruction_set() -> str:
    """Return the vector extensions that change results or speed, such as "x86_64+avx2"."""
    present = set((_cpuinfo("flags") or _cpuinfo("Features") or "").split())
    return "+".join([platform.machine(), *(flag for flag in _FLAGS if flag in present)])


def _cgroup_quota() -> float | None:
    path = Path("/sys/fs/cgroup/cpu.max")
    try:
        quota, period = path.read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else max(1.0, float(quota) / float(period))


def _cpuinfo(key: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return None

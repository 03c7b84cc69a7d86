"""How the process holds memory."""

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let glibc keep what is freed instead of giving it back; return whether that was possible.

    A training step frees and allocates the same hundreds of megabytes of activations again and
    again. By default each large block is a mapping of its own, whose pages the kernel must fault
    in and clear every time. What that costs is in benchmarks/results/train_step.json.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl has none
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _NEVER))

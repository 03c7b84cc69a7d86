"""Several copies of a model side by side, each with its own threads. Torch-free."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
import numpy.typing as npt

from fieldmark.errors import ConfigError
from fieldmark.measure import Predict

MAX_PER_CORE = 4  # threads; more only wait for each other
_CALLS, FEW_CORES = 4, 8  # each call takes memory of its own


@dataclass(frozen=True, slots=True)
class Setting:
    """How many calls may run at once, and the threads within each."""

    workers: int
    threads: int

    def __str__(self) -> str:
        return f"{self.workers}x{self.threads}"

    def words(self) -> str:
        """Return the setting as a person says it."""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        if self.workers == 1:
            return threads
        return f"{self.workers} requests at a time with {threads} each"


def parse_setting(text: str, cores: int) -> Setting:
    """Return the setting that "T" or "WxT" means: W calls at once, T threads in each.

    Raises:
        ConfigError: it is neither, or far more threads than `cores`.
    """
    found = re.fullmatch(r"(?:([1-9]\d{0,3})x)?([1-9]\d{0,3})", text.strip())
    if found is None:
        raise ConfigError(
            f"threads must be a number, or calls x threads. Got {text!r}. Write 2, or 2x1 for two "
            "calls at once with a thread each."
        )
    setting = Setting(int(found[1] or 1), int(found[2]))
    if setting.workers * setting.threads > MAX_PER_CORE * cores:
        raise ConfigError(
            f"threads must be at most {MAX_PER_CORE} for each of the {cores} cores that this "
            f"process may use. Got {text}. Write {cores}."
        )
    return setting


def default_settings(cores: int) -> list[Setting]:
    """Return one thread, all cores in one call, as many calls as cores, and `default_setting`."""
    listed = [Setting(1, 1), Setting(1, cores), Setting(cores, 1), default_setting(cores)]
    return list(dict.fromkeys(listed))


def default_setting(cores: int) -> Setting:
    """Return what a service that was not measured begins with: a call a core, if they are few.

    A call that shares its work among many threads waits for the last of them again and again.
    """
    if cores <= FEW_CORES:
        return Setting(cores, 1)
    return Setting(_CALLS, cores // _CALLS)


def open_workers(open_one: Callable[[int], Predict], setting: Setting, *, shared: bool) -> Predict:
    """Return a Predict that `setting.workers` threads may call at once; more callers wait.

    Args:
        open_one: threads -> the model.
        shared: whether several calls may run in one opened model. onnxruntime allows it, but a
            pool of threads would then be shared too, so with several threads each has its own.
    """
    if setting.workers == 1 or (shared and setting.threads == 1):
        return open_one(setting.threads)
    free: SimpleQueue[Predict] = SimpleQueue()
    for _ in range(setting.workers):
        free.put(open_one(setting.threads))

    def predict(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        one = free.get()
        try:
            return one(images)
        finally:
            free.put(one)

    return predict

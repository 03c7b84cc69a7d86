"""Where the run computes, and with which arithmetic."""

import contextlib
import os
from contextlib import AbstractContextManager

import torch

from fieldmark.config import TrainConfig
from fieldmark.errors import ConfigError
from fieldmark.runtime.cpu import num_cores
from fieldmark.runtime.log import say
from fieldmark.runtime.memory import keep_freed_memory
from fieldmark.training.processes import local_world, take_gpu

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(wanted: str) -> torch.device:
    """Return the device for "auto", "cpu" or "cuda"; asking for cuda without one is an error."""
    if wanted == "cpu":
        return torch.device("cpu")
    if torch.cuda.is_available():
        take_gpu()
        return torch.device("cuda")
    if wanted == "cuda":
        raise ConfigError(
            "train.device=cuda needs a CUDA device that this torch can use. "
            f"Found none (torch {torch.__version__}). Set train.device=cpu."
        )
    if torch.backends.mps.is_available():
        say("MPS is untested here: the CPU is used.")
    return torch.device("cpu")


def prepare(config: TrainConfig, device: torch.device) -> int:
    """Set threads and deterministic kernels, check the precision; return the thread count.

    Raises:
        ConfigError: float16 asked for on a CPU, where its gradients would need a scaler that
            exists for CUDA only.
    """
    if config.precision == "float16" and device.type != "cuda":
        raise ConfigError(
            "train.precision=float16 needs a CUDA device. Got a CPU. "
            "Set train.precision=bfloat16 or float32."
        )
    threads = config.threads or max(1, num_cores() // local_world())
    torch.set_num_threads(threads)
    if device.type == "cpu":
        keep_freed_memory()
    # The fastest kernel may differ from run to run, and with it the last bit of the weights.
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as cuBLAS asks for it
        torch.use_deterministic_algorithms(True, warn_only=True)
    return threads


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which a forward pass runs."""
    if config.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, _DTYPES[config.precision])


def make_scaler(config: TrainConfig, device: torch.device) -> torch.amp.GradScaler:
    """Return the gradient scaler; it does nothing unless the precision is float16."""
    return torch.amp.GradScaler(device.type, enabled=config.precision == "float16")

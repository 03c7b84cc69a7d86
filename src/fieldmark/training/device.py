"""Where the run computes, and with which arithmetic."""

import contextlib
import os
from collections.abc import Callable
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


def settle_precision(
    train: TrainConfig,
    device: torch.device,
    decide_once: Callable[[str, Callable[[], tuple[str, str]]], str],
) -> TrainConfig:
    """Return the section with a precision for `auto`: found when a run begins, then replayed.

    Args:
        decide_once: kind, what finds (value, why) -> the value decided the first time.
    """
    if train.precision != "auto":
        return train

    def find() -> tuple[str, str]:
        if multiplies_bfloat16(device):
            return "bfloat16", f"this {device.type} multiplies it faster than float32"
        return "float32", f"this {device.type} has no instructions for bfloat16"

    precision = decide_once("precision", find)
    say(f"train.precision=auto: {precision}")
    return train.model_copy(update={"precision": precision})


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether the device has instructions for products of bfloat16.

    Of processors those of x86 are known: AVX512_BF16 and AMX, which oneDNN's convolutions use.
    Elsewhere torch computes in bfloat16 by way of float32, which is slower.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


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
    """Return the context in which a forward pass runs; the precision is settled before."""
    if config.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, _DTYPES[config.precision])


def make_scaler(config: TrainConfig, device: torch.device) -> torch.amp.GradScaler:
    """Return the gradient scaler; it does nothing unless the precision is float16."""
    return torch.amp.GradScaler(device.type, enabled=config.precision == "float16")

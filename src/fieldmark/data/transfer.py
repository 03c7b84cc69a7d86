"""From the host's memory to the device, without a wait for what the device computes."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def to_device(values: npt.NDArray[Any] | Tensor, device: torch.device) -> Tensor:
    """Return values on a device.

    A copy to CUDA from memory that is not pinned waits until all that was asked before is done.
    torch keeps a pinned block until its copy has been made.
    """
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)

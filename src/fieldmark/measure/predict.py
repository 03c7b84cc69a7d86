"""The one type that every backend has: eager, ONNX, int8, a remote client."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Predict = Callable[[npt.NDArray[np.uint8]], npt.NDArray[np.float32]]
"""uint8 images (B, H, W, 3) -> float32 logits (B, K)."""

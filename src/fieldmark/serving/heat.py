"""What an answer rests on, as a picture: a class's map over the image that the model saw."""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from fieldmark.preprocess import Pixels

_FOR = np.array([214, 39, 40], np.float32)  # red: spoke for the class
_AGAINST = np.array([31, 119, 180], np.float32)  # blue: against it
_MOST = 0.65  # of a pixel that is the map's colour, at most


def heat_png(pixels: Pixels, class_map: npt.NDArray[np.float32]) -> bytes:
    """Return the image as a PNG, red where it spoke for a class and blue where against.

    The strongest place of the map has the fullest colour, so that pictures of two images do not
    compare by their depth.

    Args:
        pixels: uint8 (H, W, 3).
        class_map: (h, w), of which the mean is the class's logit.
    """
    height, width = pixels.shape[:2]
    small = Image.fromarray(np.ascontiguousarray(class_map, np.float32))
    grown = np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))
    strongest = float(np.abs(grown).max())
    share = grown / strongest if strongest > 0 else np.zeros_like(grown)
    colour = np.where(share[..., None] > 0, _FOR, _AGAINST)
    alpha = _MOST * np.abs(share)[..., None]
    # On grey: colours of the photograph would be taken for those of the map.
    grey = np.repeat(pixels.mean(axis=2, dtype=np.float32)[..., None], 3, axis=2)
    blended = grey * (1 - alpha) + colour * alpha
    out = io.BytesIO()
    Image.fromarray(np.rint(blended).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()

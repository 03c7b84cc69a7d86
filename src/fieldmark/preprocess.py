"""The one implementation of encoded bytes -> model input, for evaluation, calibration and serving.

`Preprocess` is the spec: it travels in the package and its digest names it. `decode` turns bytes
into an upright 8-bit RGB image and refuses what is unsafe; `to_pixels` resizes and crops;
`Preprocess.__call__` does both. The result is uint8 (H, W, 3): normalisation lives in the model's
graph, so `mean` and `std` are recorded here but never applied here.
"""

import hashlib
import io
import json
import math
import warnings
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field

from fieldmark.errors import BodyTooLarge, ImageError, ImageTooLarge

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
MAX_BYTES = 20_000_000
MAX_PIXELS = 50_000_000
MIN_SIDE_PX = 1

Pixels = npt.NDArray[np.uint8]

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]


class Preprocess(BaseModel):
    """How an encoded image becomes model input: resize the short side, crop the centre.

    With `scaled_decoding` off this equals timm's evaluation transform (crop_mode "center") pixel
    for pixel. With it on, large JPEGs are decoded at 1/2, 1/4 or 1/8 of their size, never below
    twice the size that the resize asks for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    height_px: int = Field(gt=0, le=4096)
    width_px: int = Field(gt=0, le=4096)
    crop_frac: float = Field(default=1.0, gt=0, le=1)
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    scaled_decoding: bool = False
    background: tuple[int, int, int] = (255, 255, 255)

    def __call__(self, encoded: bytes) -> Pixels:
        """Return uint8 (height_px, width_px, 3), or raise ImageError."""
        draft = self._draft_size() if self.scaled_decoding else None
        return self.to_pixels(decode(encoded, background=self.background, draft_px=draft))

    def to_pixels(self, image: Image.Image) -> Pixels:
        """Return an upright RGB image resized and centre-cropped, uint8 (height_px, width_px, 3)."""
        image = self._resize(image)
        width, height = image.size
        left = _round_half_even((width - self.width_px) / 2)
        top = _round_half_even((height - self.height_px) / 2)
        if left or top or image.size != (self.width_px, self.height_px):
            image = image.crop((left, top, left + self.width_px, top + self.height_px))
        return np.array(image, dtype=np.uint8)

    def digest(self) -> str:
        """Return the SHA-256 of the spec, hex: two equal digests mean equal pixels."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def _target(self) -> tuple[int, int]:
        """(width, height) before the crop."""
        return (
            math.floor(self.width_px / self.crop_frac),
            math.floor(self.height_px / self.crop_frac),
        )

    def _draft_size(self) -> tuple[int, int]:
        width, height = self._target()
        side = 2 * max(width, height)
        return side, side

    def _resize(self, image: Image.Image) -> Image.Image:
        target_width, target_height = self._target()
        width, height = image.size
        if target_width == target_height:
            # The short side becomes the target; the other follows, truncated as torchvision does.
            if width <= height:
                size = (target_width, int(target_width * height / width))
            else:
                size = (int(target_width * width / height), target_width)
        else:
            # The smallest enlargement or reduction that covers the target on both axes.
            scale = max(target_width / width, target_height / height)
            size = (
                max(target_width, round(width * scale)),
                max(target_height, round(height * scale)),
            )
        if size == image.size:
            return image
        return image.resize(size, _FILTERS[self.interpolation])


def decode(
    encoded: bytes,
    *,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    background: tuple[int, int, int] = (255, 255, 255),
    draft_px: tuple[int, int] | None = None,
) -> Image.Image:
    """Return the first frame of an encoded image as an upright 8-bit RGB image.

    EXIF rotation is applied, 16-bit samples are rescaled to 8 bits, transparency is composited on
    `background`. The header's size is checked before any pixel is decoded.

    Args:
        draft_px: (width, height) that a JPEG may be decoded down to, in steps of 1/2, 1/4, 1/8.

    Raises:
        ImageError: the format is not one of FORMATS, or the data is damaged or truncated.
        ImageTooLarge: the header declares more than `max_pixels`.
        BodyTooLarge: more than `max_bytes` of encoded data.
    """
    if len(encoded) > max_bytes:
        raise BodyTooLarge(
            f"image must be at most {max_bytes} bytes. Got {len(encoded)}. Resize and retry."
        )
    try:
        with warnings.catch_warnings():
            # Our own cap below is the rule; Pillow's would only warn at 89 million pixels.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(encoded), formats=FORMATS)
        width, height = image.size
        if width * height > max_pixels:
            raise ImageTooLarge(
                f"image must have at most {max_pixels} pixels. Got {width} x {height}. "
                "Resize and retry."
            )
        if draft_px is not None:
            image.draft("RGB", draft_px)
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image), background)
    except (ImageError, ImageTooLarge):
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(f"image must have at most {max_pixels} pixels. Got more.") from error
    # Damaged files make Pillow raise nearly anything: IndexError, struct.error, zlib.error ...
    except Exception as error:  # noqa: BLE001
        raise ImageError(_reason(encoded, error)) from error


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    has_alpha = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    if has_alpha:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, (*background, 255))
        image.alpha_composite(layer)
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Rescale 16-bit (and 32-bit integer or float) greys; `convert` would saturate them."""
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        top = 1.0 if values.size == 0 or values.max() <= 1.0 else 255.0
        return Image.fromarray(np.clip(values / top * 255.0, 0, 255).round().astype(np.uint8))
    return Image.fromarray((np.clip(values, 0, 65535) // 256).astype(np.uint8))


def _reason(encoded: bytes, error: Exception) -> str:
    if not encoded:
        return "image must not be empty. Got 0 bytes."
    names = ", ".join(FORMATS)
    if isinstance(error, Image.UnidentifiedImageError):
        return f"image must be one of {names}. Got {len(encoded)} bytes of something else."
    detail = " ".join(str(error).split())[:120] or type(error).__name__
    return f"image must decode completely. Got {len(encoded)} damaged bytes ({detail})."


def _round_half_even(value: float) -> int:
    return round(value)

"""The one implementation of encoded bytes -> model input, for evaluation, calibration and serving.

`Preprocess` is the spec: it travels in the package and its digest names it. `decode` turns bytes
into an upright 8-bit RGB image and refuses what is unsafe; `to_pixels` resizes and crops;
`Preprocess.__call__` does both. The result is uint8 (H, W, 3): normalisation lives in the model's
graph, so `mean` and `std` are recorded here but never applied here. Colour profiles are ignored, as
training and timm ignore them.
"""

import hashlib
import io
import json
import math
import warnings
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import (
    BmpImagePlugin,
    ExifTags,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
from pydantic import BaseModel, ConfigDict, Field

from fieldmark.config.section import Interpolation
from fieldmark.errors import BodyTooLarge, ImageError, ImageTooLarge

# Importing a plugin registers it: Pillow then never loads its other forty decoders to find one.
FORMATS = tuple(
    plugin.format
    for plugin in (
        JpegImagePlugin.JpegImageFile,
        PngImagePlugin.PngImageFile,
        WebPImagePlugin.WebPImageFile,
        BmpImagePlugin.BmpImageFile,
        TiffImagePlugin.TiffImageFile,
    )
)
MAX_BYTES = 20_000_000
MAX_PIXELS = 50_000_000

# Our own cap is the rule; Pillow's would print a warning at 89 million pixels. Once, here: changing
# the filters around each decode is not safe in threads.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

Pixels = npt.NDArray[np.uint8]

_SCAN, _MAX_SCANS = b"\xff\xda", 100  # of a JPEG: a progressive one has about ten
_STRIP_PX = 256
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}

_TO_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


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

    def __call__(
        self,
        encoded: bytes,
        *,
        max_bytes: int = MAX_BYTES,
        max_pixels: int = MAX_PIXELS,
        formats: Sequence[str] = FORMATS,
    ) -> Pixels:
        """Return uint8 (height_px, width_px, 3), or raise ImageError. The caps are decode's."""
        image = decode(
            encoded,
            max_bytes=max_bytes,
            max_pixels=max_pixels,
            formats=formats,
            background=self.background,
            draft_px=self._draft_size() if self.scaled_decoding else None,
        )
        return self.to_pixels(image)

    def to_pixels(self, image: Image.Image) -> Pixels:
        """Return an upright RGB image resized and centre-cropped, uint8 (height_px, width_px, 3).

        Raises:
            ImageTooLarge: the image is so narrow that resizing its short side makes a giant.
        """
        width, height = self._size_before_crop(image)
        left = round((width - self.width_px) / 2)
        top = round((height - self.height_px) / 2)
        resampling = _FILTERS[self.interpolation]
        if left > 0 and image.width > image.height:
            # Pillow resizes the width of such an image first and then its height, for which what
            # is cropped away from the sides need not be there: the pixels are the same.
            image = image.resize((width, image.height), resampling)
            image = image.crop((left, 0, left + self.width_px, image.height))
            left, width = 0, self.width_px
        if image.size != (width, height):
            image = image.resize((width, height), resampling)
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

    def _size_before_crop(self, image: Image.Image) -> tuple[int, int]:
        target_width, target_height = self._target()
        width, height = image.size
        if target_width == target_height:
            # The short side becomes the target; the other follows, truncated as torchvision does.
            if width <= height:
                size = (target_width, int(target_width * height / width))
            else:
                size = (int(target_width * width / height), target_width)
        else:
            # The smallest enlargement or reduction that covers the target on both axes. Divided,
            # not multiplied by the inverse: halves must round as they do in timm.
            ratio = min(width / target_width, height / target_height)
            size = (round(width / ratio), round(height / ratio))
        most = max(MAX_PIXELS, 4 * target_width * target_height)
        if size[0] * size[1] > most:
            # A strip of 1 x 60000 pixels passes every other cap, and would need gigabytes here.
            raise ImageTooLarge(
                f"image must have at most {most} pixels after resizing its short side for the "
                f"model. Got {width} x {height}, which becomes {size[0]} x {size[1]}. "
                "Crop it and retry."
            )
        return size


def decode(
    encoded: bytes,
    *,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
    formats: Sequence[str] = FORMATS,
    background: tuple[int, int, int] = (255, 255, 255),
    draft_px: tuple[int, int] | None = None,
) -> Image.Image:
    """Return the first frame of an encoded image as an upright 8-bit RGB image.

    EXIF rotation is applied, 16-bit samples are rescaled to 8 bits, transparency is composited on
    `background`. The header's size is checked before any pixel is decoded.

    Args:
        formats: the accepted ones, a part of FORMATS. The content decides, never a name.
        draft_px: (width, height) that a JPEG may be decoded down to, in steps of 1/2, 1/4, 1/8.

    Raises:
        ImageError: the format is not one of `formats`, or the data is damaged or truncated.
        ImageTooLarge: the header declares more than `max_pixels`.
        BodyTooLarge: more than `max_bytes` of encoded data.
    """
    if len(encoded) > max_bytes:
        raise BodyTooLarge(
            f"image must be at most {max_bytes} bytes. Got {len(encoded)}. Resize and retry."
        )
    try:
        image: Image.Image = Image.open(io.BytesIO(encoded), formats=tuple(formats))
        width, height = image.size
        if width * height > max_pixels:
            raise ImageTooLarge(
                f"image must have at most {max_pixels} pixels. Got {width} x {height}. "
                "Resize and retry."
            )
        if image.format in ("JPEG", "MPO") and encoded.count(_SCAN) > _MAX_SCANS:
            raise ImageError(
                f"image must have at most {_MAX_SCANS} scans. Got more: each would be decoded over "
                "the whole image. Save it anew and retry."
            )
        if draft_px is not None:
            image.draft("RGB", draft_px)
        image.load()
        return _to_rgb(_upright(image), background)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageTooLarge(f"image must have at most {max_pixels} pixels. Got more.") from error
    # Damaged files make Pillow raise nearly anything: IndexError, struct.error, zlib.error ...
    except Exception as error:  # noqa: BLE001
        raise ImageError(_reason(encoded, formats, error)) from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # noqa: BLE001  # damaged metadata: the pixels stay as they are stored
        return image
    method = _TO_UPRIGHT.get(orientation)
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        image = _to_8_bit(image)
    has_alpha = image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info
    if has_alpha:
        image = _composited(image, background)
    return image if image.mode == "RGB" else image.convert("RGB")


def _composited(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Return the image on a background, strip by strip: whole copies would be large at once."""
    found = Image.new("RGB", image.size)
    for top in range(0, image.height, _STRIP_PX):
        strip = image.crop((0, top, image.width, min(top + _STRIP_PX, image.height)))
        under = Image.new("RGBA", strip.size, (*background, 255))
        under.alpha_composite(strip.convert("RGBA"))
        found.paste(under.convert("RGB"), (0, top))
    return found


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Rescale 16-bit (and 32-bit integer or float) greys; `convert` would saturate them."""
    values = np.asarray(image)
    if image.mode == "F":
        values = np.where(np.isfinite(values), values, 0)
        top = 1.0 if values.max() <= 1.0 else 255.0
        return Image.fromarray(np.clip(values / top * 255.0, 0, 255).round().astype(np.uint8))
    return Image.fromarray((np.clip(values, 0, 65535) >> 8).astype(np.uint8))


def _reason(encoded: bytes, formats: Sequence[str], error: Exception) -> str:
    if not encoded:
        return "image must not be empty. Got 0 bytes."
    names = ", ".join(formats)
    if isinstance(error, Image.UnidentifiedImageError):
        return f"image must be one of {names}. Got {len(encoded)} bytes of something else."
    detail = " ".join(str(error).split())[:120] or type(error).__name__
    return f"image must decode completely. Got {len(encoded)} damaged bytes ({detail})."

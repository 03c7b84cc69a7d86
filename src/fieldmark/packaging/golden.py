"""Golden samples: images with the pixels, logits and answers that they must give. Torch-free.

Preprocessing and arithmetic are checked apart: the original bytes must decode to the recorded
pixels, and the recorded pixels must give the recorded logits. Answers are checked by class name,
so that a class list in another order is found.
"""

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image

from fieldmark.errors import ImageError, ModelError, PackageError
from fieldmark.measure import Predict, softmax
from fieldmark.packaging.entries import LIMITS, GoldenCheck, Precision
from fieldmark.packaging.manifest import GOLDEN_ANSWERS, GOLDEN_SAMPLES, Package
from fieldmark.preprocess import Preprocess
from fieldmark.runtime.cpu import instruction_set

# Decoders may round a JPEG or a resized pixel differently from one Pillow release to the next.
LEVELS_ACROSS_PILLOW_VERSIONS = 2
# How much farther from the float32 logits than when it was verified an int8 variant may be: other
# processors round in another order, which is little; sums that overflow are several times this.
_NEAR_RECORDED = 1.25
_NPZ_HEADER_BYTES = 1024  # more than the header of one array


@dataclass(frozen=True, slots=True)
class Answer:
    """The class that a golden sample is given, and its probability at temperature 1.

    So it follows from the recorded logits alone, and stays true when confidence is calibrated.
    """

    class_name: str
    probability: float


@dataclass(frozen=True, slots=True)
class GoldenSamples:
    """n images with what a model must make of them."""

    encoded: tuple[bytes, ...]
    pixels: npt.NDArray[np.uint8]  # (n, H, W, 3)
    logits: npt.NDArray[np.float32]  # (n, K)
    answers: tuple[Answer, ...]
    pillow_version: str  # that decoded them

    def files(self) -> dict[str, bytes]:
        """Return the content of each file by its path in the package."""
        names = [f"golden/{i:03d}.{_suffix(data)}" for i, data in enumerate(self.encoded)]
        arrays = io.BytesIO()
        np.savez(arrays, pixels=self.pixels, logits=self.logits)
        answers = {
            "pillow_version": self.pillow_version,
            "samples": [
                {"file": name, "class_name": answer.class_name, "probability": answer.probability}
                for name, answer in zip(names, self.answers, strict=True)
            ],
        }
        text = json.dumps(answers, indent=2, ensure_ascii=False) + "\n"
        return {
            **dict(zip(names, self.encoded, strict=True)),
            GOLDEN_SAMPLES: arrays.getvalue(),
            GOLDEN_ANSWERS: text.encode(),
        }


def make_golden(
    encoded: Sequence[bytes],
    preprocess: Preprocess,
    predict: Predict,
    class_names: Sequence[str],
) -> GoldenSamples:
    """Return golden samples of the images, with what `predict` gives for them now.

    Raises:
        ImageError: an image does not decode.
        ModelError: a logit is not finite, or there is not one for each class.
    """
    pixels = np.stack([preprocess(data) for data in encoded])
    logits = predict(pixels)
    expected = (len(pixels), len(class_names))
    if logits.shape != expected or not np.isfinite(logits).all():
        raise ModelError(
            f"logits must be finite and of shape {expected}. Got shape {logits.shape}, "
            f"{int((~np.isfinite(logits)).sum())} of them not finite. Check the weights."
        )
    probs = softmax(logits)
    answers = tuple(
        Answer(class_names[best], float(row[best]))
        for best, row in zip(logits.argmax(axis=1).tolist(), probs, strict=True)
    )
    return GoldenSamples(
        tuple(encoded), pixels, logits.astype(np.float32), answers, PIL.__version__
    )


def read_golden(package: Package) -> GoldenSamples:
    """Return the package's golden samples, their checksums checked.

    Raises:
        PackageError: there are none, or they do not fit the manifest.
        IntegrityError: a file is missing, truncated or altered.
    """
    count = package.manifest.golden.count
    if not count:
        raise PackageError(f"{package.path} must have golden samples. It has none.")
    spec = package.preprocess
    pixels_shape = (count, spec.height_px, spec.width_px, 3)
    logits_shape = (count, package.manifest.architecture.num_classes)
    try:
        content = json.loads(package.read(GOLDEN_ANSWERS))
        samples = content["samples"]
        encoded = tuple(package.read(sample["file"]) for sample in samples)
        answers = tuple(Answer(s["class_name"], float(s["probability"])) for s in samples)
        arrays = _load_arrays(
            package.read(GOLDEN_SAMPLES), int(np.prod(pixels_shape) + 4 * np.prod(logits_shape))
        )
        pixels, logits = arrays
        pillow_version = str(content["pillow_version"])
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise PackageError(
            f"{package.path / 'golden'} must hold golden samples of this package format. "
            f"{type(error).__name__}: {error}. Write the package anew."
        ) from error
    if (len(samples), pixels.shape, logits.shape) != (count, pixels_shape, logits_shape):
        raise PackageError(
            f"{package.path / 'golden'} must hold {count} samples of "
            f"{spec.height_px} x {spec.width_px} px with {logits_shape[1]} logits. "
            f"Got {len(samples)} answers, pixels {pixels.shape}, logits {logits.shape}. "
            "Write the package anew."
        )
    return GoldenSamples(encoded, pixels, logits, answers, pillow_version)


def check_golden(
    package: Package,
    predict: Predict,
    precision: Precision = "float32",
    recorded: GoldenCheck | None = None,
) -> GoldenCheck:
    """Return what decoding and `predict` make of the golden samples here and now.

    Args:
        recorded: what was measured of the same variant when it was verified. int8 logits must then
            be as near as they were: another processor may add in another width, and overflow.
    """
    if not package.manifest.golden.count:
        return _no_samples()
    golden = read_golden(package)
    logits = predict(golden.pixels)
    alone = predict(golden.pixels[:1])  # an image must not depend on those it is batched with
    delta: float | None = None
    num_wrong = len(golden.answers)
    tolerance = _tolerance(golden, precision, recorded)
    if logits.shape == golden.logits.shape and alone.shape == golden.logits[:1].shape:
        differences = [
            np.abs(logits - golden.logits).max(),
            np.abs(alone - golden.logits[:1]).max(),
        ]
        delta = float(np.max(differences)) if np.isfinite(differences).all() else None
        num_wrong = _num_wrong(golden, logits, package.class_names, tolerance)
    same_pillow = golden.pillow_version == PIL.__version__
    return GoldenCheck(
        num_samples=len(golden.encoded),
        max_level_difference=_max_level_difference(golden, package.preprocess),
        allowed_level_difference=0 if same_pillow else LEVELS_ACROSS_PILLOW_VERSIONS,
        max_abs_delta_logit=delta,
        tolerance=tolerance,
        num_wrong_answers=num_wrong,
        instruction_set=instruction_set(),
    )


def _tolerance(golden: GoldenSamples, precision: Precision, recorded: GoldenCheck | None) -> float:
    scale = max(1.0, float(np.abs(golden.logits).max()))
    most = LIMITS[precision].max_relative_delta_logit * scale
    if precision == "float32" or recorded is None or recorded.max_abs_delta_logit is None:
        return most
    rounding = LIMITS["float32"].max_relative_delta_logit * scale
    return min(most, _NEAR_RECORDED * recorded.max_abs_delta_logit + rounding)


def _num_wrong(
    golden: GoldenSamples,
    logits: npt.NDArray[np.float32],
    class_names: Sequence[str],
    tolerance: float,
) -> int:
    """Count samples that are given another class, unless the two nearly tie in the recording."""
    found = logits.argmax(axis=1)
    rows = np.arange(len(found))
    margin = golden.logits.max(axis=1) - golden.logits[rows, found]
    return sum(
        class_names[best] != answer.class_name and not 0 < near <= tolerance
        for best, near, answer in zip(found.tolist(), margin.tolist(), golden.answers, strict=True)
    )


def synthetic_images(count: int, seed: int) -> list[bytes]:
    """Return PNG images of gradients, discs, boxes and noise, for want of real ones.

    The same arguments give the same pixels. Sizes differ, so that resizing and cropping of both
    orientations are exercised.
    """
    images = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        height, width = (int(side) for side in rng.integers(40, 241, size=2))
        buffer = io.BytesIO()
        Image.fromarray(_draw(rng, height, width)).save(buffer, format="PNG")
        images.append(buffer.getvalue())
    return images


def _draw(rng: np.random.Generator, height: int, width: int) -> npt.NDArray[np.uint8]:
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width]).reshape(2, 1, 1)
    ends = rng.uniform(0, 255, size=(3, 3))  # colour at the origin, and its slope along y and x
    image = ends[0] + y[..., None] * (ends[1] - 128) + x[..., None] * (ends[2] - 128)
    for _ in range(int(rng.integers(2, 6))):
        centre_y, centre_x = rng.uniform(0.1, 0.9, size=2)
        size = rng.uniform(0.05, 0.35)
        if rng.random() < 0.5:
            mask = (y - centre_y) ** 2 + (x - centre_x) ** 2 < size**2
        else:
            mask = (np.abs(y - centre_y) < size) & (np.abs(x - centre_x) < size / 2)
        image[mask] = rng.uniform(0, 255, size=3)
    top = int(rng.integers(0, height // 2))
    patch = image[top : top + height // 3]  # noise in a band: fine detail for the resizer
    patch += rng.normal(0, 40, size=patch.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def _max_level_difference(golden: GoldenSamples, preprocess: Preprocess) -> int:
    largest = 0
    for data, recorded in zip(golden.encoded, golden.pixels, strict=True):
        try:
            pixels = preprocess(data)
        except ImageError:  # the bytes are as recorded, so this Pillow lacks the format
            return 255
        largest = max(largest, int(np.abs(pixels.astype(np.int16) - recorded).max()))
    return largest


def _no_samples() -> GoldenCheck:
    return GoldenCheck(
        num_samples=0,
        max_level_difference=0,
        allowed_level_difference=0,
        max_abs_delta_logit=None,
        tolerance=0.0,
        num_wrong_answers=0,
        instruction_set=instruction_set(),
    )


def _load_arrays(
    data: bytes, expected_bytes: int
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32]]:
    """Return (pixels, logits), refusing pickles and archives that unpack to more than expected."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        unpacked = sum(info.file_size for info in archive.infolist())
    if unpacked > expected_bytes + 2 * _NPZ_HEADER_BYTES:
        raise ValueError(f"samples.npz unpacks to {unpacked} bytes, more than its arrays need")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        pixels, logits = arrays["pixels"], arrays["logits"]
    if (pixels.dtype, logits.dtype) != (np.uint8, np.float32):
        raise ValueError(f"arrays must be uint8 and float32, got {pixels.dtype}, {logits.dtype}")
    return pixels, logits


def _suffix(encoded: bytes) -> str:
    with Image.open(io.BytesIO(encoded)) as image:
        return {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}.get(
            image.format or "", (image.format or "").lower()
        )

"""A model with its preprocessing and its class names: encoded bytes -> ranked predictions."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fieldmark.errors import CheckFailed, MissingDependency, ModelError, PackageError
from fieldmark.measure import Predict, largest, softmax
from fieldmark.packaging.golden import check_golden
from fieldmark.packaging.load import Device
from fieldmark.packaging.manifest import Package, open_package
from fieldmark.packaging.maps import MapModel, open_maps
from fieldmark.packaging.served import SERVED, open_served
from fieldmark.preprocess import FORMATS, MAX_BYTES, MAX_PIXELS, Pixels, Preprocess
from fieldmark.runtime import log
from fieldmark.runtime.cpu import num_cores
from fieldmark.serving.preference import preferred
from fieldmark.serving.workers import FEW_CORES, Setting, open_workers

_TRIES, _CLEARLY, _WORTH_S = 5, 0.9, 0.001  # to take more threads for one image alone


@dataclass(frozen=True, slots=True)
class Prediction:
    """One class and its probability."""

    class_name: str
    probability: float  # 0 to 1; over all classes of an image they sum to 1
    description: str = ""  # empty: the package has none


@dataclass(frozen=True)
class Predictor:
    """Everything that an answer needs. Safe to share between threads if `predict` is."""

    predict: Predict
    preprocess: Preprocess
    class_names: tuple[str, ...]  # in the order of the logits
    class_descriptions: tuple[str, ...]  # of the same length, empty where there is none
    model_id: str
    workers: int = 1  # calls of `predict` that may run at once
    temperature: float = 1.0  # divides the logits before softmax; rankings do not change
    name: str = "model"
    variant: str = "onnx"
    device: Device = "cpu"
    platform: str = "onnx_onnxv1"  # as the Open Inference Protocol names what runs it
    maps: MapModel | None = None  # the same variant with its features, where it gives them
    alone: Predict | None = None  # the same on more threads, for one image while no other waits
    alone_gain: float = 1.0  # how many times as fast that is for one image

    @property
    def version(self) -> str:
        """The beginning of the model's id: another model never has the same."""
        return self.model_id[:12]

    @cached_property
    def preprocessing(self) -> str:
        """The SHA-256 of the preprocessing's specification."""
        return self.preprocess.digest()

    @property
    def num_classes(self) -> int:
        """How many classes the model tells apart."""
        return len(self.class_names)

    def decode(
        self,
        encoded: bytes,
        *,
        max_bytes: int = MAX_BYTES,
        max_pixels: int = MAX_PIXELS,
        formats: Sequence[str] = FORMATS,
    ) -> Pixels:
        """Return an encoded image as the model's input, uint8 (H, W, 3), or raise ImageError."""
        return self.preprocess(encoded, max_bytes=max_bytes, max_pixels=max_pixels, formats=formats)

    def classify_pixels(self, pixels: Pixels, top_k: int | None = None) -> list[list[Prediction]]:
        """Return for each image its `top_k` classes (None: all), the likeliest first.

        Equal logits keep the order of the classes.

        Args:
            pixels: uint8 (B, H, W, 3), as `decode` returns them, stacked.

        Raises:
            ModelError: the model gives NaN, infinity, or another number of outputs.
        """
        return self.rank(self.logits(pixels), top_k)

    def logits(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        """Return the logits, float32 (B, num_classes), all finite; errors as `classify_pixels`."""
        return self._checked(self.predict, pixels)

    def logits_alone(self, pixels: Pixels) -> npt.NDArray[np.float32]:
        """Return what `logits` does, sooner, for one image while nothing else is computed."""
        return self._checked(self.alone or self.predict, pixels)

    def _checked(self, predict: Predict, pixels: Pixels) -> npt.NDArray[np.float32]:
        logits = predict(pixels)
        expected = (len(pixels), self.num_classes)
        if logits.shape != expected:
            raise ModelError(
                f"the model's output must have the shape {expected}. Got {logits.shape}. "
                "Export the package again."
            )
        if not np.isfinite(logits).all():
            raise ModelError(
                "the model's output must be finite. Got NaN or infinity. "
                "Run: fieldmark verify PACKAGE."
            )
        return logits

    def rank(
        self, logits: npt.NDArray[np.float32], top_k: int | None = None
    ) -> list[list[Prediction]]:
        """Return for each row of logits (B, num_classes) its classes, as `classify_pixels` does."""
        probabilities = softmax(logits, self.temperature)
        # By logit: two probabilities may both be rounded to 0 where the logits still differ.
        order = largest(logits, top_k)
        return [
            [self._prediction(k, float(row[k])) for k in ranked]
            for ranked, row in zip(order.tolist(), probabilities, strict=True)
        ]

    def _prediction(self, k: int, probability: float) -> Prediction:
        return Prediction(self.class_names[k], probability, self.class_descriptions[k])


def open_predictor(
    package_path: str | Path,
    variant: str = "onnx",
    threads: int = 0,
    check: bool = True,
    workers: int = 1,
    device: Device = "cpu",
    serves: bool = False,
) -> Predictor:
    """Return the predictor of a package, once its golden samples give what was recorded.

    Args:
        variant: an ONNX or OpenVINO variant of the package.
        threads: of the model; 0: as many as this process may use.
        check: whether to run the golden samples. A package without any is opened with a note.
        workers: calls that may run at once, each with `threads`.
        device: where it runs.
        serves: whether to open the variant again for what only a service needs: class maps, if it
            has any, and one image alone on all threads, if calls share them.

    Raises:
        PackageError: the folder is not a package, or is damaged.
        CheckFailed: this machine does not repeat the recorded answers, or the variant was
            measured to disagree with the trained model.
    """
    package = open_package(package_path)
    # One session of onnxruntime may run several calls; a model of OpenVINO holds one request.
    is_openvino = variant in package.manifest.variants and (
        package.manifest.variants[variant].kind == "openvino"
    )
    predict = open_workers(
        partial(open_served, package, variant, device=device),
        Setting(workers, threads),
        shared=not is_openvino,
    )
    entry = package.manifest.variants[variant]
    if check and entry.parity is not None:
        problems = entry.parity_problems(entry.parity)
        if problems:
            raise CheckFailed(
                f"variant {variant!r} of {package_path} must agree with the trained model. "
                f"{' '.join(problems)} Run: {entry.made_by(package.path)}."
            )
    # A thread beside those of the model, which are as many as there are cores.
    maps = _maps(package, variant, 1, device) if serves else None
    alone = None
    most = min(workers * threads, FEW_CORES, num_cores())
    if serves and workers > 1 and most > threads:
        alone = open_served(package, variant, most, device)
    if check and package.manifest.golden.count:
        _must_repeat_golden(package, variant, predict)
        if maps is not None:
            _must_repeat_golden(package, variant, lambda pixels: maps.run(pixels)[0])
        if alone is not None:
            _must_repeat_golden(package, variant, alone)
    elif check:
        log.warn(f"{package_path} has no golden samples, so its answers were not checked here.")
    return Predictor(
        predict=predict,
        preprocess=package.preprocess,
        class_names=package.class_names,
        class_descriptions=package.class_descriptions,
        model_id=package.id,
        workers=workers,
        temperature=package.temperature,
        name=package.manifest.name,
        variant=variant,
        device=device,
        platform="openvino_ir" if is_openvino else "onnx_onnxv1",
        maps=maps,
        alone=alone,
    )


def unless_slower(predictor: Predictor) -> Predictor:
    """Return the predictor with what `alone` gains, or without it where that is little."""
    if predictor.alone is None:
        return predictor
    spec, draw = predictor.preprocess, np.random.default_rng(0)
    image = draw.integers(0, 256, (1, spec.height_px, spec.width_px, 3), dtype=np.uint8)
    usual_s, alone_s = (_best_s(call, image) for call in (predictor.logits, predictor.logits_alone))
    if usual_s >= _WORTH_S and alone_s < _CLEARLY * usual_s:
        return replace(predictor, alone_gain=usual_s / alone_s)
    return replace(predictor, alone=None)


def _best_s(call: Callable[[Pixels], object], image: Pixels) -> float:
    """Return the shortest time of a call, in seconds."""
    seconds = []
    for _ in range(_TRIES):
        started = time.monotonic()
        call(image)
        seconds.append(time.monotonic() - started)
    return min(seconds)


def _must_repeat_golden(package: Package, variant: str, predict: Predict) -> None:
    entry = package.manifest.variants[variant]
    result = check_golden(package, predict, entry.precision, recorded=entry.golden)
    if not result.passed:
        raise CheckFailed(
            f"variant {variant!r} of {package.path} must repeat its golden samples. "
            f"{' '.join(result.problems())} Run: fieldmark verify {package.path}."
        )


def _maps(package: Package, variant: str, threads: int, device: Device) -> MapModel | None:
    entry = package.manifest.variants[variant]
    if entry.kind != "onnx" or entry.head is None or len(entry.outputs) < 2:
        return None
    return open_maps(package, variant, threads, device)


def open_variant(
    folder: Path, variant: str, open_with_torch: Callable[[Path, str], Predict]
) -> Predictor:
    """Return the predictor of any variant of a package: ONNX and OpenVINO without torch.

    Args:
        variant: a variant, torch for the trained model, or auto: the one that this machine
            prefers, else onnx where there is one.
        open_with_torch: opens the package's other variants.

    Raises:
        PackageError: auto, without an ONNX variant and without torch.
    """
    package = open_package(folder)
    variants = package.manifest.variants
    found = preferred(package) if variant == "auto" else None
    if found is not None and found.choice is not None:
        choice = found.choice
        log.say(f"variant {choice.variant}: preferred on this machine")
        # Batches go through the model one after another, so one call at a time has all cores.
        threads = choice.threads if choice.workers == 1 else 0
        return open_predictor(folder, choice.variant, threads)
    if variant == "onnx" or (variant == "auto" and "onnx" in variants):
        return open_predictor(folder)
    if variant in variants and variants[variant].kind in SERVED:
        return open_predictor(folder, variant)
    try:
        predict = open_with_torch(folder, "torch" if variant == "auto" else variant)
    except MissingDependency:
        if variant != "auto":
            raise
        raise PackageError(
            f"{folder} must have an ONNX variant to predict without torch. It has none. "
            f"Where it was trained, run: fieldmark export {folder}."
        ) from None
    return Predictor(
        predict=predict,
        preprocess=package.preprocess,
        class_names=package.class_names,
        class_descriptions=package.class_descriptions,
        model_id=package.id,
        temperature=package.temperature,
        name=package.manifest.name,
        variant="torch" if variant == "auto" else variant,
    )

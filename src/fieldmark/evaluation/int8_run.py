"""Quantizing a package's ONNX variant: sets of images, the search, and the new variant."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from fieldmark.errors import ConfigError, PackageError, UnknownName
from fieldmark.evaluation.int8_plot import save_frontier
from fieldmark.evaluation.int8_sets import Int8Sets, LoadedSet, choose_sets
from fieldmark.measure import compare_logits, log_softmax
from fieldmark.packaging.entries import GraphEntry, Quantization, Variant
from fieldmark.packaging.int8 import (
    CALIBRATIONS,
    Calibration,
    Int8Settings,
    StaticQuantizer,
    needs_reduced_range,
    quantized_dynamically,
    scratch_folder,
)
from fieldmark.packaging.int8_search import Candidate, Found, Int8Search, Measured
from fieldmark.packaging.load import open_session
from fieldmark.packaging.manifest import Package, open_package
from fieldmark.packaging.simplify import describe_graph
from fieldmark.packaging.write import add_variant
from fieldmark.preprocess import Pixels
from fieldmark.runtime.cpu import instruction_set
from fieldmark.runtime.log import say

Method = Literal["auto", "static", "dynamic"]
FLOAT_VARIANT, INT8_VARIANT = "onnx", "int8"
DEFAULT_CALIB_IMAGES = 256

_BATCH_SIZE = 16
_SENSITIVITY_IMAGES = 64
_SPEED_SECONDS, _MIN_ROUNDS, _MAX_ROUNDS = 2.0, 3, 30


@dataclass(frozen=True, slots=True)
class Int8Result:
    """A quantized model, and how it came about."""

    model: bytes
    quantization: Quantization
    tried: tuple[Candidate, ...]
    sensitivity: dict[str, float]
    holds: bool  # the bound, on the selection images

    def to_json(self) -> dict[str, Any]:
        """Return plain values: what was tried, and how far each layer's rounding moves answers."""
        return {
            "quantization": self.quantization.model_dump(mode="json"),
            "tried": [candidate.to_json() for candidate in self.tried],
            "sensitivity": self.sensitivity,
        }


@dataclass(frozen=True, slots=True)
class Quantized:
    """A package with an int8 variant, or (where the bound does not hold) without."""

    facts: dict[str, Any]
    holds: bool
    report_on: dict[str, str]  # the images that `verify` is to look at, once


def quantize_package(
    folder: Path,
    *,
    method: Method,
    max_drop: float,
    calibration: Calibration | None,
    report_on: Mapping[str, str],
    calib: str,
    calib_images: int | None,
    seed: int,
    plot: Path | None,
) -> Quantized:
    """Add the variant "int8" to a package, and say which images to report on.

    Args:
        max_drop: in points.
        report_on: data, split, image_column and label_column, as `verify` takes them.

    Raises:
        ConfigError: settings that do not go together.
        PackageError, DataError, ModelError: see `choose_sets` and `quantize_statically`.
    """
    _check(method, max_drop, calibration, calib, calib_images, seed, plot)
    package = open_package(folder)
    model = float_model(package)
    images = dict(report_on)
    if method == "dynamic":
        made = quantize_on_the_fly(model, max_drop=max_drop / 100)
    else:
        sets = choose_sets(
            package,
            data=images["data"],
            split=images["split"],
            calib=calib,
            columns={name: images[name] for name in ("image_column", "label_column")},
            num_images=calib_images or DEFAULT_CALIB_IMAGES,
            seed=seed,
        )
        images["split"] = sets.report_split
        chosen = calibration or "minmax"
        made = quantize_statically(
            model, sets, method=method, calibration=chosen, max_drop=max_drop / 100
        )
    if plot is not None:
        save_frontier(plot, made.tried, max_drop=max_drop / 100, float_bytes=len(model))
    facts = {"float_bytes": len(model), **made.to_json()}
    if not made.holds:
        return Quantized(facts, False, images)
    entry = package.manifest.variants[FLOAT_VARIANT]
    changed = add_variant(
        folder,
        INT8_VARIANT,
        made.model,
        kind="onnx",
        opset=entry.opset,
        quantization=made.quantization,
        features=entry.features,
        graph=_graph(made.model, entry),
        written_by=f"onnxruntime {ort.__version__}",
    )
    file = changed.manifest.variants[INT8_VARIANT].file
    ratio = len(model) / len(made.model)
    say(f"quantized {folder / file} ({len(made.model) / 1e6:.1f} MB, {ratio:.2f} times smaller)")
    return Quantized(facts, True, images)


def _graph(model: bytes, of_float: Variant) -> GraphEntry:
    """Return the operators; what counts as a parameter is that of the float32 graph."""
    graph = describe_graph(onnx.load_from_string(model))
    if of_float.graph is None:
        return graph
    return graph.model_copy(update={"num_parameters": of_float.graph.num_parameters})


def _check(
    method: Method,
    max_drop: float,
    calibration: Calibration | None,
    calib: str,
    calib_images: int | None,
    seed: int,
    plot: Path | None,
) -> None:
    if method not in get_args(Method):
        raise UnknownName.among("method", method, get_args(Method))
    if calibration is not None and calibration not in CALIBRATIONS:
        raise UnknownName.among("calibration", calibration, CALIBRATIONS)
    if not 0 <= max_drop <= 100:
        raise ConfigError(f"--max-drop must be 0 to 100 points. Got {max_drop:g}.")
    if calibration is not None and method != "static":
        raise ConfigError(
            f"--calibration is for --method static. Got --method {method}, which "
            f"{'tries them all' if method == 'auto' else 'has no calibration'}. Leave it out."
        )
    if calib_images is not None and calib_images < 1:
        raise ConfigError(f"--calib-images must be at least 1. Got {calib_images}.")
    if method == "dynamic" and (calib or calib_images is not None or seed):
        raise ConfigError(
            "--method dynamic calibrates on nothing. Leave out --calib, --calib-images and --seed."
        )
    if plot is not None and method != "auto":
        raise ConfigError(f"--plot draws what --method auto tried. Got --method {method}.")
    if plot is not None and (plot.is_dir() or not plot.absolute().parent.is_dir()):
        raise ConfigError(f"--plot {plot} must be a file in a folder that exists. Make it first.")


class Int8Measure:
    """Measures int8 models against the float32 one on the selection images."""

    def __init__(self, float_model: bytes, selection: LoadedSet) -> None:
        self._float = open_session(float_model, "the float32 model")
        self._selection = selection
        self._reference = _logits(self._float, selection.pixels)

    def __call__(self, model: bytes) -> Measured:
        """Return what the bound and the report of the search need."""
        session = open_session(model, "the int8 model")
        logits = _logits(session, self._selection.pixels)
        agreement = compare_logits(self._reference, logits, self._selection.labels)
        # Without labels no answer is known to be right: then all that change count as lost.
        drop = 1.0 - agreement.top1_agreement.value
        if agreement.accuracy_drop is not None:
            drop = agreement.accuracy_drop[0]
        return Measured(
            agreement=agreement,
            mean_kl=_mean_kl(self._reference, logits),
            drop=drop,
            speed_ratio=speed_ratio(self._float, session, self._selection.pixels[:_BATCH_SIZE]),
        )

    def mean_kl(self, model: bytes) -> float:
        """Return the mean divergence over the first few images, nats."""
        pixels = self._selection.pixels[:_SENSITIVITY_IMAGES]
        logits = _logits(open_session(model, "the int8 model"), pixels)
        return _mean_kl(self._reference[: len(pixels)], logits)


def float_model(package: Package) -> bytes:
    """Return the package's float32 ONNX variant.

    Raises:
        PackageError: there is none.
    """
    if FLOAT_VARIANT not in package.manifest.variants:
        raise PackageError(
            f"{package.path} must have the variant {FLOAT_VARIANT!r} to be quantized. Got none. "
            f"Run: fieldmark export {package.path}."
        )
    return package.read(package.manifest.variants[FLOAT_VARIANT].file)


def quantize_statically(
    model: bytes, sets: Int8Sets, *, method: Method, calibration: Calibration, max_drop: float
) -> Int8Result:
    """Return the model in int8: "static" as asked, "auto" as the search finds.

    Raises:
        ModelError: it cannot be quantized.
    """
    reduce_range = needs_reduced_range()
    measure = Int8Measure(model, sets.selection)
    with scratch_folder() as folder:
        quantizer = StaticQuantizer(model, sets.calibration.pixels, folder)
        if method == "auto":
            search = Int8Search(
                quantizer, measure, measure.mean_kl, max_drop=max_drop, reduce_range=reduce_range
            )
            found = search.run()
        else:
            settings = Int8Settings(calibration, reduce_range)
            int8 = quantizer.quantized(settings)
            only = Candidate(settings, len(int8), measure(int8))
            found = Found(only, int8, True, (only,), {})
    settings = found.best.settings
    quantization = Quantization(
        method="static",
        calibration=settings.calibration,
        reduce_range=settings.reduce_range,
        bias_corrected=settings.bias_corrected,
        num_layers=len(quantizer.layers),
        layers_in_float=settings.float_layers,
        max_drop=max_drop,
        calibration_set=sets.calibration.entry,
        selection_set=sets.selection.entry if method == "auto" else None,
        num_tried=len(found.tried),
        instruction_set=instruction_set(),
    )
    return Int8Result(found.model, quantization, found.tried, found.sensitivity, found.holds)


def quantize_on_the_fly(model: bytes, *, max_drop: float) -> Int8Result:
    """Return the model with 8-bit weights, whose activations are rounded as they come.

    Raises:
        ModelError: it cannot be quantized.
    """
    with scratch_folder() as folder:
        int8, num_layers = quantized_dynamically(model, folder)
    quantization = Quantization(
        method="dynamic",
        calibration=None,
        reduce_range=needs_reduced_range(),
        bias_corrected=False,
        num_layers=num_layers,
        layers_in_float=(),
        max_drop=max_drop,
        calibration_set=None,
        selection_set=None,
        num_tried=1,
        instruction_set=instruction_set(),
    )
    return Int8Result(int8, quantization, (), {}, holds=True)


def speed_ratio(slow: ort.InferenceSession, fast: ort.InferenceSession, pixels: Pixels) -> float:
    """Return the images per second of `fast` over those of `slow`: median of alternating rounds."""
    ratios: list[float] = []
    for session in (slow, fast):
        _logits(session, pixels)  # the first run lays out memory
    started = time.perf_counter()
    while len(ratios) < _MIN_ROUNDS or (
        len(ratios) < _MAX_ROUNDS and time.perf_counter() - started < _SPEED_SECONDS
    ):
        seconds = []
        for session in (slow, fast):
            before = time.perf_counter()
            _logits(session, pixels)
            seconds.append(time.perf_counter() - before)
        ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios)


def _logits(session: ort.InferenceSession, pixels: Pixels) -> npt.NDArray[np.float32]:
    starts = range(0, len(pixels), _BATCH_SIZE)
    return np.concatenate(
        [session.run(["logits"], {"images": pixels[s : s + _BATCH_SIZE]})[0] for s in starts]
    )


def _mean_kl(reference: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> float:
    log_p, log_q = log_softmax(reference), log_softmax(other)
    return float((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean())

"""What int8 costs in accuracy and gives in size and speed, for real models on real images.

    .venv/bin/python benchmarks/int8.py accuracy --model MODEL --data SOURCE [--calib SOURCE]
    .venv/bin/python benchmarks/int8.py speed [--weights local-dir:PATH_OF_LITE0]
    .venv/bin/python benchmarks/int8.py dynamic --model MODEL --data SOURCE [--calib SOURCE]

accuracy  exports MODEL (a run, a package, local-dir:PATH) to ONNX, compares it with torch, and runs
          `fieldmark quantize` as it is, but for --max-drop; the report is on images that chose
          nothing. Speed of int8 over float32, both in onnxruntime, is timed in alternating rounds.
speed     ResNet-50 (untrained: speed does not depend on the weights) and tf_efficientnet_lite0 at
          224 px, ResNet-18 at 32 px (untrained), batch 16: torch eager in NCHW and channels_last,
          onnxruntime float32 and int8.
dynamic   what torch.ao.quantization.quantize_dynamic makes of the network when asked for Linear and
          Conv2d, as tutorials ask it, beside `--method dynamic`, `static` and `auto`: layers in
          int8, size, speed and accuracy.

Each appends a row to benchmarks/results/int8.json.
"""

import argparse
import io
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import results_file
import torch
from results_file import Row

import fieldmark
from fieldmark.data.held_out import eval_batches
from fieldmark.data.source import open_source
from fieldmark.errors import FieldmarkError
from fieldmark.evaluation.backends import open_module
from fieldmark.evaluation.splits import pick_split, spread_over
from fieldmark.measure import Predict, compare_logits
from fieldmark.model import (
    Architecture,
    InferenceModule,
    adapt_architecture,
    build,
    eager_predict,
)
from fieldmark.packaging.export import export_onnx
from fieldmark.packaging.int8 import (
    Int8Settings,
    StaticQuantizer,
    needs_reduced_range,
    scratch_folder,
)
from fieldmark.packaging.load import open_onnx, open_session
from fieldmark.packaging.manifest import open_package
from fieldmark.packaging.resolve import resolve_model
from fieldmark.runtime.cpu import num_cores
from fieldmark.runtime.log import say

NAME = "int8"
COMMAND = "benchmarks/int8.py JOB --model MODEL --data SOURCE [--calib SOURCE]"
BATCH_SIZE = 16
ROUNDS = 15
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main() -> None:
    """Run one job and append its row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", choices=["accuracy", "speed", "dynamic"])
    parser.add_argument("--model", default="", help="of accuracy and dynamic")
    parser.add_argument("--data", default="", help="images to report on")
    parser.add_argument("--calib", default="", help="images to calibrate on")
    parser.add_argument("--max-drop", type=float, default=0.5, help="points")
    parser.add_argument("--weights", default="", help="of lite0, for speed [none: untrained]")
    options = parser.parse_args()
    torch.set_num_threads(num_cores())
    try:
        if options.job == "speed":
            row = speed(options.weights)
        else:
            with tempfile.TemporaryDirectory() as folder:
                package = packaged(options.model, options.data, Path(folder, "package"))
                job = accuracy if options.job == "accuracy" else dynamic
                row = job(package, options.data, options.calib, options.max_drop)
    except FieldmarkError as error:
        sys.exit(f"error: {error}")
    where = {"job": options.job, "model": Path(options.model.rpartition(":")[2]).name}
    results_file.append_row(NAME, COMMAND, where | row)


def packaged(model: str, data: str, out: Path) -> Path:
    """Return a package of our own of the model, without variants."""
    fieldmark.package(model, out, data=data)
    return out


def accuracy(package: Path, data: str, calib: str, max_drop: float) -> Row:
    """Return what export and quantization came to."""
    torch_facts = fieldmark.export(package, data=data)
    onnx = torch_facts.facts["variants"]["onnx"]
    started = time.monotonic()
    int8 = fieldmark.quantize(package, data=data, calib=calib, max_drop=max_drop)
    seconds = time.monotonic() - started
    if "variants" not in int8.facts:
        return {"max_drop": max_drop, "holds": False, "tried": int8.facts["tried"]}
    found = int8.facts["variants"]["int8"]
    opened = open_package(package)
    predicts = {name: open_onnx(opened, name) for name in ("onnx", "int8")}
    times = interleaved(predicts, noise(opened.preprocess.height_px))
    return {
        "max_drop": max_drop,
        "quantize_s": round(seconds, 1),
        "onnx_agreement_with_torch": onnx["parity"]["top1_agreement"],
        "int8_agreement_with_torch": found["parity"]["top1_agreement"],
        "accuracy_drop": found["parity"]["accuracy_drop"],
        "deployable": found["deployable"],
        "size_ratio": round(onnx["bytes"] / found["bytes"], 3),
        "speed_over_onnx": ratio(times["onnx"], times["int8"]),
        "quantization": short(int8.facts["quantization"]),
        "num_tried": len(int8.facts["tried"]),
    }


def short(quantization: dict[str, Any]) -> dict[str, Any]:
    """Return how a variant was made, without paths."""
    kept = ("calibration", "reduce_range", "bias_corrected", "num_layers", "layers_in_float")
    sets = {
        name: quantization[name] and quantization[name]["num_images"]
        for name in ("calibration_set", "selection_set")
    }
    return {name: quantization[name] for name in kept} | sets


def speed(weights: str) -> Row:
    """Return images per second of four ways to run each of two networks."""
    row: Row = {"batch_size": BATCH_SIZE, "threads": num_cores()}
    for name, source, side_px in (
        ("resnet50", "", 224),
        ("tf_efficientnet_lite0", weights, 224),
        ("resnet18", "", 32),
    ):
        if source:
            module = open_module(resolve_model(source))
        else:
            torch.manual_seed(0)
            architecture, _ = adapt_architecture(Architecture(name, 10), side_px, "auto")
            module = InferenceModule(build(architecture).eval(), MEAN, STD)
        row[name] = {"side_px": side_px, **four_ways(module, side_px)}
        say(f"{name}: {row[name]}")
    return row


def four_ways(module: InferenceModule, side_px: int) -> Row:
    """Return the speed of eager NCHW and channels_last, and of ONNX in float32 and int8."""
    model = export_onnx(module, side_px, side_px).data
    pixels = noise(side_px)
    with scratch_folder() as folder:
        quantizer = StaticQuantizer(model, pixels, folder)
        settings = Int8Settings(reduce_range=needs_reduced_range(), bias_corrected=True)
        int8 = quantizer.quantized(settings)
    predicts: dict[str, Predict] = {
        "onnx": session_predict(model),
        "int8": session_predict(int8),
        "eager": nchw_predict(module),
        "eager_channels_last": eager_predict(module),
    }
    times: dict[str, list[float]] = {name: [] for name in predicts}
    for number in range(ROUNDS + 1):  # the first round is warm-up
        for memory in (torch.contiguous_format, torch.channels_last):
            module.network.to(memory_format=memory)
            is_last = memory is torch.channels_last
            for name in ["eager_channels_last"] if is_last else ["onnx", "int8", "eager"]:
                before = time.perf_counter()
                predicts[name](pixels)
                if number:
                    times[name].append(time.perf_counter() - before)
    return {
        "images_per_s": {name: per_s(seconds) for name, seconds in times.items()},
        "onnx_over_channels_last": ratio(times["eager_channels_last"], times["onnx"]),
        "int8_over_channels_last": ratio(times["eager_channels_last"], times["int8"]),
        "int8_over_eager": ratio(times["eager"], times["int8"]),
        "int8_over_onnx": ratio(times["onnx"], times["int8"]),
    }


def nchw_predict(module: InferenceModule) -> Predict:
    """Return the module on images that lie in memory as (B, 3, H, W), as loaders give them."""

    @torch.inference_mode()
    def predict(images: np.ndarray) -> np.ndarray:
        batch = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous() / 255.0
        logits: np.ndarray = module.network((batch - module.mean) / module.std).numpy()
        return logits

    return predict


def dynamic(package: Path, data: str, calib: str, max_drop: float) -> Row:
    """Return size, layers, speed and accuracy of torch's dynamic call and of our three methods."""
    fieldmark.export(package, data=data)
    opened = open_package(package)
    module = open_module(resolve_model(str(package)))
    reference = eager_predict(module)
    quantized, tutorials = torch_dynamic(module)
    models: dict[str, tuple[Predict, int, int]] = {
        "torch eager, float32": (reference, len(saved(module)), 0),
        "torch.ao.quantization.quantize_dynamic": (
            eager_predict(tutorials),
            len(saved(tutorials)),
            quantized,
        ),
    }
    for method in ("dynamic", "static", "auto"):
        made = fieldmark.quantize(
            package,
            method=method,  # type: ignore[arg-type]
            data=data,
            calib="" if method == "dynamic" else calib,
            max_drop=max_drop if method == "auto" else 100.0,
        )
        if "variants" not in made.facts:
            say(f"--method {method} held no bound of {max_drop} points")
            continue
        opened = open_package(package)
        entry = opened.manifest.variants["int8"]
        assert entry.quantization is not None
        layers = entry.quantization.num_layers - len(entry.quantization.layers_in_float)
        size = opened.manifest.files[entry.file].bytes
        models[f"fieldmark --method {method}"] = (open_onnx(opened, "int8"), size, layers)
    times = interleaved({k: v[0] for k, v in models.items()}, noise(opened.preprocess.height_px))
    agreements = compared({k: v[0] for k, v in models.items()}, package, data)
    first = "torch eager, float32"
    return {
        "num_layers": sum(
            isinstance(m, torch.nn.Conv2d | torch.nn.Linear) for m in module.modules()
        ),
        "models": {
            name: {
                "layers_in_int8": layers,
                "bytes": size,
                "speed_over_eager": ratio(times[first], times[name]),
                **agreements[name],
            }
            for name, (_, size, layers) in models.items()
        },
    }


def torch_dynamic(module: InferenceModule) -> tuple[int, InferenceModule]:
    """Return how many layers torch's call quantizes, and what it makes of the module."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = torch.ao.quantization.quantize_dynamic(
            module, {torch.nn.Linear, torch.nn.Conv2d}, dtype=torch.qint8
        )
    of_torch = (torch.nn.quantized.dynamic.Linear, torch.nn.quantized.Conv2d)
    quantized = sum(isinstance(part, of_torch) for part in made.modules())
    return quantized, made


def saved(module: torch.nn.Module) -> bytes:
    """Return the weights as torch saves them."""
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    return file.getvalue()


def compared(predicts: dict[str, Predict], package: Path, data: str) -> dict[str, Row]:
    """Return agreement and accuracy drop against the first, on the images of the report."""
    resolved = resolve_model(str(package))
    source = open_source(data)
    chosen = spread_over(pick_split(source, "auto", training=resolved.training), 2_000)
    from fieldmark.data.classes import match_classes

    to_model = match_classes(
        source.class_names, resolved.require_class_names(), resolved.class_descriptions
    )
    logits: dict[str, list[np.ndarray]] = {name: [] for name in predicts}
    labels = []
    for images, of_batch in eval_batches(chosen, resolved.preprocess, 50):
        labels.append(to_model[of_batch])
        for name, predict in predicts.items():
            logits[name].append(predict(images))
    joined = {name: np.concatenate(parts) for name, parts in logits.items()}
    truth = np.concatenate(labels)
    reference = next(iter(joined.values()))
    return {
        name: {
            "top1_accuracy": float((found.argmax(axis=1) == truth).mean()),
            **compare_logits(reference, found, truth).to_json(),
        }
        for name, found in joined.items()
    }


def session_predict(model: bytes) -> Predict:
    """Return an ONNX model as a Predict."""
    session = open_session(model, "model")

    def predict(images: np.ndarray) -> np.ndarray:
        logits: np.ndarray = session.run(["logits"], {"images": images})[0]
        return logits

    return predict


def noise(side_px: int) -> np.ndarray:
    """Return a batch of random pixels."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (BATCH_SIZE, side_px, side_px, 3), dtype=np.uint8)


def interleaved(
    predicts: dict[str, Callable[[np.ndarray], np.ndarray]], pixels: np.ndarray
) -> dict[str, list[float]]:
    """Return the seconds of each for a batch, in rounds that take them in turn."""
    times: dict[str, list[float]] = {name: [] for name in predicts}
    for number in range(ROUNDS + 1):  # the first round is warm-up
        for name, predict in predicts.items():
            before = time.perf_counter()
            predict(pixels)
            if number:
                times[name].append(time.perf_counter() - before)
    return times


def per_s(seconds: list[float]) -> float:
    """Return the median of images per second."""
    return round(BATCH_SIZE / statistics.median(seconds), 1)


def ratio(slow: list[float], fast: list[float]) -> dict[str, float | int]:
    """Return the spread of the ratio over rounds."""
    spread = results_file.spread([round(a / b, 3) for a, b in zip(slow, fast, strict=True)])
    return dict(spread)


if __name__ == "__main__":
    main()

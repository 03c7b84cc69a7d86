"""START HERE: the stages, each on one screen, and how data flows from one to the next.

    config -> data -> model -> train -> evaluate -> package -> export -> verify -> predict, serve

Each function returns a plain object with `to_json()`. Stages are imported when they are asked for,
so that predicting and serving need no torch.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fieldmark.errors import ConfigError, require
from fieldmark.runtime.log import say

if TYPE_CHECKING:
    from fieldmark.measure import Predict
    from fieldmark.serving.files import FileResult
    from fieldmark.serving.limits import Limits

Golden = Literal["auto", "data", "synthetic", "none"]
ExportFormat = Literal["onnx", "torchscript", "pt2", "openvino"]
QuantizeMethod = Literal["auto", "static", "dynamic"]
Calibration = Literal["minmax", "percentile", "entropy"]
MAX_PARITY_IMAGES = 2_000


@dataclass(frozen=True)
class Result:
    """What a stage did: the facts for machines, and where its files are."""

    path: Path | None
    facts: dict[str, Any] = field(default_factory=dict)
    passed: bool = True

    def to_json(self) -> dict[str, Any]:
        """Return plain values; rates are {"value", "low", "high", "n"}, fractions."""
        where = {} if self.path is None else {"path": str(self.path)}
        return where | self.facts


def train(
    recipe: str = "",
    settings: Sequence[str] = (),
    *,
    out: str | Path | None = None,
    resume: bool = False,
    pie: str | Path | None = None,
) -> Result:
    """Train a recipe and return the run: its folder ends with a package and a test result.

    Args:
        recipe: a name of `recipes()`, or a TOML file (which may name a recipe to start from).
        settings: "section.key=value" over the recipe.
        out: the run's folder; default runs/RECIPE. It must not exist, unless `resume`.
        resume: go on with the run in `out`, with its own configuration.
        pie: a PNG of the class distribution of each split.
    """
    require("torch", "train", "training")
    from fieldmark.fitting import fit
    from fieldmark.training.processes import joined
    from fieldmark.training.start import open_run

    if pie is not None and not Path(pie).absolute().parent.is_dir():
        raise ConfigError(f"--pie {pie} must be in a folder that exists. Make it first.")
    with joined() as ranks:
        run = open_run(recipe, settings, None if out is None else Path(out), resume, ranks)
        facts = fit(run, resume)
    if run.writes:
        _draw_classes(facts, pie)
    return Result(run.path, facts)


def launch(num_processes: int, arguments: Sequence[str]) -> int:
    """Run `fieldmark ARGUMENTS` in processes that train together; return the exit status.

    Args:
        num_processes: on this machine; on CUDA each takes a GPU.
        arguments: of `fieldmark train`, with the verb.
    """
    require("torch", "train", "training")
    from fieldmark.training.launch import launch as launch_processes

    return launch_processes(num_processes, arguments)


def evaluate(
    model: str | Path,
    data: str,
    *,
    split: str = "auto",
    variant: str = "torch",
    image_column: str = "",
    label_column: str = "",
    arch: str = "",
    classes: Path | None = None,
    image_px: int = 0,
    batch_size: int = 64,
    out: str | Path | None = None,
) -> Result:
    """Measure a model on labelled images, matched by class name.

    Args:
        model: a package, a run, local-dir:PATH, timm:NAME, or a state dict with `arch`.
        data: a data source such as "folder:photos/val".
        split: train, val, test or all; auto takes the test split, or what was held out of this
            source when the model was trained on it, or all of a folder that has no splits.
        variant: torch (the reference), or an exported variant of a package.
        image_column, label_column: of an hf: source that has several.
        out: where metrics.json and predictions.npz go; default: beside a run, else nowhere.
    """
    require("torch", "train", "evaluating on a data source")
    from fieldmark.data.source import open_source
    from fieldmark.evaluation.backends import open_backend
    from fieldmark.evaluation.run import evaluate_split, evaluation_folder, write_evaluation
    from fieldmark.evaluation.splits import pick_split
    from fieldmark.packaging.resolve import resolve_model

    resolved = resolve_model(str(model), arch=arch, classes_file=classes, image_px=image_px)
    class_names = resolved.require_class_names()
    source = open_source(data, image_column=image_column, label_column=label_column)
    chosen = pick_split(source, split, training=resolved.training)
    say(f"{resolved.name} ({variant}) on {len(chosen)} images: {data}, {chosen.name}")
    evaluation = evaluate_split(
        open_backend(resolved, variant),
        chosen,
        resolved.preprocess,
        data_class_names=source.class_names,
        class_names=class_names,
        class_descriptions=resolved.class_descriptions,
        batch_size=batch_size,
    )
    about = {"model": str(model), "variant": variant, "data": data, "split": chosen.name}
    confidence = resolved.package and resolved.package.manifest.confidence
    facts = about | evaluation.to_json(class_names, confidence.temperature if confidence else None)
    folder = Path(out) if out else evaluation_folder(Path(model), chosen.name, variant)
    if folder is not None:
        write_evaluation(
            folder,
            evaluation,
            class_names=class_names,
            image_names=[chosen.images.name(index) for index in range(len(chosen))],
            facts=facts,
        )
    return Result(folder, facts)


def package(
    model: str | Path,
    out: str | Path,
    *,
    data: str = "",
    image_column: str = "",
    label_column: str = "",
    golden: Golden = "auto",
    arch: str = "",
    classes: Path | None = None,
    image_px: int = 0,
    license: str = "",
) -> Result:
    """Make a package from foreign weights, or a copy of one with other golden samples.

    Args:
        data: labelled images, which are measured and give the golden samples.
        golden: data (needs `data`), synthetic, none, or auto: data if given, else synthetic.
        license: of the weights, where they do not say it themselves.
    """
    require("torch", "train", "packaging")
    from fieldmark.data.source import open_source
    from fieldmark.evaluation.finish import package_model
    from fieldmark.packaging.resolve import resolve_model

    resolved = resolve_model(str(model), arch=arch, classes_file=classes, image_px=image_px)
    columns = {"image_column": image_column, "label_column": label_column}
    source = open_source(data, **columns) if data else None
    facts = package_model(resolved, Path(out), source=source, golden=golden, license=license)
    return Result(Path(out), facts)


def export(
    model: str | Path, to: ExportFormat = "onnx", *, data: str = "", features: bool = False
) -> Result:
    """Export a package (or a run's) to another format, and verify the result.

    Args:
        to: onnx, torchscript, pt2 (a program of torch.export) or openvino.
        features: of onnx: give the last feature map as a second output, for exact class maps.
        data: where the images for the comparison come from; default: as in `verify`.
    """
    require("torch", "train", "exporting")
    from fieldmark.evaluation.backends import open_module
    from fieldmark.packaging.export import NOTES, export_module
    from fieldmark.packaging.manifest import package_folder
    from fieldmark.packaging.resolve import resolve_model
    from fieldmark.packaging.write import add_variant

    folder = package_folder(model)
    resolved = resolve_model(str(folder))
    spec = resolved.preprocess
    exported = export_module(
        open_module(resolved), to, spec.height_px, spec.width_px, features=features
    )
    if to in NOTES:
        say(NOTES[to])
    changed = add_variant(
        folder,
        to,
        exported.data,
        kind=to,
        opset=exported.opset,
        weights=exported.weights,
        features=exported.features,
        graph=exported.graph,
        written_by=exported.written_by,
    )
    entry = changed.manifest.variants[to]
    say(f"exported {folder / entry.file} ({changed.num_bytes(entry) / 1e6:.1f} MB)")
    return verify(str(folder), data=data, variants=[to])


def quantize(
    model: str | Path,
    *,
    method: QuantizeMethod = "auto",
    max_drop: float = 0.5,
    calibration: Calibration | None = None,
    data: str = "",
    split: str = "auto",
    image_column: str = "",
    label_column: str = "",
    calib: str = "",
    calib_images: int | None = None,
    seed: int = 0,
    plot: str | Path | None = None,
) -> Result:
    """Add an int8 variant of the ONNX one, calibrated on real images, and report on others.

    Three sets of images that have none in common: calibration, selection (what `auto` looks at)
    and report (looked at once, by `verify`).

    Args:
        method: auto tries calibrations, corrected biases and layers in float until the accuracy
            holds; static takes one calibration as it is; dynamic rounds activations as they come.
        max_drop: of top-1 accuracy, in points: auto's bound, and what is deployable.
        calibration: minmax, percentile or entropy, for static alone.
        data, split: to report on; default: test, else val, of what the package was trained on.
        calib: to calibrate on; default: the training images.
        calib_images: default 256; at most half of what `calib` has.
        plot: a PNG of what auto tried.
    """
    require("torch", "train", "quantizing")
    from fieldmark.evaluation.int8_run import INT8_VARIANT, quantize_package
    from fieldmark.evaluation.int8_sets import MAX_REPORT_IMAGES
    from fieldmark.packaging.manifest import package_folder

    folder = package_folder(model)
    made = quantize_package(
        folder,
        method=method,
        max_drop=max_drop,
        calibration=calibration,
        report_on={
            "data": data,
            "split": split,
            "image_column": image_column,
            "label_column": label_column,
        },
        calib=calib,
        calib_images=calib_images,
        seed=seed,
        plot=None if plot is None else Path(plot),
    )
    if not made.holds:
        return Result(folder, made.facts, passed=False)
    checked = verify(
        folder, variants=[INT8_VARIANT], max_images=MAX_REPORT_IMAGES, **made.report_on
    )
    return Result(folder, made.facts | checked.facts, checked.passed)


def verify(
    model: str | Path,
    *,
    data: str = "",
    image_column: str = "",
    label_column: str = "",
    split: str = "auto",
    variants: Sequence[str] = (),
    max_images: int = MAX_PARITY_IMAGES,
) -> Result:
    """Check files, golden samples, and on real images every variant against the reference.

    Args:
        data: the images; default: the validation split that the package's training held out.
        split: which split of `data`; auto takes val, else test, else all; where an int8 variant
            is among them test first, as val may have chosen it.
        variants: default all.
        max_images: at most so many, chosen evenly over the split.
    """
    from fieldmark.evaluation.parity import verify_package
    from fieldmark.packaging.manifest import package_folder

    folder = package_folder(model)
    facts, passed = verify_package(
        folder,
        data=data,
        columns={"image_column": image_column, "label_column": label_column},
        split=split,
        variants=variants,
        max_images=max_images,
    )
    return Result(folder, facts, passed)


def predict(
    model: str | Path,
    images: Iterable[str | Path] | str | Path,
    *,
    top_k: int = 5,
    variant: str = "auto",
    batch_size: int = 16,
) -> "Iterator[FileResult]":
    """Yield ranked classes with probabilities for files, folders, or "-" for stdin, in order.

    A broken file yields its error and the rest goes on. Memory does not grow with the number.

    Args:
        variant: an exported variant such as onnx, torch (the trained model), or auto: what `bench`
            found to be the fastest here, else onnx where there is one.
    """
    from fieldmark.packaging.manifest import package_folder
    from fieldmark.serving.files import classify_files
    from fieldmark.serving.predictor import open_variant

    predictor = open_variant(package_folder(model), variant, _open_with_torch)
    images = [images] if isinstance(images, str | Path) else images
    return classify_files(predictor, images, top_k=top_k, batch_size=batch_size)


def write_csv(results: "Iterable[FileResult]", path: str | Path, *, top_k: int) -> tuple[int, int]:
    """Write predictions as they come; return how many files, and how many with an error."""
    from fieldmark.serving.files import write_csv as write

    return write(results, Path(path), top_k=top_k)


def serve(
    model: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    variant: str = "auto",
    threads: int | str = 0,
    device: str = "auto",
    limits: "Limits | None" = None,
    keys: Path | None = None,
    announce: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Serve a package's ONNX variant over HTTP until SIGTERM or Ctrl-C.

    Args:
        variant: auto takes what `bench` found to be the fastest here, else onnx.
        threads: of the model, or "2x1": calls at once, and threads of each. 0: as `bench` found,
            else all cores.
        device: auto, cpu or cuda.
        limits: what the service takes, and how long it tries; None: as by default.
        keys: a file of API keys, of which each request must carry one; None: none is asked for.
        announce: called with {"url", "model", "variant", "device"} once the service is ready.
    """
    from fieldmark.packaging.manifest import package_folder
    from fieldmark.serving.server import serve as serve_package

    serve_package(
        package_folder(model),
        host=host,
        port=port,
        variant=variant,
        threads=threads,
        device=device,
        limits=limits,
        keys=keys,
        announce=announce,
    )


def _draw_classes(facts: dict[str, Any], pie: str | Path | None) -> None:
    from fieldmark.data.counts import save_pie

    if pie is not None:
        save_pie(Path(pie), facts["class_counts"], title=facts["data"])


def _open_with_torch(folder: Path, variant: str) -> "Predict":
    require("torch", "train", f"predicting with variant {variant!r}")
    from fieldmark.evaluation.backends import open_backend
    from fieldmark.packaging.resolve import resolve_model

    return open_backend(resolve_model(str(folder)), variant)

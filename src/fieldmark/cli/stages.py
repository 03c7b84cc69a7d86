"""The verbs of the main job, in the order of the work."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from fieldmark import pipeline, show
from fieldmark.cli.options import (
    Arch,
    Classes,
    Data,
    ImageColumn,
    ImagePx,
    Json,
    LabelColumn,
    Model,
    Package,
    Recipe,
    Settings,
    app,
    finish,
)
from fieldmark.show.int8 import show_quantization


@app.command()
def train(
    recipe: Recipe = "",
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder [runs/RECIPE].")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    pie: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Class distribution of each split.")
    ] = None,
    devices: Annotated[
        int, typer.Option(min=1, help="Processes on this machine, a GPU or cores for each.")
    ] = 1,
    as_json: Json = False,
) -> None:
    """Train a recipe into a run and its package.

    The run's folder ends with a package and a test result. Exit status 75: a signal stopped it, and
    --resume goes on. On several machines: torchrun ... -m fieldmark train ...

    Example: fieldmark train cifar10-smoke train.epochs=2 --out runs/smoke
    """
    if devices > 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        raise typer.Exit(pipeline.launch(devices, sys.argv[1:]))
    result = pipeline.train(recipe, settings or [], out=out, resume=resume, pie=pie)
    if result.facts:  # other processes than the first have none
        finish(result, as_json, show.show_run)


@app.command()
def evaluate(
    model: Model,
    data: Data,
    split: Annotated[str, typer.Option(help="train, val, test, all or auto.")] = "auto",
    variant: Annotated[str, typer.Option(help="torch, or an exported variant.")] = "torch",
    arch: Arch = "",
    classes: Classes = None,
    image_px: ImagePx = 0,
    batch_size: Annotated[int, typer.Option(min=1)] = 64,
    image_column: ImageColumn = "",
    label_column: LabelColumn = "",
    out: Annotated[
        Path | None, typer.Option(help="Folder for metrics.json and predictions.npz.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a model on labelled images.

    Labels are matched to the model's classes by name.

    Example: fieldmark evaluate runs/smoke --data cifar10
    """
    result = pipeline.evaluate(
        model,
        data,
        split=split,
        variant=variant,
        arch=arch,
        classes=classes,
        image_px=image_px,
        batch_size=batch_size,
        image_column=image_column,
        label_column=label_column,
        out=out,
    )
    finish(result, as_json, show.show_evaluation)


@app.command()
def package(
    model: Model,
    out: Annotated[Path, typer.Option(help="The package's folder.")],
    data: Data = "",
    image_column: ImageColumn = "",
    label_column: LabelColumn = "",
    golden: Annotated[
        pipeline.Golden, typer.Option(help="Golden samples: auto is data where it is given.")
    ] = "auto",
    arch: Arch = "",
    classes: Classes = None,
    image_px: ImagePx = 0,
    license: Annotated[str, typer.Option(help="Licence of the weights.")] = "",
    as_json: Json = False,
) -> None:
    """Make a package from foreign weights.

    Or from a run, with other golden samples.

    Example: fieldmark package timm:resnet50.a1_in1k --out packages/resnet50
    """
    result = pipeline.package(
        model,
        out,
        data=data,
        image_column=image_column,
        label_column=label_column,
        golden=golden,
        arch=arch,
        classes=classes,
        image_px=image_px,
        license=license,
    )
    finish(result, as_json, show.show_package)


@app.command()
def export(
    model: Package,
    to: Annotated[pipeline.ExportFormat, typer.Option()] = "onnx",
    features: Annotated[
        bool,
        typer.Option("--features", help="Of onnx: add the last feature map, for class maps."),
    ] = False,
    data: Data = "",
    as_json: Json = False,
) -> None:
    """Add an exported variant, and verify it.

    pt2 is a program of torch.export, not for archives. openvino needs the extra `openvino`.

    Example: fieldmark export runs/smoke --to onnx
    """
    result = pipeline.export(model, to, data=data, features=features)
    finish(result, as_json, show.show_verification)


@app.command()
def quantize(
    model: Package,
    method: Annotated[pipeline.QuantizeMethod, typer.Option()] = "auto",
    max_drop: Annotated[
        float, typer.Option(metavar="POINTS", help="Of top-1 accuracy: the bound.")
    ] = 0.5,
    calibration: Annotated[
        pipeline.Calibration | None, typer.Option(help="Of --method static.", show_default=False)
    ] = None,
    data: Annotated[
        str, typer.Option("--data", metavar="SOURCE", help="Images to report on [test, else val].")
    ] = "",
    split: Annotated[str, typer.Option(help="Of --data: train, val, test, all or auto.")] = "auto",
    calib: Annotated[
        str, typer.Option(metavar="SOURCE", help="Images to calibrate on [the training images].")
    ] = "",
    calib_images: Annotated[
        int | None, typer.Option(min=1, help="At most half of what there is [256].")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the choice of images.")] = 0,
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Accuracy over speed of what auto tried.")
    ] = None,
    image_column: ImageColumn = "",
    label_column: LabelColumn = "",
    as_json: Json = False,
) -> None:
    """Add an int8 variant that keeps the accuracy.

    Integers for every layer; auto leaves the fewest in float that hold --max-drop. Exit status 1
    when the bound does not hold.

    Example: fieldmark quantize runs/smoke --plot frontier.png
    """
    result = pipeline.quantize(
        model,
        method=method,
        max_drop=max_drop,
        calibration=calibration,
        data=data,
        split=split,
        image_column=image_column,
        label_column=label_column,
        calib=calib,
        calib_images=calib_images,
        seed=seed,
        plot=plot,
    )
    finish(result, as_json, show_quantization)


@app.command()
def verify(
    model: Package,
    data: Data = "",
    split: Annotated[str, typer.Option(help="train, val, test, all or auto.")] = "auto",
    variant: Annotated[
        list[str] | None, typer.Option(help="Only this variant; may be repeated.")
    ] = None,
    max_images: Annotated[int, typer.Option(min=1)] = pipeline.MAX_PARITY_IMAGES,
    image_column: ImageColumn = "",
    label_column: LabelColumn = "",
    as_json: Json = False,
) -> None:
    """Check a package against its trained model.

    Files, golden samples, and each variant on real images. Exit status 1 when a check fails.

    Example: fieldmark verify runs/smoke
    """
    result = pipeline.verify(
        model,
        data=data,
        image_column=image_column,
        label_column=label_column,
        split=split,
        variants=variant or [],
        max_images=max_images,
    )
    finish(result, as_json, show.show_verification)


@app.command()
def predict(
    model: Package,
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGES|FOLDERS...", help="Files, folders, - for stdin.")
    ],
    top_k: Annotated[int, typer.Option(min=1)] = 5,
    variant: Annotated[str, typer.Option(help="auto, torch, or an exported variant.")] = "auto",
    csv: Annotated[Path | None, typer.Option(metavar="OUT", help="Write rows there.")] = None,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    as_json: Json = False,
) -> None:
    """Classify images: ranked classes.

    A broken file is reported and the rest goes on; the exit status is then 1.
    """
    results = pipeline.predict(model, images, top_k=top_k, variant=variant, batch_size=batch_size)
    if csv is not None:
        num_files, num_errors = pipeline.write_csv(results, csv, top_k=top_k)
        show.show_csv(csv, num_files, num_errors, as_json)
    else:
        num_errors = show.show_predictions(results, as_json)
    raise typer.Exit(1 if num_errors else 0)

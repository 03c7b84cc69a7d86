"""The command line: verbs only. A stage is imported when its verb is used."""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from fieldmark import __version__, pipeline, show, tuning
from fieldmark.errors import FieldmarkError
from fieldmark.runtime import log

app = typer.Typer(
    name="fieldmark",
    help="Labelled images in, a verified and served classifier out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Data = Annotated[str, typer.Option("--data", metavar="SOURCE", help="Labelled images.")]
Arch = Annotated[str, typer.Option(help="Network of a state dict file.")]
Classes = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Class names, one a line, in output order.")
]
ImagePx = Annotated[int, typer.Option(help="Input size of a state dict's network.")]
Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A package, a run, local-dir:PATH, timm:NAME, or a state dict with --arch.",
        show_default=False,
    ),
]
Package = Annotated[
    str, typer.Argument(metavar="PACKAGE", help="A package, or a run.", show_default=False)
]
Recipe = Annotated[
    str, typer.Argument(metavar="RECIPE", help="See `fieldmark recipes`; or a TOML file.")
]
Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[section.key=value]...", help="Over the recipe's own values."),
]
ImageColumn = Annotated[str, typer.Option(help="Of an hf: source with several.")]
LabelColumn = Annotated[str, typer.Option(help="Of an hf: source with several.")]
SOURCES = "cifar10, cifar100, digits, folder:PATH, imagenet:PATH, hf:NAME_OR_PATH"


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
        _finish(result, as_json, show.show_run)


@app.command()
def evaluate(
    model: Model,
    data: Data,
    split: Annotated[str, typer.Option(help="train, val, test, all or auto.")] = "auto",
    variant: Annotated[str, typer.Option(help="torch, onnx or torchscript.")] = "torch",
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
    _finish(result, as_json, show.show_evaluation)


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
    _finish(result, as_json, show.show_package)


@app.command()
def export(
    model: Package,
    to: Annotated[pipeline.ExportFormat, typer.Option()] = "onnx",
    data: Data = "",
    as_json: Json = False,
) -> None:
    """Add an exported variant, and verify it.

    Example: fieldmark export runs/smoke --to onnx
    """
    _finish(pipeline.export(model, to, data=data), as_json, show.show_verification)


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
    _finish(result, as_json, show.show_verification)


@app.command()
def predict(
    model: Package,
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGES|FOLDERS...", help="Files, folders, - for stdin.")
    ],
    top_k: Annotated[int, typer.Option(min=1)] = 5,
    variant: Annotated[str, typer.Option(help="auto, onnx, torchscript or torch.")] = "auto",
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


@app.command()
def serve(
    model: Package,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8000,
    threads: Annotated[int, typer.Option(min=0, help="0: all cores.")] = 0,
    max_body_bytes: Annotated[int, typer.Option(min=1)] = 10_000_000,
    max_pixels: Annotated[int, typer.Option(min=1)] = 50_000_000,
    as_json: Json = False,
) -> None:
    """Serve a package over HTTP.

    POST an image to /v1/classify.

    Example: fieldmark serve runs/smoke --port 8000
    """
    pipeline.serve(
        model,
        host=host,
        port=port,
        threads=threads,
        max_body_bytes=max_body_bytes,
        max_pixels=max_pixels,
        announce=show.print_json if as_json else None,
    )


@app.command()
def recipes(as_json: Json = False) -> None:
    """List the recipes and their results."""
    show.show_recipes(pipeline.recipes(), as_json)


@app.command()
def info(
    target: Annotated[str, typer.Argument(metavar="PATH|SOURCE", help=f"Or one of: {SOURCES}.")],
    pie: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Class distribution of a data source.")
    ] = None,
    image_column: ImageColumn = "",
    label_column: LabelColumn = "",
    as_json: Json = False,
) -> None:
    """Describe a package, a run, or a data source.

    Of a data source: the images of each class in each split.
    """
    columns = {"image_column": image_column, "label_column": label_column}
    _finish(pipeline.info(target, pie=pie, **columns), as_json, show.show_info)


@app.command()
def augment(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help=f"One of: {SOURCES}.", show_default=False)
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[section.key=value]...", help="Such as augment.policy=strong."),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="PNG", help="The grid.")] = Path("augment.png"),
    recipe: Annotated[str, typer.Option(help="Whose settings; default: policy auto.")] = "",
    rows: Annotated[int, typer.Option(min=1, max=40, help="Images shown.")] = 8,
    as_json: Json = False,
) -> None:
    """Draw images as training will see them.

    One row for each image: as evaluated, then augmented.

    Example: fieldmark augment digits augment.policy=strong --out grid.png
    """
    result = pipeline.augment(source, out, settings or [], recipe=recipe, rows=rows)
    _finish(result, as_json, show.show_augment)


@app.command()
def quickstart(
    out: Annotated[Path | None, typer.Option(help="The run's folder [runs/quickstart].")] = None,
    as_json: Json = False,
) -> None:
    """Run the whole job on handwritten digits.

    They come with scikit-learn: no download.
    """
    _finish(pipeline.quickstart(out), as_json, show.show_quickstart)


@app.command("lr-find")
def lr_find(
    recipe: Recipe,
    settings: Settings = None,
    out: Annotated[Path | None, typer.Option(metavar="PNG", help="Loss over rate.")] = None,
    as_json: Json = False,
) -> None:
    """Suggest a learning rate for a recipe.

    Raises the rate over 100 updates until the loss diverges; no run is kept.

    Example: fieldmark lr-find digits --out rates.png
    """
    _finish(tuning.lr_find(recipe, settings or [], out=out), as_json, show.show_rates)


@app.command()
def sweep(
    out: Annotated[Path, typer.Option(help="The sweep's folder.")],
    recipe: Recipe = "",
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=SPACE|KEY=VALUE...",
            help="SPACE: 1e-4..1e-1, log:1e-4..1e-1, int:2..8 or [64,128].",
        ),
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, show_default=False)] = None,
    metric: Annotated[
        tuning.Metric | None, typer.Option(help="Of val [val_top1_accuracy].", show_default=False)
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the one in --out.")] = False,
    as_json: Json = False,
) -> None:
    """Try values of settings; find the best on val.

    Test images are not looked at. Needs the extra `sweep`.

    Example: fieldmark sweep digits optim.lr=log:0.05..2 --trials 8 --out sweeps/lr
    """
    result = tuning.sweep(
        recipe, settings or [], out=out, trials=trials, metric=metric, resume=resume
    )
    _finish(result, as_json, show.show_sweep)


def main() -> None:
    """Run the command line; a user's mistake is one sentence and exit status 2."""
    for stream in (sys.stdout, sys.stderr):  # a file name need not be UTF-8
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app(standalone_mode=True)
    except FieldmarkError as error:
        _fail(error.code, str(error), error.exit_status)
    except OSError as error:  # a path that cannot be written, a full disk
        where = f"{error.filename}: " if error.filename else ""
        _fail("system", f"{where}{error.strerror or error}.", 2)
    except KeyboardInterrupt:
        log.say("fieldmark: interrupted")
        sys.exit(130)


def _fail(code: str, message: str, status: int) -> NoReturn:
    if "--json" in sys.argv:
        show.print_json({"error": {"code": code, "message": message}})
    log.say(f"fieldmark: {message}")
    sys.exit(status)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def _finish(
    result: pipeline.Result, as_json: bool, show_it: Callable[[pipeline.Result], None]
) -> None:
    if as_json:
        show.print_json(result.to_json() | {"passed": result.passed})
    else:
        show_it(result)
    if not result.passed:
        raise typer.Exit(1)


if __name__ == "__main__":
    main()

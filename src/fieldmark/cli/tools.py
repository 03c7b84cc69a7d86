"""The verbs beside the main job: looking, tuning, calibrating, sharing."""

from pathlib import Path
from typing import Annotated

import typer

from fieldmark import calibration, inspection, pipeline, sharing, show, tuning
from fieldmark.cli.options import (
    SOURCES,
    Data,
    ImageColumn,
    Json,
    LabelColumn,
    Package,
    Recipe,
    Settings,
    app,
    finish,
)
from fieldmark.errors import ConfigError
from fieldmark.inspection import MAX_LATENCY_MS, ROUNDS, SECONDS
from fieldmark.show.bench import show_bench, show_record
from fieldmark.show.confidence import show_calibration
from fieldmark.show.sharing import show_pull, show_push


@app.command()
def recipes(as_json: Json = False) -> None:
    """List the recipes and their results."""
    show.show_recipes(inspection.recipes(), as_json)


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
    finish(inspection.info(target, pie=pie, **columns), as_json, show.show_info)


@app.command()
def bench(
    model: Package,
    variant: Annotated[
        list[str] | None,
        typer.Option(help="Only this one, or torch; may be repeated [all of ONNX]."),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Images in a call; may be repeated [1, 8].")
    ] = None,
    threads: Annotated[
        list[str] | None,
        typer.Option(metavar="T|CxT", help="T threads, or C calls at once with T each [1, all]."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1)] = ROUNDS,
    seconds: Annotated[float, typer.Option(help="Of timing, over all rounds.")] = SECONDS,
    max_latency_ms: Annotated[
        float, typer.Option(help="What is slower (p99) is not preferred.")
    ] = MAX_LATENCY_MS,
    seed: Annotated[int, typer.Option(min=0, help="Of the order.")] = 0,
    out: Annotated[Path | None, typer.Option(metavar="JSON", help="Keep the results.")] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Latency over throughput.")
    ] = None,
    show_it: Annotated[
        bool, typer.Option("--show", help="Measure nothing: print what is recorded.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Time a package's variants on this machine.

    The best deployable one, and its threads, go to this machine's cache, where serve and predict
    look them up.

    Example: fieldmark bench runs/smoke --plot speed.png
    """
    if show_it:
        given = (variant, batch, threads, out, plot, seed or None)
        changed = (rounds, seconds, max_latency_ms) != (ROUNDS, SECONDS, MAX_LATENCY_MS)
        if changed or any(value is not None for value in given):
            raise ConfigError("--show must stand alone: it measures nothing. Remove the others.")
        finish(inspection.preferred(model), as_json, show_record)
        return
    result = inspection.bench(
        model,
        variant or [],
        batches=batch or [],
        threads=threads or [],
        rounds=rounds,
        seconds=seconds,
        max_latency_ms=max_latency_ms,
        seed=seed,
        out=out,
        plot=plot,
    )
    finish(result, as_json, show_bench)


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
    result = inspection.augment(source, out, settings or [], recipe=recipe, rows=rows)
    finish(result, as_json, show.show_augment)


@app.command()
def quickstart(
    out: Annotated[Path | None, typer.Option(help="The run's folder [runs/quickstart].")] = None,
    as_json: Json = False,
) -> None:
    """Run the whole job on handwritten digits.

    They come with scikit-learn: no download.
    """
    finish(inspection.quickstart(out), as_json, show.show_quickstart)


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
    finish(tuning.lr_find(recipe, settings or [], out=out), as_json, show.show_rates)


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
    finish(result, as_json, show.show_sweep)


@app.command()
def calibrate(
    model: Package,
    data: Data = "",
    split: Annotated[str, typer.Option(help="train, val, test, all or auto.")] = "auto",
    max_images: Annotated[int, typer.Option(min=1)] = pipeline.MAX_PARITY_IMAGES,
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Reliability diagram, before and after.")
    ] = None,
    image_column: ImageColumn = "",
    label_column: LabelColumn = "",
    as_json: Json = False,
) -> None:
    """Make a package's probabilities mean what they say.

    Fits a temperature on the recorded validation images, or on --data, and checks every variant
    with it. No ranking changes. Exit status 1 when a check fails.

    Example: fieldmark calibrate runs/smoke --plot reliability.png
    """
    result = calibration.calibrate(
        model,
        data=data,
        split=split,
        max_images=max_images,
        plot=plot,
        image_column=image_column,
        label_column=label_column,
    )
    finish(result, as_json, show_calibration)


@app.command()
def push(
    model: Package,
    destination: Annotated[
        str, typer.Argument(metavar="DESTINATION", help="hf:OWNER/NAME[@BRANCH], or a URL.")
    ],
    golden: Annotated[
        sharing.SharedGolden, typer.Option(help="keep: as it is, with its images and paths.")
    ] = "synthetic",
    license: Annotated[str, typer.Option(help="Licence of the weights.")] = "",
    replace: Annotated[
        bool, typer.Option("--replace", help="In the place of another package.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Send a package to the hub or a file system.

    Golden samples are drawn anew where they are real images. What was written is read back and
    compared. Needs the extra `hub`.

    Example: fieldmark push runs/smoke file:///srv/packages/smoke
    """
    result = sharing.push(model, destination, golden=golden, license=license, replace=replace)
    finish(result, as_json, show_push)


@app.command()
def pull(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="hf:OWNER/NAME[@REVISION], or a URL.")
    ],
    out: Annotated[Path, typer.Option(help="The package's folder.")],
    expect: Annotated[str, typer.Option(metavar="ID", help="The id it must have.")] = "",
    as_json: Json = False,
) -> None:
    """Take a package from the hub or a file system.

    Each file is checked as it comes. Needs the extra `hub`.

    Example: fieldmark pull file:///srv/packages/smoke --out packages/smoke
    """
    finish(sharing.pull(source, out, expect=expect), as_json, show_pull)

"""The verbs beside the main job: looking, tuning, sharing."""

from pathlib import Path
from typing import Annotated

import typer

from fieldmark import inspection, sharing, show, tuning
from fieldmark.cli.options import (
    SOURCES,
    ImageColumn,
    Json,
    LabelColumn,
    Package,
    Recipe,
    Settings,
    app,
    finish,
)
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

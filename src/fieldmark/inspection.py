"""Looking at things: what a package, a run or a data source holds, and the whole job in small."""

from collections.abc import Sequence
from pathlib import Path

from fieldmark.errors import require
from fieldmark.pipeline import Result, export, predict, train


def recipes() -> list[dict[str, str]]:
    """Return name, summary, cost, result and evidence of every recipe."""
    from fieldmark.cookbook import describe_recipes

    return describe_recipes()


def info(
    target: str | Path,
    *,
    pie: str | Path | None = None,
    image_column: str = "",
    label_column: str = "",
) -> Result:
    """Describe a package, a run, or a data source (class counts for each split).

    Args:
        pie: a PNG of the class distribution, for a data source.
    """
    from fieldmark.evaluation.describe import describe

    columns = {"image_column": image_column, "label_column": label_column}
    return Result(None, describe(str(target), None if pie is None else Path(pie), columns))


def augment(
    source: str,
    out: str | Path,
    settings: Sequence[str] = (),
    *,
    recipe: str = "",
    rows: int = 8,
) -> Result:
    """Draw what training would show the network of a source's images, as a PNG grid.

    Args:
        settings: "section.key=value" over the recipe, such as augment.policy=strong.
        recipe: whose settings to take; default: augment.policy=auto alone.
        rows: images shown, of as many classes.
    """
    require("torch", "train", "augmenting images")
    from fieldmark.training.preview import draw_preview, preview_config
    from fieldmark.training.start import resolve_pretrained

    config = preview_config(source, recipe, settings)
    pretrained = resolve_pretrained(config.model)
    return Result(Path(out), draw_preview(Path(out), config, pretrained, num_rows=rows))


def quickstart(out: str | Path | None = None) -> Result:
    """Run the whole job on handwritten digits: train, export, verify, predict one image."""
    require("torch", "train", "the quickstart")
    from fieldmark.packaging.manifest import package_folder
    from fieldmark.training.run_folder import default_folder

    run = train("digits", out=out or default_folder("quickstart"))
    exported = export(str(run.path))
    sample = next(iter(sorted((package_folder(str(run.path)) / "golden").glob("*.png"))))
    (answer,) = predict(str(run.path), [sample], top_k=3)
    facts = {**run.facts, "parity": exported.facts, "sample": answer.to_json()}
    return Result(run.path, facts, exported.passed)

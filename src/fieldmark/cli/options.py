"""The program, and the options that several verbs share."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from fieldmark import pipeline, show

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


def finish(
    result: pipeline.Result, as_json: bool, show_it: Callable[[pipeline.Result], None]
) -> None:
    """Print a result; a check that failed is exit status 1."""
    if as_json:
        show.print_json(result.to_json() | {"passed": result.passed})
    else:
        show_it(result)
    if not result.passed:
        raise typer.Exit(1)

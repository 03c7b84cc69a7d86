"""The command line: verbs only. A stage is imported when its verb is used."""

import io
import sys
from typing import Annotated, NoReturn

import typer

from fieldmark import __version__, show
from fieldmark.cli import serving, stages, tools  # noqa: F401  their verbs register themselves
from fieldmark.cli.options import app
from fieldmark.errors import FieldmarkError
from fieldmark.runtime import log


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

"""Write the command-line reference from what `fieldmark VERB --help` prints.

Usage: make_cli_reference.py FILE
"""

import os
import sys
from pathlib import Path

from typer.main import get_command
from typer.testing import CliRunner

from fieldmark.cli import app

TITLE = """# Command line

Written by `make docs` from `fieldmark --help`: edit the docstrings in `fieldmark.cli`, not this.
"""


def describe(*verb: str) -> str:
    """Return one section: the help of `fieldmark VERB`."""
    result = CliRunner().invoke(app, [*verb, "--help"], prog_name="fieldmark")
    if result.exit_code != 0:
        raise RuntimeError(f"fieldmark {' '.join(verb)} --help failed.") from result.exception
    text = "\n".join(line.rstrip() for line in result.stdout.strip().splitlines())
    return f"\n## {' '.join(('fieldmark', *verb))}\n\n```text\n{text}\n```\n"


os.environ["COLUMNS"] = "80"  # the same lines wherever this runs
app.rich_markup_mode = None  # plain text, without boxes and colours
commands = get_command(app).commands  # in the order of their definition
sections = [describe()]
for name, command in commands.items():
    if command.hidden:
        continue
    sections.append(describe(name))
    sections += [describe(name, verb) for verb in getattr(command, "commands", {})]
target = Path(sys.argv[1])
target.parent.mkdir(parents=True, exist_ok=True)
target.write_text(TITLE + "".join(sections), encoding="utf-8")

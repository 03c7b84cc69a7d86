"""What a person sees of a package that was sent or taken."""

import typer

from fieldmark.pipeline import Result
from fieldmark.runtime.files import size_text
from fieldmark.runtime.log import facts as facts_table

_SENT = {
    "package": "sent, read back and compared",
    "card": "the package was there already; its model card was sent",
    "nothing": "was there already: nothing to do",
}


def show_push(result: Result) -> None:
    """Show what was sent, and how it differs from the package here."""
    facts = result.facts
    golden = facts["golden"]
    samples = f"{golden['count']} {golden['kind']}" if golden["count"] else "none"
    rows = [
        ("package", f"{facts['name']}: {_SENT[facts['sent']]}"),
        ("id", facts["id"]),
        ("size", f"{facts['files']} files, {size_text(facts['bytes'])}"),
        ("golden samples", samples),
        ("licence", facts["license"] or "none"),
        ("model card", facts["card"]),
        *(("changed", change) for change in facts["changes"]),
    ]
    if facts["id"] == facts["id_here"]:
        rows.append(("changed", "nothing: it is the package here, with its id"))
    facts_table(rows)
    typer.echo(f"next: fieldmark pull {facts['destination']} --out FOLDER --expect {facts['id']}")


def show_pull(result: Result) -> None:
    """Show what was taken."""
    facts = result.facts
    variants = ", ".join(
        name if deployable else f"{name} (not deployable)"
        for name, deployable in facts["variants"].items()
    )
    facts_table(
        [
            ("package", f"{facts['name']}, {facts['num_classes']} classes"),
            ("id", facts["id"] + (" as expected" if facts["expected"] else "")),
            ("licence", facts["license"] or "none: ask before you use it"),
            ("size", f"{facts['files']} files, {size_text(facts['bytes'])}, all checked"),
            ("variants", variants or "none"),
        ]
    )
    typer.echo(f"next: fieldmark verify {result.path}")

"""What a person sees of a benchmark."""

from typing import Any

import typer

from fieldmark.measure.timing import MIN_CALLS_FOR_P99
from fieldmark.pipeline import Result
from fieldmark.runtime.files import size_text
from fieldmark.runtime.log import facts as facts_table
from fieldmark.runtime.log import table


def show_bench(result: Result) -> None:
    """Show a row for each combination, then what each variant takes, and the preferred one."""
    facts = result.facts
    machine = facts["machine"]
    columns = ["variant", "batch", "threads", "p50 ms", "p99 ms", "n", "images/s", "range"]
    first = facts["variants"][0]["variant"]
    table([*columns, f"to {first}"], [_row(row) for row in facts["rows"]])
    typer.echo(f"on {machine['cpu']}, {machine['cores']} cores, {facts['plan']['rounds']} rounds")
    typer.echo(
        f"threads 2x1: two calls at once with a thread each; a p99 needs {MIN_CALLS_FOR_P99}"
    )
    typer.echo(f"calls (n); to {first}: images/s in the same rounds, with a 95 % interval")
    typer.echo("")
    rows = []
    for item in facts["variants"]:
        grown = [
            f"{size_text(num_bytes)} at {setting}"
            for setting, num_bytes in item["memory_bytes"].items()
            if num_bytes is not None
        ]
        state = "deployable" if item["deployable"] else f"not deployable: {item['obstacles'][0]}"
        rows.append((item["variant"], f"{size_text(item['bytes'])}, {state}"))
        if grown:
            rows.append(("", f"memory it added: {', '.join(grown)}"))
    facts_table(rows)
    _print_preferred(facts)
    if result.path is not None:
        typer.echo(f"results: {result.path}")
    if "plot" in facts:
        typer.echo(f"plot: {facts['plot']}")


def show_record(result: Result) -> None:
    """Show what this machine's cache says of a package."""
    facts = result.facts
    machine = facts["machine"]
    where = f"{machine['cpu']}, {machine['instruction_set']}, {machine['cores']} cores"
    if facts["record"] is None:
        typer.echo(f"nothing is recorded of {facts['package']} on {where}")
        typer.echo(f"next: fieldmark bench {facts['package']}")
        return
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    facts_table(
        [
            ("machine", where),
            ("measured", f"{', '.join(facts['measured'])}, {facts['measured_at']}"),
            ("versions", versions),
        ]
    )
    _print_preferred(facts)


def _row(row: dict[str, Any]) -> list[Any]:
    p99, rate, ratio = row["p99_ms"], row["images_per_s"], row["ratio"]
    return [
        row["variant"],
        row["batch"],
        f"{row['workers']}x{row['threads']}",
        _number(row["p50_ms"]["value"]),
        "-" if p99 is None else _number(p99["value"]),
        row["p50_ms"]["n"],
        _number(rate["median"]),
        f"{_number(rate['min'])}-{_number(rate['max'])}",
        "1" if ratio is None else _interval(ratio),
    ]


def _number(value: float) -> str:
    """Three digits, and never an exponent."""
    return f"{value:.3g}" if 1e-3 < value < 1000 else f"{value:.0f}"


def _interval(ratio: dict[str, Any]) -> str:
    if ratio["low"] is None:
        return f"{ratio['value']:.2f}"
    return f"{ratio['value']:.2f}  {ratio['low']:.2f}-{ratio['high']:.2f}"


def _print_preferred(facts: dict[str, Any]) -> None:
    chosen = facts["preferred"]
    if chosen is None:
        typer.echo(f"preferred on this machine: none: {facts['why']}")
    else:
        typer.echo(
            f"preferred on this machine: {chosen['variant']}, {chosen['workers']}x"
            f"{chosen['threads']} ({_number(chosen['images_per_s'])} images/s at batch "
            f"{chosen['batch']}): {facts['why']}"
        )
    if facts["record"] is not None:
        typer.echo(f"record: {facts['record']}")

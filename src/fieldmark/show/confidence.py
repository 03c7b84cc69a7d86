"""What a person sees of calibrated confidence."""

from typing import Any

import typer

from fieldmark.pipeline import Result
from fieldmark.runtime.log import facts as facts_table

Rows = list[tuple[str, str]]


def show_calibration(result: Result) -> None:
    """Show the temperature, what it mends, and every variant with it."""
    facts = result.facts
    found = facts["confidence"]
    before, after, change = found["before"], found["after"], found["nll_change"]
    rows = [
        ("fitted on", found["data"]),
        (
            "temperature",
            f"{found['temperature']:.3f}  (95 % interval {found['low']:.3f} to "
            f"{found['high']:.3f}, n={found['num_images']})",
        ),
        ("calibration error (ECE)", f"{number(before['ece'])} -> {number(after['ece'])}"),
        (
            "loss (NLL)",
            f"{before['nll']['value']:.4f} -> {after['nll']['value']:.4f} nats, "
            f"change {number(change, 4)}",
        ),
    ]
    for name, variant in facts["variants"].items():
        rows += [(name, f"{label}: {text}") for label, text in drift_rows(variant["parity"] or {})]
        rows += [(f"{name}, note", note) for note in variant["notes"]]
        rows += [("problem", problem) for problem in variant["problems"]]
    if "plot" in facts:
        rows.append(("reliability diagram", facts["plot"]))
    facts_table(rows)
    typer.echo(f"next: fieldmark predict {result.path} IMAGES")


def confidence_rows(facts: dict[str, Any]) -> Rows:
    """Return the rows of an evaluation: calibration error, and NLL and error with a temperature."""
    rows: Rows = []
    if facts.get("ece") is not None:
        rows.append(("calibration error (ECE)", number(facts["ece"])))
    after = facts.get("calibrated")
    if after is not None:
        at = f"at temperature {after['temperature']:.3f}"
        rows.append((f"loss {at}", f"{after['nll']['value']:.4f} nats"))
        rows.append((f"ECE {at}", number(after["ece"])))
    return rows


def drift_rows(parity: dict[str, Any]) -> Rows:
    """Return the rows of a parity that measured confidence: the trained model -> the variant."""
    if parity.get("ece") is None or parity.get("nll") is None:
        return []
    temperature = parity["temperature"]
    at = "temperature 1" if temperature is None else f"temperature {temperature:.3f}"
    reference, variant = parity["reference_ece"]["value"], parity["ece"]["value"]
    return [
        (
            "calibration error",
            f"{reference:.4f} -> {variant:.4f}, change {number(parity['ece_increase'], 4)} ({at})",
        ),
        (
            "loss (NLL)",
            f"{parity['reference_nll']['value']:.4f} -> {parity['nll']['value']:.4f} nats ({at})",
        ),
    ]


def number(value: dict[str, Any], digits: int = 3) -> str:
    """Return a number with its interval."""
    low, high = value["low"], value["high"]
    return f"{value['value']:.{digits}f} (95 % interval {low:.{digits}f} to {high:.{digits}f})"

"""What a person sees of a quantization."""

from typing import Any

import typer

from fieldmark.pipeline import Result
from fieldmark.runtime.log import facts as facts_table
from fieldmark.runtime.log import table
from fieldmark.show import show_verification
from fieldmark.show.variants import quantization_rows


def show_quantization(result: Result) -> None:
    """Show what was tried, what was taken, and the report on images that chose nothing."""
    facts = result.facts
    if facts["tried"]:
        _print_tried(facts)
    quantization = facts["quantization"]
    if "variants" not in facts:
        bound = 100 * quantization["max_drop"]
        if any(100 * tried["drop"] <= bound for tried in facts["tried"]):
            why = f"What held the bound of {bound:g} points was slower than float32 here"
            action = "Keep float32 on this machine."
        else:
            why = f"No int8 model held the bound of {bound:g} points"
            action = "Raise --max-drop, or calibrate on more images."
        typer.echo(f"{why}: the package is as it was. {action}")
        return
    rows = quantization_rows(quantization)
    (entry,) = facts["variants"].values()
    rows.append(("size", f"{facts['float_bytes'] / entry['bytes']:.2f} times smaller"))
    facts_table(rows)
    show_verification(result)


def _print_tried(facts: dict[str, Any]) -> None:
    columns = ["tried", "in float", "MB", "speed", "agreement", "drop, points (95 %)", "KL, nats"]
    rows = []
    for tried in facts["tried"]:
        name = tried["calibration"] + (", biases corrected" if tried["bias_corrected"] else "")
        drop = tried.get("accuracy_drop")
        spread = f" ({100 * drop['low']:.2f} to {100 * drop['high']:.2f})" if drop else ""
        rows.append(
            [
                name,
                tried["layers_in_float"],
                f"{tried['bytes'] / 1e6:.2f}",
                f"{tried['speed_ratio']:.2f} x",
                f"{tried['top1_agreement']['value']:.2%}",
                f"{100 * tried['drop']:.2f}{spread}",
                f"{tried['mean_kl']:.4f}",
            ]
        )
    table(columns, rows, title="On the selection images; speed against float32")

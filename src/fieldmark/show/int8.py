"""What a person sees of a quantization."""

from typing import Any

import typer

from fieldmark.pipeline import Result
from fieldmark.runtime.log import facts as facts_table
from fieldmark.runtime.log import table
from fieldmark.show import show_verification


def show_quantization(result: Result) -> None:
    """Show what was tried, what was taken, and the report on images that chose nothing."""
    facts = result.facts
    if facts["tried"]:
        _print_tried(facts)
    quantization = facts["quantization"]
    if "variants" not in facts:
        typer.echo(
            f"No int8 model held the bound of {100 * quantization['max_drop']:g} points: the "
            "package is as it was. Raise --max-drop, or calibrate on more images."
        )
        return
    sets = (
        ("calibrated on", quantization["calibration_set"]),
        ("selected by", quantization["selection_set"]),
    )
    rows = [
        (name, f"{images['num_images']} images of {images['data']}")
        for name, images in sets
        if images
    ]
    in_float = quantization["layers_in_float"]
    left = f", {len(in_float)} in float: {', '.join(in_float)}" if in_float else ", none in float"
    rows.append(("layers", f"{quantization['num_layers']}{left}"))
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

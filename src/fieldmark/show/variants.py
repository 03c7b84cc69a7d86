"""What a person sees of a package's variants."""

from typing import Any

from fieldmark.runtime.log import facts as facts_table

_OPERATORS_SHOWN = 12


def print_variants(variants: dict[str, dict[str, Any]]) -> None:
    """Print each variant: its format, ends, graph and whether it may be deployed."""
    for name, variant in variants.items():
        rows = [("variant", f"{name}: {_format(variant)}, {variant['bytes'] / 1e6:.1f} MB")]
        if variant["written_by"]:
            rows.append(("written by", variant["written_by"]))
        rows += [("input", _tensor(tensor)) for tensor in variant["inputs"]]
        rows += [("output", _tensor(tensor)) for tensor in variant["outputs"]]
        if variant["graph"] is not None:
            rows.append(("parameters", f"{variant['graph']['num_parameters']:,}"))
            rows.append(("operators", _operators(variant["graph"]["operators"])))
        if variant["quantization"] is not None:
            rows += quantization_rows(variant["quantization"])
        obstacles = " ".join(variant["obstacles"])
        rows.append(("deployable", "yes" if variant["deployable"] else f"no. {obstacles}"))
        facts_table(rows)


def quantization_rows(made: dict[str, Any]) -> list[tuple[str, str]]:
    """Return how a variant was made int8, and on which images."""
    words = [made["method"]]
    words += [f"{made['calibration']} ranges"] if made["calibration"] else []
    words.append("7-bit weights" if made["reduce_range"] else "8-bit weights")
    words += ["corrected biases"] if made["bias_corrected"] else []
    rows = [("int8", ", ".join(words))]
    for name, images in (
        ("calibrated on", made["calibration_set"]),
        ("selected by", made["selection_set"]),
    ):
        if images is not None:
            rows.append((name, f"{images['num_images']} images of {images['data']}"))
    in_float = made["layers_in_float"]
    left = f"{len(in_float)} in float: {', '.join(in_float)}" if in_float else "none in float"
    rows.append(("layers", f"{made['num_layers']}, {left}"))
    return rows


def _format(variant: dict[str, Any]) -> str:
    opset = "" if variant["opset"] is None else f", opset {variant['opset']}"
    return f"{variant['kind']}, {variant['precision']}{opset}"


def _tensor(tensor: dict[str, Any]) -> str:
    return f"{tensor['name']}, {tensor['dtype']} ({', '.join(map(str, tensor['shape']))})"


def _operators(counts: dict[str, int]) -> str:
    shown = [f"{name} {count}" for name, count in list(counts.items())[:_OPERATORS_SHOWN]]
    rest = len(counts) - len(shown)
    more = f", and {rest} kinds more; see --json" if rest > 0 else ""
    return f"{sum(counts.values())}: {', '.join(shown)}{more}"

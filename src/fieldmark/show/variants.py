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
        obstacles = " ".join(variant["obstacles"])
        rows.append(("deployable", "yes" if variant["deployable"] else f"no. {obstacles}"))
        facts_table(rows)


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

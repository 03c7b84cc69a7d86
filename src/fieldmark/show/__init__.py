"""What a person sees of each result: tables on stdout, or one JSON object."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fieldmark.pipeline import Result
from fieldmark.runtime.log import duration, table, warn
from fieldmark.runtime.log import facts as facts_table
from fieldmark.show.confidence import confidence_rows, drift_rows
from fieldmark.show.variants import print_variants

if TYPE_CHECKING:
    from fieldmark.serving.files import FileResult


def print_json(value: Any) -> None:
    """Print one JSON object on stdout."""
    typer.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))


def _rate(value: dict[str, Any]) -> str:
    return (
        f"{value['value']:.2%}  (95 % interval {value['low']:.2%} to {value['high']:.2%}, "
        f"n={value['n']})"
    )


def _print_scores(facts: dict[str, Any]) -> None:
    rows = [("top-1 accuracy", _rate(facts["top1_accuracy"]))]
    if "top5_accuracy" in facts:
        rows.append(("top-5 accuracy", _rate(facts["top5_accuracy"])))
    rows.append(("balanced accuracy", _rate(facts["balanced_accuracy"])))
    rows.append(("loss", f"{facts['loss']:.4f} nats"))
    rows += confidence_rows(facts)
    if "six_views" in facts:
        rows.append(("top-1 over six views", _rate(facts["six_views"]["top1_accuracy"])))
    facts_table(rows)


def _print_classes(facts: dict[str, Any], at_most: int = 20) -> None:
    """The classes with their recall, the worst first where there are many."""
    classes = facts["per_class_accuracy"].items()
    ranked = sorted(classes, key=lambda item: item[1]["value"])
    rows = [
        (name, f"{rate['value']:.1%}", f"{rate['low']:.1%} to {rate['high']:.1%}", rate["n"])
        for name, rate in (ranked[:at_most] if len(ranked) > at_most else classes)
    ]
    title = f"the {at_most} worst of {len(ranked)} classes" if len(ranked) > at_most else ""
    table(["class", "recall", "95 % interval", "images"], rows, title=title)


def show_run(result: Result) -> None:
    """Show what a run ended with."""
    facts = result.facts
    _print_class_counts(facts["class_counts"])
    if facts["broken"]:
        named = ", ".join(name for name, _ in facts["broken"][:5])
        typer.echo(f"left out: {len(facts['broken'])} broken images ({named})")
    for name, origin in facts["splits"].items():
        typer.echo(f"{name}: {origin}")
    if "probe" in facts:
        _print_probe(facts["probe"])
    if facts["measured_on"] and "probe" in facts:
        typer.echo(f"\nmeasured on {facts['measured_on']}")
        _print_scores(facts)
    elif facts["measured_on"]:
        chosen = facts["selected_by"]
        by = f"{chosen['split']} chose" if chosen["split"] else "the last: nothing chose"
        typer.echo(f"\nmeasured on {facts['measured_on']} (weights: {by} update {chosen['step']})")
        _print_scores(facts)
    confidence = facts.get("confidence")
    if confidence is not None:  # a run of an earlier version has none
        typer.echo(f"confidence: {confidence['note']}")
    typer.echo(f"package: {facts['package']}")
    typer.echo(f"next:    fieldmark export {result.path}")


def _print_probe(report: dict[str, Any]) -> None:
    """The penalties as cross-validation saw them, and what the features gave."""
    rows = [
        (
            f"{score['penalty']:g}"
            + ("  (chosen)" if score["penalty"] == report["penalty"] else ""),
            f"{score['accuracy']:.2%}",
            f"{score['accuracy_std']:.2%}",
            f"{score['loss']:.4f}",
        )
        for score in report["penalties"]
    ]
    title = f"\nlinear probe, {report['folds']} folds of {report['folds_images']} train images"
    table(["penalty", "accuracy", "std over folds", "loss"], rows, title=title)
    listed = [
        ("train top-1 accuracy", report["train_top1_accuracy"]),
        ("val top-1 accuracy", report["val_top1_accuracy"]),
        (f"{report['neighbours']}-NN, val", report["knn_val_top1_accuracy"]),
        (f"{report['neighbours']}-NN, each by the others", report.get("knn_train_top1_accuracy")),
    ]
    times = f"features {duration(report['extract_s'])}, fit {duration(report['fit_s'])}"
    facts_table([*((name, _rate(rate)) for name, rate in listed if rate), ("time", times)])


def _print_class_counts(counts: list[dict[str, Any]], at_most: int = 40) -> None:
    """Images of each class in each split: all of them, or the largest where there are many."""
    splits = [name for name in counts[0] if name != "class_name"]
    totals = ["total", *(sum(row[name] for row in counts) for name in splits)]
    shown = sorted(counts, key=lambda row: -row[splits[0]])[:at_most]
    listed = counts if len(counts) <= at_most else shown
    title = "" if len(counts) <= at_most else f"the {at_most} largest of {len(counts)} classes"
    rows = [[row["class_name"], *(row[name] for name in splits)] for row in listed]
    table(["class", *splits], [*rows, totals], title=title)


def show_evaluation(result: Result) -> None:
    """Show scores and the classes' recall."""
    _print_scores(result.facts)
    _print_classes(result.facts)
    if result.path is not None:
        typer.echo(f"metrics and predictions: {result.path}")


def show_package(result: Result) -> None:
    """Show where a package is and what was measured."""
    if "top1_accuracy" in result.facts:
        _print_scores(result.facts)
    typer.echo(f"package: {result.path} (golden samples: {result.facts['golden']})")
    typer.echo(f"next:    fieldmark export {result.path}")


def show_verification(result: Result) -> None:
    """Show each variant's checks."""
    for name, found in result.facts["variants"].items():
        golden, parity = found["golden"], found["parity"]
        rows = [("variant", f"{name}: {found['file']}, {found['bytes'] / 1e6:.1f} MB")]
        state = "passed" if golden["passed"] else "FAILED"
        rows.append(("golden samples", f"{state}, n={golden['num_samples']}"))
        if parity is not None:
            rows += _parity_rows(parity)
        rows += [("note", note) for note in found["notes"]]
        rows += [("problem", problem) for problem in found["problems"]]
        rows.append(("deployable", "yes" if found["deployable"] else "no"))
        facts_table(rows)
    typer.echo("verified" if result.passed else "verification FAILED")
    typer.echo(f"next: fieldmark serve {result.path}" if result.passed else "")


def _parity_rows(parity: dict[str, Any]) -> list[tuple[str, str]]:
    drop = parity["accuracy_drop"]
    largest, mean = parity["max_abs_delta_logit"], parity["mean_abs_delta_logit"]
    delta = "not finite" if largest is None else f"max {largest:.2g}, mean {mean:.2g}"
    return [
        ("compared on", parity["data"]),
        ("top-1 agreement", _rate(parity["top1_agreement"])),
        ("logits differ by", delta),
        (
            "accuracy drop",
            f"{drop['value']:.2%}  (95 % interval {drop['low']:.2%} to {drop['high']:.2%})",
        ),
        *drift_rows(parity),
    ]


def show_quickstart(result: Result) -> None:
    """Show the whole job's result in five lines."""
    facts = result.facts
    agreement = facts["parity"]["variants"]["onnx"]["parity"]["top1_agreement"]
    sample = facts["sample"]
    facts_table(
        [
            ("top-1 accuracy", f"{_rate(facts['top1_accuracy'])} on {facts['measured_on']}"),
            ("ONNX agrees with torch", _rate(agreement)),
            ("one image", f"{sample['file']} is a {sample['predictions'][0]['class_name']!r}"),
            ("package", facts["package"]),
        ]
    )
    typer.echo(f"next: fieldmark serve {result.path}")


def show_predictions(results: "Iterable[FileResult]", as_json: bool) -> int:
    """Print each result as it comes, or all as one object; return how many are errors."""
    num_errors = 0
    if as_json:
        listed = [result.to_json() for result in results]
        num_errors = sum("error" in item for item in listed)
        print_json({"results": listed, "num_errors": num_errors})
        return num_errors
    for result in results:
        if result.error is not None:
            num_errors += 1
            warn(f"{result.file}: {result.error}")
            continue
        typer.echo(result.file)
        for ranked in result.predictions:
            described = f"  ({ranked.description})" if ranked.description else ""
            typer.echo(f"  {ranked.probability:7.2%}  {ranked.class_name}{described}")
    return num_errors


def show_augment(result: Result) -> None:
    """Show what is applied, and where the picture is."""
    facts = result.facts
    height, width = facts["image_px"]
    facts_table(
        [
            ("applied", facts["applied"]),
            ("images", f"{width} x {height} px, read from {facts['storage']}"),
            ("picture", f"{result.path} ({facts['rows']} images, {facts['views']} views of each)"),
        ]
    )


def show_csv(path: Path, num_files: int, num_errors: int, as_json: bool) -> None:
    """Say where predictions were written."""
    if as_json:
        print_json({"csv": str(path), "num_files": num_files, "num_errors": num_errors})
    else:
        typer.echo(f"{num_files} files, {num_errors} with an error: {path}")


def show_recipes(recipes: list[dict[str, str]], as_json: bool) -> None:
    """Show each recipe with its result and where that was measured."""
    if as_json:
        print_json({"recipes": recipes})
        return
    rows = []
    for item in recipes:
        evidence = item["evidence"] or "expected or published, not measured"
        rows += [
            (item["name"], item["summary"]),
            ("", f"{item['result']} [{evidence}]"),
            ("", f"Cost: {item['cost']}"),
            ("", ""),
        ]
    facts_table(rows)


def show_info(result: Result) -> None:
    """Show what is known of a package, a run, or a data source."""
    facts = dict(result.facts)
    variants = facts.pop("variants", {})
    counts = facts.pop("class_counts", None)
    if counts is not None:
        _print_class_counts(counts)
    for name in ("config", "class_names", "metrics", "training", "confidence"):
        value = facts.get(name)
        if value and len(json.dumps(value)) > 200:
            facts[name] = f"{len(value)} entries; see --json"
    facts_table([(name, str(value)) for name, value in facts.items()])
    print_variants(variants)


def show_rates(result: Result) -> None:
    """Show the suggestions of a range test beside the recipe's own rate."""
    facts = result.facts
    steepest, tenth, diverged = (
        facts[name] for name in ("steepest", "minimum_tenth", "diverged_at")
    )
    rates = facts["rates"]
    none = "none: the loss did not fall by more than it scatters"
    facts_table(
        [
            ("tried", f"{rates[0]:.2g} to {rates[-1]:.2g}, {len(rates)} updates"),
            ("steepest fall of the loss", none if steepest is None else f"{steepest:.2g}"),
            ("its minimum / 10", none if tenth is None else f"{tenth:.2g}"),
            ("diverged", "no" if diverged is None else f"at {diverged:.2g}"),
            ("the recipe's own", f"{facts['own_lr']:.2g}"),
        ]
    )
    if result.path is not None:
        typer.echo(f"plot: {result.path}")


def show_sweep(result: Result) -> None:
    """Show a row for each trial, and the command that repeats the best."""
    facts, best = result.facts, result.facts["best"]
    keys = list(facts["spaces"])
    rows = []
    for row in facts["trials"]:
        rate = row["val_top1_accuracy"]
        is_best = best is not None and row["trial"] == best["trial"]
        rows.append(
            [
                f"{row['trial']}{' *' if is_best else ''}",
                *(row["values"].get(key, "") for key in keys),
                "" if rate is None else f"{rate['value']:.2%}",
                "" if rate is None else f"{rate['low']:.1%} to {rate['high']:.1%}",
                "" if row["val_loss"] is None else f"{row['val_loss']:.4f}",
                row["state"],
                f"{row['minutes']:.2f}",
            ]
        )
    columns = ["val top-1", "95 % interval", "val loss", "state", "minutes"]
    table(["trial", *keys, *columns], rows)
    for row in facts["trials"]:
        if row["state"] == "failed":
            typer.echo(f"trial {row['trial']} failed: {row['note']}")
    typer.echo(f"rows: {result.path}/sweep.csv")
    if best is None:
        typer.echo("no trial ended")
        return
    typer.echo(
        f"best: trial {best['trial']} by {facts['metric']}, the best of {len(rows)} on the same "
        "images: expect less on test"
    )
    typer.echo(f"next: {best['command']}")
    typer.echo(f"or, with the weights it has: {best['finish']}")

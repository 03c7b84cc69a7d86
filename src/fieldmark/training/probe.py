"""A linear probe: a new head for a frozen network, fitted to features that are extracted once."""

import importlib.metadata
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fieldmark.config import DataConfig, EvalConfig, ProbeConfig, TrainConfig
from fieldmark.data.labelled import Labels, Split
from fieldmark.data.split import Splits
from fieldmark.errors import DataError
from fieldmark.measure import Rate, wilson
from fieldmark.model import Architecture
from fieldmark.packaging.resolve import ResolvedModel
from fieldmark.preprocess import Preprocess
from fieldmark.runtime.files import write_json
from fieldmark.runtime.log import duration, say, warn
from fieldmark.training.features import Features, extract, feature_predict
from fieldmark.training.prepare import report_broken
from fieldmark.training.regression import (
    PenaltyScore,
    Regression,
    best_of,
    count_folds,
    cross_validate,
    fit,
    fold_of_each,
    nearest_neighbours,
    queries_for_neighbours,
    sample_for_folds,
)
from fieldmark.training.run_folder import RunFolder
from fieldmark.training.signals import stop_error

REPORT_FILE = "probe.json"


@dataclass(frozen=True)
class ReadyProbe:
    """A run in front of the extraction of its features."""

    run: RunFolder
    network: nn.Module
    head: nn.Linear
    splits: Splits
    preprocess: Preprocess
    architecture: Architecture
    pretrained: ResolvedModel
    weights: str  # digest of the frozen ones
    device: torch.device
    threads: int


def fit_probe(
    ready: ReadyProbe,
    *,
    probe: ProbeConfig,
    train: TrainConfig,
    data: DataConfig,
    evaluation: EvalConfig,
) -> dict[str, Any]:
    """Fit the head in place and write the report into the run; return the report.

    Raises:
        DataError: too many broken images, or a class without any.
        Interrupted, Preempted: by Ctrl-C, or by another signal; what was extracted is kept.
    """
    try:
        found = _extract_splits(ready, probe, train, data, evaluation)
        report = _fit(ready, found["train"], found.get("val"), probe, train.seed)
    except KeyboardInterrupt as stopped:
        raise stop_error(
            stopped,
            "stopped; the features extracted so far are kept. "
            f"Resume with: fieldmark train --resume --out {ready.run.path}",
        ) from None
    write_json(ready.run.path / REPORT_FILE, report)
    return report


def finish_report(folder: Path, report: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write the report once more, with the test result that only the end of a run has."""
    test = facts["top1_accuracy"] if facts["measured_on"] == "test" else None
    write_json(folder / REPORT_FILE, {**report, "test_top1_accuracy": test})


def write_head(head: nn.Linear, regression: Regression) -> None:
    """Set the head so that the network's logits are the regression's decision function."""
    weights, biases = regression.as_linear()
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(weights))
        head.bias.copy_(torch.from_numpy(biases))


def _extract_splits(
    ready: ReadyProbe,
    probe: ProbeConfig,
    train: TrainConfig,
    data: DataConfig,
    evaluation: EvalConfig,
) -> dict[str, Features]:
    predict = feature_predict(
        ready.network, ready.preprocess, ready.device, channels_last=train.channels_last
    )
    key = {
        "weights": ready.weights,
        "preprocess": ready.preprocess.digest(),
        "data": ready.splits.fingerprint,
    }
    splits = ready.splits
    broken: list[tuple[str, str]] = []

    def leave_out(name: str, reason: str) -> None:
        broken.append((name, reason))
        if len(broken) > data.max_broken_frac * len(splits.train):
            report()  # raises: no need to read the rest

    def report() -> None:
        report_broken(broken, len(splits.train), data.max_broken_frac, ready.run.leave_out)

    def refuse(name: str, reason: str) -> None:
        raise DataError(f"every image of val must decode. Got {name}: {reason} Repair it.")

    def features_of(split: Split, *, views: str, on_broken: Any) -> Features:
        return extract(
            split,
            ready.preprocess,
            predict,
            folder=ready.run.path / "features",
            key=key,
            mirrored=views == "mirrored",
            batch_size=evaluation.batch_size,
            on_broken=on_broken,
        )

    found = {"train": features_of(splits.train, views=probe.views, on_broken=leave_out)}
    report()
    if splits.val is not None:
        found["val"] = features_of(splits.val, views="one", on_broken=refuse)
    say(
        f"features of {sum(len(part) for part in found.values())} images extracted in "
        f"{duration(sum(part.seconds for part in found.values()))}"
    )
    return found


def _fit(
    ready: ReadyProbe, train: Features, val: Features | None, probe: ProbeConfig, seed: int
) -> dict[str, Any]:
    started = time.monotonic()
    _check_classes(train.labels, ready.splits.class_names)
    num_classes = len(ready.splits.class_names)
    scores, folds, num_used = _choose(ready, train, num_classes, probe, seed)
    best = best_of(scores)
    why = f"the best mean accuracy over {folds} folds of the train split"
    penalty = ready.run.decide("probe.penalty", best.penalty, why)
    if len(scores) > 1 and penalty in (min(probe.penalties), max(probe.penalties)):
        end = "smallest" if penalty == min(probe.penalties) else "largest"
        warn(f"the chosen penalty {penalty:g} is the {end} of probe.penalties: try beyond it")
    regression, converged = fit(train.values, train.labels, num_classes, penalty)
    if not converged:
        warn(f"the regression did not converge in {regression.iterations} iterations")
    write_head(ready.head, regression)
    fit_s = time.monotonic() - started
    knn = _neighbours(train, val, probe.neighbours, num_classes)
    return {
        "penalty": penalty,
        "penalties": [score.to_json() for score in scores],
        "folds": folds,
        "folds_images": num_used,
        "train_images": len(train),
        "views": probe.views,
        "num_features": int(train.values.shape[-1]),
        "iterations": regression.iterations,
        "converged": converged,
        "train_top1_accuracy": _accuracy(regression, train).to_json(),
        "val_top1_accuracy": None if val is None else _accuracy(regression, val).to_json(),
        "neighbours": min(probe.neighbours, len(train)),
        "knn_val_top1_accuracy": None if val is None else knn.to_json(),
        # Each by the others; where there are validation images, those say more.
        "knn_train_top1_accuracy": knn.to_json() if val is None else None,
        "extract_s": train.seconds + (val.seconds if val is not None else 0.0),
        "fit_s": fit_s,
        "scikit_learn": importlib.metadata.version("scikit-learn"),
    }


def _choose(
    ready: ReadyProbe, train: Features, num_classes: int, probe: ProbeConfig, seed: int
) -> tuple[list[PenaltyScore], int, int]:
    """Return the score of each penalty, the folds, and the images that were divided into them."""
    num_views, _, num_features = train.values.shape
    chosen = sample_for_folds(train.labels, num_views * num_features, num_classes, seed)
    labels = train.labels[chosen]
    folds = count_folds(labels, probe.folds)
    why = "probe.folds"
    if folds < probe.folds:
        why = "the smallest class that can be divided has so many images"
        say(f"cross-validation in {folds} folds, not {probe.folds}: {why}")
    ready.run.decide("probe.folds", folds, why)
    if len(chosen) < len(train):
        say(f"cross-validation on {len(chosen)} of {len(train)} images, the same share of a class")
    why = "all" if len(chosen) == len(train) else "the same share of each class, for time"
    ready.run.decide("probe.folds_images", len(chosen), why)
    values = train.values if len(chosen) == len(train) else train.values[:, chosen]
    scores = cross_validate(
        values,
        labels,
        num_classes,
        penalties=probe.penalties,
        fold_of_N=fold_of_each(labels, folds, seed),
        threads=ready.threads,
    )
    return scores, folds, len(chosen)


def _check_classes(labels: Labels, class_names: tuple[str, ...]) -> None:
    counts = np.bincount(labels, minlength=len(class_names))
    missing = [class_names[index] for index in np.flatnonzero(counts == 0)]
    if missing:
        raise DataError(
            f"every class must have a whole train image. Got none of {len(missing)} of "
            f"{len(class_names)} classes, the first {missing[0]!r}. Add images, or remove the "
            "class."
        )


def _accuracy(regression: Regression, features: Features) -> Rate:
    predicted = regression.logits(features.values[0]).argmax(axis=1)
    return wilson(int(np.sum(predicted == features.labels)), len(features))


def _neighbours(train: Features, val: Features | None, neighbours: int, num_classes: int) -> Rate:
    """Return the accuracy of a k-NN: what features alone give, with nothing fitted.

    Without val, each train image is looked up among the others.
    """
    _, num_train, num_features = train.values.shape
    queries = train if val is None else val
    rows = queries_for_neighbours(len(queries), num_train, num_features)
    predicted = nearest_neighbours(
        train.values[0],
        train.labels,
        queries.values[0, rows],
        neighbours=neighbours,
        num_classes=num_classes,
        own_M=rows if val is None else None,
    )
    return wilson(int(np.sum(predicted == queries.labels[rows])), len(rows))

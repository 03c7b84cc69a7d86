"""The end of a run: the chosen weights measured once on test, and packaged."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fieldmark import __version__
from fieldmark.config import RunConfig
from fieldmark.data.counts import class_counts
from fieldmark.data.labelled import Source, Split
from fieldmark.data.split import Splits
from fieldmark.errors import ConfigError, DataError, ImageError
from fieldmark.evaluation.backends import open_module
from fieldmark.evaluation.confidence import fit_confidence
from fieldmark.evaluation.run import Evaluation, evaluate_split, write_evaluation
from fieldmark.evaluation.splits import pick_split, spread_over
from fieldmark.evaluation.views import six_views
from fieldmark.measure import Predict
from fieldmark.model import Architecture, InferenceModule, eager_predict, num_parameters
from fieldmark.packaging.entries import Confidence
from fieldmark.packaging.golden import GoldenSamples, make_golden, synthetic_images
from fieldmark.packaging.resolve import ResolvedModel
from fieldmark.packaging.write import write_package
from fieldmark.preprocess import Preprocess
from fieldmark.runtime.files import write_json

NUM_GOLDEN = 12
RESULT_FILE = "metrics.json"


def finish_run(
    folder: Path,
    config: RunConfig,
    *,
    splits: Splits,
    preprocess: Preprocess,
    network: nn.Module,
    architecture: Architecture,
    pretrained: ResolvedModel | None,
    training: dict[str, Any],
    device: torch.device,
) -> dict[str, Any]:
    """Measure val and test, write metrics and predictions and the package; return the facts."""
    network = network.to(memory_format=torch.contiguous_format)
    module = InferenceModule(network, preprocess.mean, preprocess.std)
    predict = eager_predict(module, device)
    measured, confidence, note = _measure(folder, config, splits, preprocess, predict)
    data = config.data
    training = training | {
        "recipe": config.name,
        "source": data.source,
        "image_column": data.image_column,
        "label_column": data.label_column,
        "fingerprint": splits.fingerprint,
        "val_frac": data.val_frac,
        "test_frac": data.test_frac,
        "split_seed": data.split_seed,
        "seed": config.train.seed,
        "splits": splits.origin,
        "num_images": {name: len(split) for name, split in splits.parts().items()},
    }
    facts = {
        "data": data.source,
        "package": str(folder / "package"),
        "num_parameters": num_parameters(network),
        "architecture": architecture.name,
        **(measured.get("test") or measured.get("val") or {}),
        "measured_on": next((name for name in ("test", "val") if name in measured), None),
        "splits": splits.origin,
        "class_counts": class_counts(splits.parts(), splits.class_names),
        "broken": training["broken"],
        "selected_by": training["selected_by"],
        "confidence": {
            "temperature": None if confidence is None else confidence.temperature,
            "note": note,
        },
    }
    if "probe" in training:
        facts["probe"] = training["probe"]
    predict = eager_predict(module, "cpu")
    write_package(
        folder / "package",
        network=network,
        architecture=architecture,
        class_names=splits.class_names,
        class_descriptions=splits.class_descriptions,
        preprocess=preprocess,
        training=training,
        metrics=measured,
        golden=_golden(
            config.package.golden,
            config.package.num_golden,
            splits.val or splits.train,
            preprocess,
            predict,
            splits.class_names,
        ),
        golden_kind="data" if config.package.golden == "data" else "synthetic",
        license=config.package.license or (pretrained.license if pretrained else ""),
        source=pretrained.source if pretrained else f"trained by fieldmark {__version__}",
        name=config.name or folder.name,
        confidence=confidence,
        replace=True,  # a run that was stopped in between packages again
    )
    write_json(folder / RESULT_FILE, facts)  # last: it says that the run has ended
    return facts


def _measure(
    folder: Path, config: RunConfig, splits: Splits, preprocess: Preprocess, predict: Predict
) -> tuple[dict[str, Any], Confidence | None, str]:
    """Return the figures of val and test, where there are such splits; keep the predictions.

    With them come the temperature, which is fitted on val alone, and a sentence about it.
    """
    evaluate = partial(
        evaluate_split,
        preprocess=preprocess,
        data_class_names=splits.class_names,
        class_names=splits.class_names,
        class_descriptions=None,
        batch_size=config.eval.batch_size,
    )
    held_out = {name: split for name, split in splits.parts().items() if name != "train"}
    evaluations = {name: evaluate(predict, split) for name, split in held_out.items()}
    confidence, note = _confidence(evaluations.get("val"), splits, folder, config.data.source)
    temperature = None if confidence is None else confidence.temperature
    measured: dict[str, Any] = {}
    for name, split in held_out.items():
        measured[name] = _keep(folder, evaluations[name], split, splits, config, temperature)
        if config.eval.views == "six":
            scores = evaluate(six_views(predict), split).scores
            measured[name]["six_views"] = {
                "top1_accuracy": scores.top1_accuracy.to_json(),
                "loss": scores.loss,
            }
    return measured, confidence, note


def _confidence(
    val: Evaluation | None, splits: Splits, folder: Path, source: str
) -> tuple[Confidence | None, str]:
    """Return the temperature fitted on val, or None, and a sentence about it."""
    if val is None:
        return None, (
            "not calibrated, for want of a val split. "
            f"Run: fieldmark calibrate {folder} --data SOURCE."
        )
    data = f"{len(val.labels)} images of {source}, val"
    try:
        found = fit_confidence(val.logits, val.labels, data=data, fingerprint=splits.fingerprint)
    except DataError as error:
        return None, f"not calibrated: {error}"
    return found, (
        f"temperature {found.temperature:.3f} (95 % interval {found.low:.3f} to {found.high:.3f}), "
        f"fitted on {data}"
    )


def package_model(
    model: ResolvedModel, out: Path, *, source: Source | None, golden: str, license: str
) -> dict[str, Any]:
    """Write a package of any resolved model; measure it where data is given.

    Args:
        golden: data, synthetic, none, or auto: data where it is given, else synthetic.
    """
    class_names = model.require_class_names()
    if golden == "auto":
        golden = "data" if source else "synthetic"
    if golden not in ("data", "synthetic", "none"):
        raise ConfigError(f"--golden must be auto, data, synthetic or none. Got {golden!r}.")
    if golden == "data" and source is None:
        raise ConfigError("--golden data takes images from a source. Give --data SOURCE.")
    module = open_module(model)
    predict = eager_predict(module)
    measured: dict[str, Any] = dict(model.package.manifest.metrics) if model.package else {}
    confidence = model.package.manifest.confidence if model.package else None
    split: Split | None = None
    if source is not None:
        split = pick_split(source, "auto", training=model.training)
        evaluation = evaluate_split(
            predict,
            split,
            model.preprocess,
            data_class_names=source.class_names,
            class_names=class_names,
            class_descriptions=model.class_descriptions,
            batch_size=64,
        )
        temperature = None if confidence is None else confidence.temperature
        measured[split.name] = {
            "data": source.spec,
            **evaluation.to_json(class_names, temperature),
        }
    write_package(
        out,
        network=module.network,
        architecture=model.architecture,
        class_names=class_names,
        class_descriptions=model.class_descriptions,
        preprocess=model.preprocess,
        training=None if model.training is None else dict(model.training),
        metrics=measured,
        golden=_golden(golden, NUM_GOLDEN, split, model.preprocess, predict, class_names),
        golden_kind="data" if golden == "data" else "synthetic",
        license=license or model.license,
        source=model.source,
        name=model.name,
        confidence=confidence,
    )
    scores = measured[split.name] if split is not None else {}
    return {
        "package": str(out),
        "architecture": model.architecture.name,
        "golden": golden,
        **scores,
    }


def _keep(
    folder: Path,
    evaluation: Evaluation,
    split: Split,
    splits: Splits,
    config: RunConfig,
    temperature: float | None,
) -> dict[str, Any]:
    """Write an evaluation into the run; return its figures."""
    about = {"data": config.data.source, "split": split.name, "images": splits.origin[split.name]}
    facts = about | evaluation.to_json(splits.class_names, temperature)
    write_evaluation(
        folder / "evaluations" / split.name,
        evaluation,
        class_names=splits.class_names,
        image_names=[split.images.name(index) for index in range(len(split))],
        facts=facts,
    )
    return facts


def _golden(
    kind: str,
    count: int,
    split: Split | None,
    preprocess: Preprocess,
    predict: Predict,
    class_names: tuple[str, ...],
) -> GoldenSamples | None:
    if kind == "none":
        return None
    if kind == "synthetic" or split is None:
        return make_golden(synthetic_images(count, seed=0), preprocess, predict, class_names)
    encoded = []
    chosen = spread_over(split, 2 * count)  # some of a train split may be broken
    for index in range(len(chosen)):
        try:
            data = chosen.images.encoded(index)
            preprocess(data)
        except ImageError:
            continue
        encoded.append(data)
    step = max(1, len(encoded) // count)
    return make_golden(encoded[::step][:count], preprocess, predict, class_names)

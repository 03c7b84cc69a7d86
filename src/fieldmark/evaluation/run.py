"""One evaluator for every backend: it knows a Predict and batches, nothing else."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fieldmark.data.classes import match_classes
from fieldmark.data.held_out import eval_batches
from fieldmark.data.labelled import Split
from fieldmark.measure import Predict, Scores, measure_calibration, nll_change, score
from fieldmark.preprocess import Preprocess
from fieldmark.runtime.files import write_atomic, write_json
from fieldmark.runtime.log import progress


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Scores, and the logits they were counted from, in the order of the images."""

    scores: Scores
    logits: npt.NDArray[np.float32]  # (N, K)
    labels: npt.NDArray[np.int64]  # (N,), in the order of the model's classes

    def to_json(self, class_names: Sequence[str], temperature: float | None) -> dict[str, Any]:
        """Return plain values: scores, and confidence without and with the temperature."""
        figures = _confidence(self.logits, self.labels, temperature)
        return self.scores.to_json(list(class_names)) | figures


def evaluate_predict(
    predict: Predict,
    batches: Iterable[tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]],
    *,
    num_images: int,
    title: str = "evaluating",
) -> Evaluation:
    """Return the evaluation of `predict` over batches of uint8 (B, H, W, 3) and labels (B,)."""
    logits, labels = [], []
    with progress(title, num_images, "images") as bar:
        for images, batch_labels in batches:
            logits.append(predict(images))
            labels.append(batch_labels)
            bar.advance(len(batch_labels))
    all_logits, all_labels = np.concatenate(logits), np.concatenate(labels)
    return Evaluation(score(all_logits, all_labels), all_logits, all_labels)


def evaluate_split(
    predict: Predict,
    split: Split,
    preprocess: Preprocess,
    *,
    data_class_names: Sequence[str],
    class_names: Sequence[str],
    class_descriptions: Sequence[str] | None,
    batch_size: int,
) -> Evaluation:
    """Return the evaluation of a split, its labels matched to the model's classes by name.

    Raises:
        DataError: a class the model does not know, or an image that does not decode.
    """
    to_model = match_classes(data_class_names, class_names, class_descriptions)
    return evaluate_predict(
        predict,
        (
            (images, to_model[labels])
            for images, labels in eval_batches(split, preprocess, batch_size)
        ),
        num_images=len(split),
        title=f"evaluating {split.name}",
    )


def write_evaluation(
    folder: Path,
    evaluation: Evaluation,
    *,
    class_names: Sequence[str],
    image_names: Sequence[str],
    facts: dict[str, Any],
) -> None:
    """Write metrics.json and predictions.npz (names, labels, predicted, logits) into `folder`.

    Args:
        facts: the content of metrics.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        names=np.asarray(image_names, dtype=np.str_),
        class_names=np.asarray(class_names, dtype=np.str_),
        labels=evaluation.labels,
        predicted=evaluation.logits.argmax(axis=1),
        logits=evaluation.logits,
    )
    write_atomic(folder / "predictions.npz", buffer.getvalue())
    write_json(folder / "metrics.json", facts)


def evaluation_folder(model: Path, split: str, variant: str) -> Path | None:
    """Return where an evaluation goes: beside a run's checkpoints; nowhere for other models."""
    is_run = (model / "checkpoints").is_dir()
    return model / "evaluations" / f"{split}-{variant}" if is_run else None


def _confidence(
    logits: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], temperature: float | None
) -> dict[str, Any]:
    """Return {"ece"} of logits, and with a temperature {"calibrated"}: NLL and ECE with it."""
    if not np.isfinite(logits).all():
        return {"ece": None}
    figures: dict[str, Any] = {"ece": measure_calibration(logits, labels).ece.to_json()}
    if temperature is not None:
        after = measure_calibration(logits, labels, temperature)
        figures["calibrated"] = {
            "temperature": temperature,
            "nll": after.nll.to_json(),
            "nll_change": nll_change(logits, labels, 1.0, temperature).to_json(),
            "ece": after.ece.to_json(),
        }
    return figures

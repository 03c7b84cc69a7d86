"""The measurement that picks a checkpoint while training runs."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fieldmark.data.held_out import load_eval
from fieldmark.data.labelled import Split
from fieldmark.measure import Rate, score
from fieldmark.model import InferenceModule, eager_predict
from fieldmark.preprocess import Preprocess


def make_validation(
    split: Split | None,
    preprocess: Preprocess,
    *,
    batch_size: int,
    max_bytes: int,
    device: torch.device,
) -> Callable[[nn.Module], tuple[Rate, float]] | None:
    """Return network -> (top-1 accuracy, loss) on a split, or None without one.

    The network is measured as it will be packaged: in float32, normalisation in front.
    """
    if split is None:
        return None
    held_out = load_eval(split, preprocess, max_bytes)

    def validate(network: nn.Module) -> tuple[Rate, float]:
        module = InferenceModule(network, preprocess.mean, preprocess.std)
        predict = eager_predict(module, device)
        logits: list[npt.NDArray[np.float32]] = []
        labels: list[npt.NDArray[np.int64]] = []
        for images, batch_labels in held_out.batches(batch_size):
            logits.append(predict(images))
            labels.append(batch_labels)
        scores = score(np.concatenate(logits), np.concatenate(labels))
        return scores.top1_accuracy, scores.loss

    return validate

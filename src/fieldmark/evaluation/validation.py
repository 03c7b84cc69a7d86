"""The measurement that picks a checkpoint while training runs."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fieldmark.data.held_out import load_eval
from fieldmark.data.labelled import Split
from fieldmark.measure import Rate, score, wilson
from fieldmark.model import InferenceModule, eager_predict
from fieldmark.preprocess import Preprocess

Counts = tuple[int, int, float]
Gather = Callable[[Counts], list[Counts]]


def make_validation(
    split: Split | None,
    preprocess: Preprocess,
    *,
    batch_size: int,
    max_bytes: int,
    device: torch.device,
    rank: int = 0,
    num_ranks: int = 1,
    gather: Gather = lambda counts: [counts],
) -> Callable[[nn.Module], tuple[Rate, float]] | None:
    """Return network -> (top-1 accuracy, loss) on a split, or None without one.

    The network is measured as it will be packaged: in float32, normalisation in front. Of several
    ranks, each measures every num_ranks-th image, from its own on: no image is measured twice.

    Args:
        gather: this rank's (hits, images, sum of losses) -> those of all ranks.
    """
    if split is None:
        return None
    if num_ranks > 1:
        split = split.subset(np.arange(rank, len(split), num_ranks), split.name)
    held_out = load_eval(split, preprocess, max_bytes)

    def validate(network: nn.Module) -> tuple[Rate, float]:
        module = InferenceModule(network, preprocess.mean, preprocess.std)
        predict = eager_predict(module, device)
        logits: list[npt.NDArray[np.float32]] = []
        labels: list[npt.NDArray[np.int64]] = []
        for images, batch_labels in held_out.batches(batch_size):
            logits.append(predict(images))
            labels.append(batch_labels)
        mine = (0, 0, 0.0)  # there may be fewer images than ranks
        if labels:
            scores = score(np.concatenate(logits), np.concatenate(labels))
            n = scores.top1_accuracy.n
            mine = (round(scores.top1_accuracy.value * n), n, scores.loss * n)
        hits, images_seen, losses = (sum(column) for column in zip(*gather(mine), strict=True))
        return wilson(int(hits), int(images_seen)), losses / images_seen

    return validate

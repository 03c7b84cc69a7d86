"""What a number is: rates with intervals, top-k, losses, agreement. numpy only."""

from fieldmark.measure.agreement import Agreement, compare_logits
from fieldmark.measure.class_maps import class_maps
from fieldmark.measure.predict import Predict
from fieldmark.measure.rates import Rate, mcnemar_p, paired_difference, wilson
from fieldmark.measure.scores import Scores, log_softmax, score, softmax, top_k_hits

__all__ = [
    "Agreement",
    "Predict",
    "Rate",
    "Scores",
    "class_maps",
    "compare_logits",
    "log_softmax",
    "mcnemar_p",
    "paired_difference",
    "score",
    "softmax",
    "top_k_hits",
    "wilson",
]

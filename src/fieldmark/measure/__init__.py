"""What a number is: rates with intervals, top-k, losses, agreement. numpy only."""

from fieldmark.measure.agreement import Agreement, compare_logits
from fieldmark.measure.predict import Predict
from fieldmark.measure.rates import Rate, mcnemar_p, paired_difference, wilson
from fieldmark.measure.scores import Scores, log_softmax, score, softmax, top_k_hits
from fieldmark.measure.timing import Quantile, is_faster, median_ratio, p99, quantile

__all__ = [
    "Agreement",
    "Predict",
    "Quantile",
    "Rate",
    "Scores",
    "compare_logits",
    "is_faster",
    "log_softmax",
    "mcnemar_p",
    "median_ratio",
    "p99",
    "paired_difference",
    "quantile",
    "score",
    "softmax",
    "top_k_hits",
    "wilson",
]

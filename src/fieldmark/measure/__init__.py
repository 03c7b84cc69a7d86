"""What a number is: rates with intervals, top-k, losses, agreement, calibration. numpy only."""

from fieldmark.measure.agreement import Agreement, compare_logits
from fieldmark.measure.calibration import (
    Calibration,
    Estimate,
    TemperatureFit,
    ece,
    ece_increase,
    fit_temperature,
    measure_calibration,
    nll,
    nll_change,
    reliability,
)
from fieldmark.measure.class_maps import class_maps
from fieldmark.measure.predict import Predict
from fieldmark.measure.rates import Rate, mcnemar_p, paired_difference, wilson
from fieldmark.measure.scores import Scores, largest, log_softmax, score, softmax, top_k_hits
from fieldmark.measure.timing import Quantile, is_faster, median_ratio, p99, quantile

__all__ = [
    "Agreement",
    "Calibration",
    "Estimate",
    "Predict",
    "Quantile",
    "Rate",
    "Scores",
    "TemperatureFit",
    "class_maps",
    "compare_logits",
    "ece",
    "ece_increase",
    "fit_temperature",
    "is_faster",
    "largest",
    "log_softmax",
    "mcnemar_p",
    "measure_calibration",
    "median_ratio",
    "nll",
    "nll_change",
    "p99",
    "paired_difference",
    "quantile",
    "reliability",
    "score",
    "softmax",
    "top_k_hits",
    "wilson",
]

"""Regularised multinomial logistic regression, its penalty chosen by cross-validation.

Minimised is the mean cross-entropy over the images, plus penalty / 2 times the sum of the squared
weights of standardised features; biases are free. Source: Kornblith et al. 2019, arXiv:1805.08974,
section 3 (logistic regression on fixed features as the measure of a network).

Shapes: N images, V views of each, D features, K classes.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from fieldmark.data.labelled import Labels
from fieldmark.data.parallel import ordered_map
from fieldmark.errors import DataError
from fieldmark.measure import log_softmax
from fieldmark.runtime.log import track
from fieldmark.runtime.seed import derive_seed

FloatArray = npt.NDArray[np.float32]

# Views of images x features x classes that cross-validation works on; beyond, it takes a part of
# the images. 50,000 x 1280 x 10 lies below, with mirror images too.
MAX_CV_WORK = 2_000_000_000
MAX_CV_BYTES = 2_500_000_000  # of features that folds copy at the same time
MAX_KNN_WORK = 500_000_000_000  # multiplications of a k-NN; beyond, it looks at a part of val
MAX_ITERATIONS = 1_000
TOLERANCE = 1e-4  # of the gradient's largest component: scikit-learn's default
# A feature that is nearly constant on the train images would be blown up by its standard
# deviation: it is divided by at least this part of the median one.
STD_FLOOR = 1e-2
_ROWS = 4_096  # that are held in float64 at once
ALWAYS_TRAINED = -1  # fold of the only image of a class: it is never held out


@dataclass(frozen=True, slots=True)
class Regression:
    """Logits of features: (x - mean) / std @ weights.T + biases, all float64."""

    mean: npt.NDArray[np.float64]  # (D,)
    std: npt.NDArray[np.float64]  # (D,)
    weights: npt.NDArray[np.float64]  # (K, D)
    biases: npt.NDArray[np.float64]  # (K,)
    iterations: int

    def logits(self, features_ND: FloatArray) -> npt.NDArray[np.float64]:
        """Return the decision function (N, K)."""
        weights, biases = self.as_linear()
        logits = np.empty((len(features_ND), len(biases)))
        for start in range(0, len(features_ND), _ROWS):
            block = features_ND[start : start + _ROWS].astype(np.float64)
            logits[start : start + _ROWS] = block @ weights.T + biases
        return logits

    def as_linear(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Return weights (K, D) and biases (K,) for features as they are, not standardised."""
        weights = self.weights / self.std
        return weights, self.biases - weights @ self.mean


@dataclass(frozen=True, slots=True)
class PenaltyScore:
    """How a penalty did on the held-out folds."""

    penalty: float
    accuracy: float  # mean over folds, fraction
    accuracy_std: float  # over folds, divided by their number
    loss: float  # mean over folds of the mean cross-entropy, nats

    def to_json(self) -> dict[str, float]:
        """Return plain values."""
        return {
            "penalty": self.penalty,
            "accuracy": self.accuracy,
            "accuracy_std": self.accuracy_std,
            "loss": self.loss,
        }


def fit(
    values_VND: FloatArray, labels_N: Labels, num_classes: int, penalty: float
) -> tuple[Regression, bool]:
    """Return the regression, and whether it converged. The same with any number of threads."""
    with threadpool_limits(1), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        ((_, regression),) = _fit_path(values_VND, labels_N, num_classes, [penalty])
    return regression, not any(issubclass(w.category, ConvergenceWarning) for w in caught)


def count_folds(labels_N: Labels, wanted: int) -> int:
    """Return the folds that can be made: at most the images of the smallest class, at least 2.

    A class of one image counts for nothing: it is never held out.

    Raises:
        DataError: no class has two images, so that nothing can be held out.
    """
    sizes = np.bincount(labels_N)
    divisible = sizes[sizes >= 2]
    if len(divisible) == 0:
        raise DataError(
            "cross-validation of probe.penalties needs a class with at least 2 train images. "
            f"Got {len(labels_N)} images of {int((sizes > 0).sum())} classes. Add images."
        )
    return int(min(wanted, divisible.min()))


def fold_of_each(labels_N: Labels, folds: int, seed: int) -> npt.NDArray[np.int64]:
    """Return the fold (N,) that each image is held out in: stratified, the same for a seed."""
    fold_of = np.full(len(labels_N), ALWAYS_TRAINED, dtype=np.int64)
    dealt = 0  # goes on from class to class, so that folds differ by at most one image
    for label in np.unique(labels_N):
        members = np.flatnonzero(labels_N == label)
        if len(members) < 2:
            continue
        rng = np.random.default_rng(derive_seed("probe folds", seed, int(label)))
        fold_of[rng.permutation(members)] = (dealt + np.arange(len(members))) % folds
        dealt += len(members)
    return fold_of


def sample_for_folds(
    labels_N: Labels, num_features: int, num_classes: int, seed: int
) -> npt.NDArray[np.int64]:
    """Return the sorted positions that cross-validation uses: all, or the same share of a class."""
    at_most = MAX_CV_WORK // (num_features * num_classes)
    if len(labels_N) <= at_most:
        return np.arange(len(labels_N))
    keep_frac = at_most / len(labels_N)
    chosen = []
    for label in np.unique(labels_N):
        members = np.flatnonzero(labels_N == label)
        rng = np.random.default_rng(derive_seed("probe sample", seed, int(label)))
        # Two at least: one to train on and one to hold out.
        chosen.append(rng.permutation(members)[: max(2, round(keep_frac * len(members)))])
    return np.sort(np.concatenate(chosen))


def cross_validate(
    values_VND: FloatArray,
    labels_N: Labels,
    num_classes: int,
    *,
    penalties: Sequence[float],
    fold_of_N: npt.NDArray[np.int64],
    threads: int,
) -> list[PenaltyScore]:
    """Return the score of each penalty, in their order; `threads` changes no result.

    All views of an image share its fold: those of the other folds are trained on, and of the
    held-out images the first view is classified, as in serving.
    """
    folds = range(int(fold_of_N.max()) + 1)

    def measure(fold: int) -> dict[float, tuple[float, float]]:
        is_held_out = fold_of_N == fold
        held_out, expected = values_VND[0, is_held_out], labels_N[is_held_out]
        fits = _fit_path(
            values_VND[:, ~is_held_out], labels_N[~is_held_out], num_classes, penalties
        )
        found = {}
        for penalty, regression in fits:
            log_probs = log_softmax(regression.logits(held_out))
            at_label = log_probs[np.arange(len(expected)), expected]
            hit_frac = np.mean(log_probs.argmax(axis=1) == expected)
            found[penalty] = float(hit_frac), float(-at_label.mean())
        return found

    # One thread a fold, none inside: the threads of BLAS wait for each other at every product,
    # which on a busy machine takes many times as long as one thread alone.
    num_threads = min(threads, len(folds), max(1, MAX_CV_BYTES // (2 * values_VND.nbytes)))
    with threadpool_limits(1), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        measured = ordered_map(measure, folds, num_threads=num_threads)
        of_folds = list(track(measured, "cross-validation", len(folds), "folds"))
    results = []
    for penalty in penalties:
        accuracies, losses = zip(*(found[penalty] for found in of_folds), strict=True)
        mean, std = float(np.mean(accuracies)), float(np.std(accuracies))
        results.append(PenaltyScore(penalty, mean, std, float(np.mean(losses))))
    return results


def best_of(scores: Iterable[PenaltyScore]) -> PenaltyScore:
    """Return the most accurate; of equals the one of smaller loss, then of stronger penalty."""
    return max(scores, key=lambda score: (score.accuracy, -score.loss, score.penalty))


def nearest_neighbours(
    train_ND: FloatArray,
    labels_N: Labels,
    queries_MD: FloatArray,
    *,
    neighbours: int,
    num_classes: int,
    own_M: Labels | None = None,
) -> npt.NDArray[np.int64]:
    """Return the class (M,) that most of each query's nearest images have, by cosine similarity.

    Of classes with equal counts the one whose images are the more similar wins.

    Args:
        own_M: each query's own row of the train images, which is not its neighbour.
    """
    count = min(neighbours, len(train_ND) - (own_M is not None))
    train, queries = _unit(train_ND), _unit(queries_MD)
    predicted = np.empty(len(queries), dtype=np.int64)
    block = max(1, 50_000_000 // len(train))
    for start in range(0, len(queries), block):
        similarity = queries[start : start + block] @ train.T
        if own_M is not None:
            own = own_M[start : start + block]
            similarity[np.arange(len(own)), own] = -np.inf
        nearest = np.argpartition(-similarity, count - 1, axis=1)[:, :count]
        rows = np.arange(len(nearest))[:, None]
        votes = np.zeros((len(nearest), num_classes))
        # A similarity is at most 1, so that all of them together weigh less than one vote.
        weight = 1 + similarity[rows, nearest].astype(np.float64) / (4 * count)
        np.add.at(votes, (rows, labels_N[nearest]), weight)
        predicted[start : start + block] = votes.argmax(axis=1)
    return predicted


def queries_for_neighbours(num_queries: int, num_train: int, num_features: int) -> Labels:
    """Return the positions of the queries to look at: all, or a part spread evenly over them."""
    at_most = max(1, MAX_KNN_WORK // (num_train * num_features))
    return np.unique(np.linspace(0, num_queries - 1, min(num_queries, at_most)).astype(np.int64))


def _fit_path(
    values_VND: FloatArray, labels_N: Labels, num_classes: int, penalties: Iterable[float]
) -> Iterator[tuple[float, Regression]]:
    """Yield (penalty, regression) from the strongest penalty on, each begun at the one before.

    Every class must have an image. Two classes are fitted with one weight vector, which gives
    the two rows of opposite sign that the multinomial form has its minimum at.
    """
    x, mean, std = _standardise(values_VND)
    y = np.tile(labels_N, len(values_VND))
    model = LogisticRegression(max_iter=MAX_ITERATIONS, tol=TOLERANCE, warm_start=True)
    for penalty in sorted(penalties, reverse=True):
        # C weighs the sum over examples against half the squared weights. The one vector w of two
        # classes stands for w/2 and -w/2, whose squares sum to half of its own.
        model.set_params(C=(2 if num_classes == 2 else 1) / (penalty * len(y)))
        model.fit(x, y)
        weights = model.coef_.astype(np.float64)
        biases = model.intercept_.astype(np.float64)
        if num_classes == 2:
            weights = np.concatenate([-weights, weights]) / 2
            biases = np.concatenate([-biases, biases]) / 2
        yield penalty, Regression(mean, std, weights, biases, int(np.max(model.n_iter_)))


def _standardise(
    values_VND: FloatArray,
) -> tuple[FloatArray, npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return features (V * N, D) of mean 0 and standard deviation 1, and what made them so."""
    flat = values_VND.reshape(-1, values_VND.shape[-1])
    blocks = [slice(start, start + _ROWS) for start in range(0, len(flat), _ROWS)]
    mean = sum(flat[rows].sum(axis=0, dtype=np.float64) for rows in blocks) / len(flat)
    squares = sum(np.square(flat[rows] - mean).sum(axis=0) for rows in blocks)
    std = np.sqrt(squares / len(flat))
    varying = std[std > 0]
    floor = STD_FLOOR * float(np.median(varying)) if len(varying) else 1.0
    std = np.maximum(std, floor)
    x = flat - mean.astype(np.float32)
    x /= std.astype(np.float32)
    return x, mean, std


def _unit(values_ND: FloatArray) -> FloatArray:
    norms = np.linalg.norm(values_ND, axis=1, keepdims=True)
    unit: FloatArray = values_ND / np.maximum(norms, 1e-12)
    return unit

"""Opening any form of a model as a Predict."""

import numpy as np
import numpy.typing as npt
import torch

from fieldmark.errors import PackageError, UnknownName
from fieldmark.measure import Predict
from fieldmark.model import InferenceModule, build, eager_predict
from fieldmark.packaging.resolve import ResolvedModel
from fieldmark.packaging.variants import open_variant

REFERENCE = "torch"


def open_module(model: ResolvedModel) -> InferenceModule:
    """Return the trained model with its normalisation, in eval mode."""
    network = build(model.architecture, model.weights)
    return InferenceModule(network, model.preprocess.mean, model.preprocess.std)


def open_reference(model: ResolvedModel) -> Predict:
    """Return the trained model itself, run by torch: what every variant is compared with."""
    return eager_predict(open_module(model))


def open_backend(model: ResolvedModel, variant: str) -> Predict:
    """Return the reference for "torch", else the package's variant of that name.

    Raises:
        PackageError, UnknownName: the model is no package, or has no such variant.
    """
    if variant == REFERENCE:
        return open_reference(model)
    if model.package is None:
        raise PackageError(
            f"only a package has variants such as {variant!r}. Got {model.source}. "
            f"Run: fieldmark package {model.source} --out PACKAGE."
        )
    known = model.package.manifest.variants
    if variant not in known:
        raise UnknownName.among(f"variant of {model.name}", variant, [REFERENCE, *known])
    return open_variant(model.package, variant)


def with_threads(predict: Predict, threads: int) -> Predict:
    """Return `predict`, run by torch with so many threads, whichever thread it is called from."""

    def limited(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        # Setting the number, even to what it is, throws away what oneDNN has compiled.
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        return predict(images)

    return limited

"""Verifying a package: files, golden samples, and variants against the reference on real images.

With torch absent, or the images not there, golden samples alone run, and the result says so.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fieldmark.errors import DataError, MissingDependency, PackageError, UnknownName, require
from fieldmark.measure import Predict
from fieldmark.packaging.entries import Variant
from fieldmark.packaging.manifest import Package, open_package
from fieldmark.packaging.served import SERVED, can_open
from fieldmark.packaging.variants import open_variant
from fieldmark.packaging.verify import verify_variant
from fieldmark.runtime.log import track, warn

if TYPE_CHECKING:
    from fieldmark.data.labelled import Source, Split

_BATCH_SIZE = 50

Batch = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class ParityImages:
    """The images of a comparison, and the model that they are compared with."""

    reference: Predict
    batches: Callable[[], Iterator[Batch]]
    num_batches: int
    words: str


def verify_package(
    folder: Path,
    *,
    data: str,
    columns: Mapping[str, str],
    split: str,
    variants: Sequence[str],
    max_images: int,
) -> tuple[dict[str, Any], bool]:
    """Return what was found of each variant, and whether all checks passed.

    Raises:
        PackageError: no variant to verify, or a damaged package.
        UnknownName: a variant that is not there.
        DataError: images that were asked for by `data` cannot be read.
    """
    package = open_package(folder)
    package.check_files()
    known = package.manifest.variants
    if not known:
        raise PackageError(
            f"{folder} must have an exported variant to verify. It has none. "
            f"Run: fieldmark export {folder}."
        )
    for name in variants:
        if name not in known:
            raise UnknownName.among(f"variant of {folder}", name, known)
    names = tuple(variants or known)
    images, why_not = _parity_images(
        package, data, columns, split, max_images, _order(known, names)
    )
    results = {}
    for name in names:
        if not variants and not _can_open(known[name].kind):
            warn(f"variant {name!r} was not verified: its library is not installed.")
            continue
        batches = None
        if images is not None:
            batches = track(images.batches(), f"comparing {name}", images.num_batches)
        result = verify_variant(
            package,
            name,
            open_variant(package, name),
            images.reference if images is not None else None,
            batches,
            images.words if images is not None else "",
        )
        package = result.package
        results[name] = result.to_json()
        notes = [why_not] if why_not else []
        if images is not None and _chose(known[name], images):
            notes.append(
                f"{name!r} was chosen by images of this split, so they may flatter it. "
                "Compare on others with --split or --data."
            )
        results[name]["notes"] = [*results[name]["notes"], *notes]
    # Where no variant could be opened, nothing was verified.
    passed = bool(results) and all(result["passed"] for result in results.values())
    return {"package_id": package.id, "variants": results}, passed


def _can_open(kind: str) -> bool:
    return can_open(kind) or (kind not in SERVED and find_spec("torch") is not None)


def _order(known: Mapping[str, Variant], names: Sequence[str]) -> tuple[str, ...]:
    """Return which split to compare on: val; of int8 test, as val may have chosen it."""
    if any(entry.quantization is not None for name, entry in known.items() if name in names):
        return ("test", "val", "all", "train")
    return ("val", "test", "all", "train")


def _chose(variant: Variant, images: ParityImages) -> bool:
    made = variant.quantization
    return (
        made is not None
        and made.selection_set is not None
        and images.words.endswith(f" images of {made.selection_set.data}")
    )


def _parity_images(
    package: Package,
    data: str,
    columns: Mapping[str, str],
    wanted: str,
    max_images: int,
    order: Sequence[str],
) -> tuple[ParityImages | None, str]:
    """Return the images to compare on, or None and why there are none."""
    if find_spec("torch") is None:
        if data:
            require("torch", "train", "comparing on images")
        return None, "The trained model needs torch, which is not installed."
    training = package.manifest.training
    if not data and not (training or {}).get("source"):
        return None, "The package records no images. Name some with --data SOURCE."
    try:
        return _open_parity(package, data, columns, wanted, max_images, order), ""
    except (DataError, UnknownName, MissingDependency) as error:
        if data:
            raise
        warn(f"the recorded images cannot be compared again: {error}")
        return None, f"The recorded images are not there: {error}"


def _open_parity(
    package: Package,
    data: str,
    columns: Mapping[str, str],
    wanted: str,
    max_images: int,
    order: Sequence[str],
) -> ParityImages:
    from fieldmark.evaluation.splits import pick_split, spread_over

    source = open_source_of(package, data, columns)
    chosen = pick_split(
        source,
        wanted,
        training=package.manifest.training or None,
        order=order,
    )
    return open_images(package, source, spread_over(chosen, max_images))


def open_source_of(package: Package, data: str, columns: Mapping[str, str]) -> "Source":
    """Return the source `data` names, or where that is empty, what the package was trained on.

    Raises:
        DataError: the package records none, or its images have changed.
    """
    from fieldmark.data.source import open_source

    training = package.manifest.training or {}
    spec = data or str(training.get("source", ""))
    if not spec:
        raise DataError(
            f"{package.path} must record the images that it was trained on. It does not. "
            "Name some with --data SOURCE."
        )
    if spec == training.get("source") and not any(columns.values()):
        columns = {name: str(training.get(name, "")) for name in columns}
    source = open_source(spec, **columns)
    if not data and training.get("fingerprint") != source.fingerprint:
        raise DataError(
            f"{source.spec} must be what the model was trained on. Its fingerprint changed. "
            "To use it all the same: --data and --split."
        )
    return source


def open_images(package: Package, source: "Source", chosen: "Split") -> ParityImages:
    """Return the images of a split, labelled as the package's classes, and the trained model."""
    from fieldmark.data.classes import match_classes
    from fieldmark.data.held_out import eval_batches
    from fieldmark.evaluation.backends import open_reference
    from fieldmark.packaging.resolve import resolve_model

    to_model = match_classes(source.class_names, package.class_names, package.class_descriptions)

    def batches() -> Iterator[Batch]:
        for images, labels in eval_batches(chosen, package.preprocess, _BATCH_SIZE):
            yield images, to_model[labels]

    return ParityImages(
        reference=open_reference(resolve_model(str(package.path))),
        batches=batches,
        num_batches=-(-len(chosen) // _BATCH_SIZE),
        words=f"{len(chosen)} images of {source.spec}, {chosen.name}",
    )

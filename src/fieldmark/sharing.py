"""Giving packages to others: to the Hugging Face hub, or to any file system that fsspec knows."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from fieldmark.errors import ConfigError, UnknownName, require
from fieldmark.pipeline import Result
from fieldmark.runtime.log import warn

if TYPE_CHECKING:
    from fieldmark.packaging.draft import Draft
    from fieldmark.packaging.manifest import Package

SharedGolden = Literal["synthetic", "keep", "none"]


def push(
    model: str | Path,
    destination: str,
    *,
    golden: SharedGolden = "synthetic",
    license: str = "",
    replace: bool = False,
) -> Result:
    """Send a package, or a run's, to another place; what was written is read back and compared.

    Real images among its golden samples are replaced by drawn ones, and paths of this machine by
    their last parts; what is sent is then another package, with an id of its own.

    Args:
        destination: hf:OWNER/NAME, hf:OWNER/NAME@BRANCH, or a URL such as file:///srv/birds.
        golden: synthetic, none, or keep: the package as it is, with its images, paths and id.
        license: of the weights, where the package does not say it or is wrong.
        replace: put it in the place of another package.
    """
    if golden not in get_args(SharedGolden):
        raise UnknownName.among("kind of golden samples", golden, get_args(SharedGolden))
    from fieldmark.packaging.card import is_generated, write_card
    from fieldmark.packaging.manifest import CARD, open_package, package_folder
    from fieldmark.packaging.places import HUB, open_place
    from fieldmark.packaging.transfer import check_destination, send

    place = open_place(destination, is_source=False)
    package = open_package(package_folder(model))
    package.check_files()
    on_hub = destination.startswith(HUB)
    _check_license(license or package.manifest.license, package, on_hub)
    there = check_destination(place)  # before work that would be lost
    draft, changes = _draft(package, golden, license)
    card_file = package.path / CARD
    card = card_file.read_bytes() if card_file.is_file() else None
    keep_card = card is not None and not is_generated(card)
    if card is None or not keep_card:
        card = write_card(draft.manifest, draft.id, place.words if on_hub else "SOURCE")
    sent = send(draft, card, place, there=there, keep_card=keep_card, replace=replace)
    return Result(
        package.path,
        {
            "destination": place.words,
            "sent": sent,
            "id": draft.id,
            "id_here": package.id,
            "name": draft.manifest.name,
            "license": draft.manifest.license,
            "golden": draft.manifest.golden.model_dump(mode="json"),
            "changes": changes,
            "card": _card_words(sent, keep_card),
            "files": len(draft.manifest.files) + 2,  # with manifest and model card
            "bytes": draft.total_bytes + len(draft.text) + len(card),
        },
    )


def pull(source: str, out: str | Path, *, expect: str = "") -> Result:
    """Take a package from another place into `out`, each file checked as it comes.

    Nothing of it is run. An interrupted pull leaves nothing that opens.

    Args:
        source: as the destination of `push`; a revision may be a tag or a commit, too.
        out: must not exist.
        expect: the id the package must have: it proves that this is the package it was taken for.
    """
    from fieldmark.packaging.places import open_place
    from fieldmark.packaging.transfer import check_expected, take

    expect = check_expected(expect)
    place = open_place(source, is_source=True)
    package = take(place, Path(out), expect=expect)
    manifest = package.manifest
    return Result(
        Path(out),
        {
            "source": place.words,
            "id": package.id,
            "expected": bool(expect),
            "name": manifest.name,
            "license": manifest.license,
            "num_classes": manifest.architecture.num_classes,
            "variants": {name: v.deployable for name, v in manifest.variants.items()},
            "files": len(manifest.files),
            "bytes": sum(entry.bytes for entry in manifest.files.values()),
        },
    )


def _card_words(sent: str, is_own: bool) -> str:
    if sent == "nothing":
        return "left as it is there"
    return "README.md of the package" if is_own else "written from the manifest"


def _draft(package: "Package", golden: SharedGolden, license: str) -> "tuple[Draft, list[str]]":
    """Return what is sent of a package, and a sentence for each thing that differs from it."""
    from fieldmark.packaging.draft import as_it_is, with_golden, with_license, with_short_paths

    draft, changes = as_it_is(package), []
    has_images = package.manifest.golden.kind == "data" and package.manifest.golden.count > 0
    if golden == "none" and package.manifest.golden.count:
        draft = with_golden(draft, None)
        changes.append("golden samples: left out")
    elif golden == "synthetic" and has_images:
        require("torch", "train", "drawing golden samples (else: --golden none, or --golden keep)")
        from fieldmark.evaluation.redraw import redraw_golden

        draft = redraw_golden(draft)
        changes.append("golden samples: drawn ones in the place of real images")
    shorter, paths = with_short_paths(draft)
    if paths and golden == "keep":
        warn(f"the package names folders of this machine: {'; '.join(paths)}")
    elif paths:
        draft = shorter
        changes.append(f"paths: reduced to their last parts: {'; '.join(paths)}")
    if license:
        draft = with_license(draft, license)
        if license != package.manifest.license:
            changes.append(f"licence: {license}, before: {package.manifest.license or 'none'}")
    _warn_of_variants(package, draft)
    return draft, changes


def _warn_of_variants(package: "Package", draft: "Draft") -> None:
    """Say which cannot be deployed as they are sent, though they can here, and which name paths."""
    for name, variant in draft.manifest.variants.items():
        if variant.kind == "torchscript":  # its file cannot change without being measured anew
            warn(f"variant {name!r} names the folders that torch and fieldmark are installed in")
        if package.manifest.variants[name].deployable and not variant.deployable:
            why = " ".join(variant.obstacles())
            warn(f"variant {name!r} is not deployable as it is sent: {why}")


def _check_license(license: str, package: "Package", on_hub: bool) -> None:
    if license:
        return
    words = f"{package.path} must have a licence"
    if on_hub:
        raise ConfigError(f"{words} to be on the hub. Got none. Give it with --license NAME.")
    warn(f"{package.path} has no licence, so that others may not use it. --license NAME gives one")

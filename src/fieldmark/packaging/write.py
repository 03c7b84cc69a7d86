"""Writing a package, and changing one: at any moment the folder opens, as the old or the new.

New files come first, under names made of their content; then the manifest, by one rename; then
files that no manifest names any more are removed. `write_package` alone needs torch.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fieldmark import __version__
from fieldmark.errors import PackageError
from fieldmark.packaging.entries import (
    Confidence,
    Features,
    FileEntry,
    GoldenCheck,
    GraphEntry,
    Parity,
    Quantization,
    TensorEntry,
    Variant,
    VariantKind,
)
from fieldmark.packaging.folder import exchange, locked
from fieldmark.packaging.golden import GoldenSamples, read_golden
from fieldmark.packaging.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    TIMM_CONFIG,
    WEIGHTS,
    Manifest,
    Package,
    open_package,
    parse_manifest,
)
from fieldmark.preprocess import Preprocess
from fieldmark.runtime.files import read_json, sha256_bytes, sync_folder, write_atomic, write_json

if TYPE_CHECKING:
    from torch import nn

    from fieldmark.model import Architecture

_SUFFIXES: dict[VariantKind, str] = {
    "onnx": "onnx",
    "torchscript": "pt",
    "pt2": "pt2",
    "openvino": "xml",
}
_VARIANT_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_OURS = re.compile(r"[a-z0-9_-]+-[0-9a-f]{8}\.(onnx|pt2?|xml|bin)|\..*\.tmp")
# What timm records of a network and needs to adapt its weights to other heads and inputs.
_TIMM_TRAITS = ("first_conv", "classifier", "fixed_input_size")


def write_package(
    out: Path,
    *,
    network: "nn.Module",
    architecture: "Architecture",
    class_names: Sequence[str],
    preprocess: Preprocess,
    golden: GoldenSamples | None,
    golden_kind: Literal["data", "synthetic"],
    name: str,
    class_descriptions: Sequence[str] | None = None,
    training: Mapping[str, Any] | None = None,
    metrics: Mapping[str, Any] | None = None,
    license: str = "",
    source: str = "",
    confidence: Confidence | None = None,
    replace: bool = False,
) -> Package:
    """Return the package written to `out`: built beside it, then renamed.

    Args:
        network: what `architecture` builds, without normalisation in front.
        golden: made with this network; None: the package has none, and no variant is deployable.
        training: how the weights came about; plain JSON values, as are `metrics` (by split).
        source: where the weights come from, in words.
        confidence: fitted to the logits of this network.
        replace: put it in the place of an existing package.

    Raises:
        PackageError: `out` is in use or cannot be written, or the parts do not fit each other.
        ValueError: `training`, `metrics` or the architecture's arguments are not JSON, or NaN.
    """
    _check_target(out, replace)
    descriptions = list(class_descriptions or [""] * len(class_names))
    timm_config = _timm_config(
        network, architecture, preprocess, class_names, descriptions, license
    )
    files = {
        WEIGHTS: _weights(network),
        TIMM_CONFIG: _json_bytes(timm_config),
        **(golden.files() if golden else {}),
    }
    content = {
        **_origin(architecture),
        "name": name,
        "classes": [
            {"name": class_name, "description": description}
            for class_name, description in zip(class_names, descriptions, strict=True)
        ],
        "preprocess": preprocess.model_dump(mode="json"),
        "training": dict(training) if training is not None else None,
        "metrics": dict(metrics or {}),
        "golden": {"kind": golden_kind, "count": len(golden.encoded)}
        if golden
        else {"kind": "none", "count": 0},
        "confidence": None if confidence is None else confidence.model_dump(mode="json"),
        "variants": {},
        "files": {path: _file_entry(data).model_dump() for path, data in files.items()},
        "license": license,
        "source": source,
    }
    manifest = parse_manifest(_json_bytes(content), out / MANIFEST)
    with _writing(out):
        _write_and_place(out, files, manifest)
    return open_package(out)


def add_variant(
    path: Path,
    name: str,
    data: bytes,
    *,
    kind: VariantKind,
    opset: int | None = None,
    weights: bytes = b"",
    features: Features | None = None,
    graph: GraphEntry | None = None,
    written_by: str = "",
    quantization: Quantization | None = None,
) -> Package:
    """Return the package with an export added, or put in the place of an older one.

    The new variant has no measurements: those of an older one were of other bytes.

    Args:
        quantization: how it was made int8; None: it is float32.
        weights: the second file, of OpenVINO.
        features: of a graph whose second output is the last feature map.

    Raises:
        PackageError: not a package, one that cannot be written, or a bad name.
    """
    if not _VARIANT_NAME.fullmatch(name):
        raise PackageError(
            f"a variant's name must be lower-case letters, digits, '-' and '_'. Got {name!r}."
        )
    # One name for both files, so that OpenVINO itself finds the second beside the first.
    stem = f"variants/{name}-{sha256_bytes(data + weights)[:8]}"
    file = f"{stem}.{_SUFFIXES[kind]}"
    written = {file: data} | ({f"{stem}.bin": weights} if kind == "openvino" else {})
    with _changing(path) as package:
        spec, num_classes = package.preprocess, package.manifest.architecture.num_classes
        images = ("batch", spec.height_px, spec.width_px, 3)
        outputs = [TensorEntry(name="logits", dtype="float32", shape=("batch", num_classes))]
        if features is not None:
            shape = ("batch", *features.shape)
            outputs.append(TensorEntry(name="features", dtype="float32", shape=shape))
        variant = Variant(
            kind=kind,
            precision="float32" if quantization is None else "int8",
            file=file,
            weights_file=f"{stem}.bin" if kind == "openvino" else None,
            opset=opset,
            inputs=(TensorEntry(name="images", dtype="uint8", shape=images),),
            quantization=quantization,
            outputs=tuple(outputs),
            head=None if features is None else features.head,
            graph=graph,
            written_by=written_by,
        )
        (path / "variants").mkdir(exist_ok=True)
        for relative, content in written.items():
            write_atomic(path / relative, content)
        added = {relative: _file_entry(content) for relative, content in written.items()}
        return _commit(package, name, variant, added)


def record_parity(
    path: Path, name: str, *, file: str, golden: GoldenCheck, parity: Parity | None
) -> Package:
    """Return the package with a variant's measurements recorded; `parity` None keeps the earlier.

    Args:
        file: the variant's file at the time it was measured.

    Raises:
        PackageError: the variant is gone, or its file is another one now.
    """
    with _changing(path) as package:
        variant = package.manifest.variants.get(name)
        if variant is None or variant.file != file:
            raise PackageError(
                f"variant {name!r} of {path} must stay the same while it is measured. "
                f"It was changed meanwhile. Run: fieldmark verify {path}."
            )
        update: dict[str, Any] = {"golden": golden}
        if parity is not None:
            update["parity"] = parity
        return _commit(package, name, variant.model_copy(update=update), {})


def record_confidence(path: Path, confidence: Confidence, *, weights_sha256: str) -> Package:
    """Return the package with the temperature recorded, in the place of an earlier one.

    Args:
        weights_sha256: of the weights whose logits it was fitted to.

    Raises:
        PackageError: the package holds other weights now, or cannot be written.
    """
    with _changing(path) as package:
        if package.manifest.files[WEIGHTS].sha256 != weights_sha256:
            raise PackageError(
                f"{path} must keep its weights while confidence is calibrated. They were changed "
                f"meanwhile. Run: fieldmark calibrate {path}."
            )
        return _rewrite(package, {"confidence": confidence.model_dump(mode="json")})


@contextmanager
def _changing(path: Path) -> Iterator[Package]:
    """Hold the package's lock and yield it as it is under the lock."""
    open_package(path)  # before a lock file is put into a folder that is no package
    with _writing(path), locked(path):
        yield open_package(path)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Say in a sentence that the disk is full, or the folder read-only."""
    try:
        yield
    except OSError as error:
        raise PackageError(f"{path} cannot be written. {error.strerror or error}.") from error


def _commit(
    package: Package, name: str, variant: Variant, added: Mapping[str, FileEntry]
) -> Package:
    """Put `variant` into the manifest, and the files that it brings."""
    manifest = package.manifest
    variants = {**manifest.variants, name: variant}
    old = {file for entry in manifest.variants.values() for file in entry.files}
    kept = {file for entry in variants.values() for file in entry.files}
    files = {**manifest.files, **added}
    update = {
        "variants": {key: entry.model_dump(mode="json") for key, entry in variants.items()},
        "files": {key: files[key].model_dump() for key in files if key in kept or key not in old},
    }
    return _rewrite(package, update)


def _rewrite(package: Package, update: Mapping[str, Any]) -> Package:
    """Change the manifest's top-level keys by one rename, then remove what it no longer names."""
    content = package.manifest.model_dump(mode="json") | dict(update)
    changed = parse_manifest(_json_bytes(content), package.path / MANIFEST)
    write_json(package.path / MANIFEST, content)
    _remove_stale(package.path, changed)
    return open_package(package.path)


def _remove_stale(path: Path, manifest: Manifest) -> None:
    """Remove variants that the manifest does not name, and what a killed writer left."""
    for file in [*(path / "variants").glob("*"), *path.glob(f".{MANIFEST}.*.tmp")]:
        named = file.relative_to(path).as_posix() in manifest.files
        if not named and _OURS.fullmatch(file.name):
            file.unlink(missing_ok=True)


def _check_target(out: Path, replace: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise PackageError(f"{out} must be a folder. Got a file. Choose another name.")
    num_entries = sum(1 for _ in out.iterdir())
    if not num_entries:
        return
    if not replace:
        raise PackageError(
            f"{out} must be empty or not exist. Got {num_entries} entries. Choose another folder."
        )
    try:  # also a damaged package may be replaced, but never a folder of something else
        ours = "format_version" in read_json(out / MANIFEST)
    except (OSError, ValueError, TypeError):
        ours = False
    if not ours:
        raise PackageError(f"{out} must be a package to be replaced. Got another folder.")


def _write_and_place(out: Path, files: Mapping[str, bytes], manifest: Manifest) -> None:
    out = Path(os.path.abspath(out))  # "." has no name to build a sibling's from
    new = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(new, ignore_errors=True)
    try:
        new.mkdir(parents=True)
        for relative, data in files.items():
            (new / relative).parent.mkdir(exist_ok=True)
            write_atomic(new / relative, data)
        write_json(new / MANIFEST, manifest.model_dump(mode="json"))
        if manifest.golden.count:
            read_golden(open_package(new))  # what cannot be read back is never put in place
        if out.is_dir() and any(out.iterdir()):
            with locked(out):
                exchange(new, out)
        else:
            new.rename(out)
        sync_folder(out.parent)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _origin(architecture: "Architecture") -> dict[str, Any]:
    from fieldmark.model import opens_in  # brings torch, so not at the top

    return {
        "format_version": FORMAT_VERSION,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "fieldmark_version": __version__,
        "architecture": {
            "name": architecture.name,
            "num_classes": architecture.num_classes,
            "args": dict(architecture.args),
            "opens_in": opens_in(architecture.name),
        },
    }


def _weights(network: "nn.Module") -> bytes:
    from safetensors.torch import save

    # Copies, because safetensors refuses tensors that share memory or are not contiguous
    # (channels_last weights are not).
    state = {
        key: value.detach().to("cpu", copy=True).contiguous()
        for key, value in network.state_dict().items()
    }
    return save(state, metadata={"format": "pt"})


def _timm_config(
    network: "nn.Module",
    architecture: "Architecture",
    preprocess: Preprocess,
    class_names: Sequence[str],
    descriptions: Sequence[str],
    license: str,
) -> dict[str, Any]:
    """Return what timm.create_model("local-dir:PACKAGE") reads."""
    known: Mapping[str, Any] = getattr(network, "pretrained_cfg", None) or {}
    size = (3, preprocess.height_px, preprocess.width_px)
    config: dict[str, Any] = {
        "architecture": architecture.name,
        "num_classes": architecture.num_classes,
        "model_args": dict(architecture.args),
        "pretrained_cfg": {
            "input_size": size,
            "interpolation": preprocess.interpolation,
            "crop_pct": preprocess.crop_frac,
            "crop_mode": "center",
            "mean": preprocess.mean,
            "std": preprocess.std,
            "num_classes": architecture.num_classes,
            "license": license,
            **{trait: known[trait] for trait in _TIMM_TRAITS if known.get(trait) is not None},
        },
        "label_names": list(class_names),
    }
    if any(descriptions):
        config["label_descriptions"] = dict(zip(class_names, descriptions, strict=True))
    return config


def _file_entry(data: bytes) -> FileEntry:
    return FileEntry(sha256=sha256_bytes(data), bytes=len(data))


def _json_bytes(content: Any) -> bytes:
    return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False).encode()

"""What `info` says of a package, a run, or a data source."""

from pathlib import Path
from typing import Any

from fieldmark.errors import ConfigError, UnknownName
from fieldmark.packaging.manifest import Package, open_package
from fieldmark.runtime.files import read_json


def describe(target: str, pie: Path | None, columns: dict[str, str]) -> dict[str, Any]:
    """Return facts about a package or run (needs no torch), or about a data source.

    Args:
        pie: where to draw the class distribution of a data source.
        columns: image_column and label_column of an hf: source, "" where it has one of each.
    """
    path = Path(target)
    if (path / "manifest.json").is_file():
        facts = describe_package(open_package(path))
    elif (path / "config.json").is_file() and (path / "checkpoints").is_dir():
        facts = describe_run(path)
    elif path.is_dir():
        raise UnknownName(
            f"{target} must be a package, a run, or a data source. For a folder of images write "
            f"folder:{target}."
        )
    else:
        return describe_source(target, pie, columns)
    if pie is not None:
        raise ConfigError("--pie draws the classes of a data source. Got a package or a run.")
    return facts


def describe_package(package: Package) -> dict[str, Any]:
    """Return what a package's manifest records."""
    manifest = package.manifest
    package.check_files()
    return {
        "kind": "package",
        "name": manifest.name,
        "id": package.id,
        "created": manifest.created,
        "architecture": manifest.architecture.model_dump(mode="json"),
        "num_classes": manifest.architecture.num_classes,
        "class_names": list(package.class_names),
        "preprocess": manifest.preprocess.model_dump(mode="json"),
        "preprocess_digest": manifest.preprocess.digest(),
        "golden": manifest.golden.model_dump(mode="json"),
        "temperature": package.temperature,
        "confidence": None
        if manifest.confidence is None
        else manifest.confidence.model_dump(mode="json"),
        "variants": {
            name: variant.model_dump(mode="json")
            | {
                "bytes": package.num_bytes(variant),
                "deployable": variant.deployable,
                "obstacles": variant.obstacles(),
            }
            for name, variant in manifest.variants.items()
        },
        "metrics": dict(manifest.metrics),
        "training": manifest.training,
        "license": manifest.license,
        "source": manifest.source,
        "files": len(manifest.files),
        "bytes": sum(entry.bytes for entry in manifest.files.values()),
    }


def describe_run(path: Path) -> dict[str, Any]:
    """Return where a run stands."""
    checkpoints = sorted(p.name for p in (path / "checkpoints").glob("step-*.ckpt"))
    metrics = path / "metrics.json"
    return {
        "kind": "run",
        "config": read_json(path / "config.json"),
        "checkpoints": checkpoints,
        "has_package": (path / "package" / "manifest.json").is_file(),
        "metrics": read_json(metrics) if metrics.is_file() else None,
    }


def describe_source(spec: str, pie: Path | None, columns: dict[str, str]) -> dict[str, Any]:
    """Return class counts per split of a data source, drawing them where asked."""
    from fieldmark.data.counts import class_counts, save_pie
    from fieldmark.data.source import open_source

    source = open_source(spec, **columns)
    counts = class_counts(source.splits, source.class_names)
    if pie is not None:
        save_pie(pie, counts, title=spec)
    return {
        "kind": "source",
        "source": spec,
        "fingerprint": source.fingerprint,
        "num_classes": len(source.class_names),
        "num_images": {name: len(split) for name, split in source.splits.items()},
        "class_counts": counts,
    }

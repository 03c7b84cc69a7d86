"""A MODEL argument -> plain values: architecture, weights, classes, preprocessing.

MODEL is a package, a run (its package), `local-dir:PATH` (timm's folder format), `timm:NAME`, or a
file with a state dict together with an architecture.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from timm.data import ImageNetInfo, resolve_data_config

from fieldmark.errors import ModelError, PackageError, UnknownName, suggestion
from fieldmark.model import Architecture, Weights, build, takes_img_size
from fieldmark.packaging.manifest import Package, find_package, open_package
from fieldmark.preprocess import Preprocess
from fieldmark.runtime.files import read_json


@dataclass(frozen=True, slots=True)
class ResolvedModel:
    """All that is known of a model before anything is built."""

    name: str
    architecture: Architecture
    weights: Weights
    preprocess: Preprocess
    class_names: tuple[str, ...]  # empty: unknown
    class_descriptions: tuple[str, ...] | None
    license: str
    source: str  # where the weights come from
    package: Package | None = None

    @property
    def training(self) -> Mapping[str, Any] | None:
        """What the package records of its training."""
        return None if self.package is None else self.package.manifest.training

    def require_class_names(self) -> tuple[str, ...]:
        """Return the class names, or raise ModelError saying how to give them."""
        if not self.class_names:
            raise ModelError(
                f"the {self.architecture.num_classes} classes of {self.name} have no names. "
                "Give them with --classes FILE, one name a line in the order of the outputs."
            )
        return self.class_names


def resolve_model(
    text: str, *, arch: str = "", classes_file: Path | None = None, image_px: int = 0
) -> ResolvedModel:
    """Return what `text` names.

    Args:
        arch: the architecture of a state dict file.
        classes_file: class names, one a line, in the order of the outputs; overrides others.
        image_px: the input size of a state dict's network, where it is not its stock size.

    Raises:
        PackageError, ModelError, UnknownName: nothing that can be opened.
    """
    if text.startswith("timm:"):
        resolved = _from_timm(text.removeprefix("timm:"))
    elif text.startswith("local-dir:"):
        resolved = _from_folder(Path(text.removeprefix("local-dir:")), text)
    else:
        resolved = _from_path(Path(text), arch=arch, image_px=image_px)
    if classes_file is None:
        return resolved
    names = tuple(line.strip() for line in _lines(classes_file) if line.strip())
    if len(names) != resolved.architecture.num_classes or len(set(names)) != len(names):
        raise ModelError(
            f"{classes_file} must hold {resolved.architecture.num_classes} different class names, "
            f"one a line. Got {len(names)}, {len(set(names))} of them different."
        )
    return ResolvedModel(
        **{field: getattr(resolved, field) for field in resolved.__slots__}
        | {"class_names": names, "class_descriptions": None}
    )


def _from_path(path: Path, *, arch: str, image_px: int) -> ResolvedModel:
    package = find_package(path)
    if package is not None:
        return _from_package(open_package(package))
    if path.is_file():
        if not arch:
            raise ModelError(f"{path} is a file of weights: say which network with --arch NAME.")
        return _from_state_dict(path, arch, image_px)
    if (path / "config.json").is_file() and (path / "checkpoints").is_dir():
        raise PackageError(
            f"the run {path} has not ended, so it has no package. "
            f"Run: fieldmark train --resume --out {path}."
        )
    if path.is_dir():
        raise PackageError(
            f"{path} must be a package or a run. Found neither manifest.json nor package/. "
            f"For timm's folder format write local-dir:{path}."
        )
    raise PackageError(
        f"model {str(path)!r} does not exist. Give a package, a run, local-dir:PATH, timm:NAME, "
        "or a file of weights with --arch NAME."
    )


def _from_package(package: Package) -> ResolvedModel:
    manifest = package.manifest
    architecture = manifest.architecture
    descriptions = tuple(c.description for c in manifest.classes)
    package.check_files()
    return ResolvedModel(
        name=manifest.name,
        architecture=Architecture(architecture.name, architecture.num_classes, architecture.args),
        weights=Weights(architecture.num_classes, path=package.path / "model.safetensors"),
        preprocess=manifest.preprocess,
        class_names=package.class_names,
        class_descriptions=descriptions if any(descriptions) else None,
        license=manifest.license,
        source=manifest.source,
        package=package,
    )


def _from_folder(path: Path, text: str) -> ResolvedModel:
    config_path = path / "config.json"
    if not config_path.is_file():
        raise ModelError(f"{text} must be a folder with a config.json. Found none in {path}.")
    if (path / "manifest.json").is_file():
        return _from_package(open_package(path))
    try:
        config = read_json(config_path)
        name, num_classes = str(config["architecture"]), int(config["num_classes"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{config_path} must be timm's config.json with architecture and num_classes. {error}."
        ) from error
    args = dict(config.get("model_args") or {})
    args.pop("num_classes", None)
    cfg = config.get("pretrained_cfg") or {}
    labels = config.get("label_names") or ()
    described = config.get("label_descriptions") or {}
    names, descriptions = _class_names(num_classes, tuple(str(label) for label in labels))
    if isinstance(described, Mapping) and described:
        descriptions = tuple(str(described.get(n, n)) for n in names)
    return ResolvedModel(
        name=path.resolve().name,
        architecture=Architecture(name, num_classes, args),
        weights=Weights(num_classes, path=path),
        preprocess=_preprocess(cfg),
        class_names=names,
        class_descriptions=descriptions,
        license=str(cfg.get("license") or ""),
        source=text,
    )


def _from_timm(name: str) -> ResolvedModel:
    stock, _, tag = name.partition(".")
    if not timm.is_model(stock):
        raise UnknownName(f"model {stock!r} does not exist.{suggestion(stock, timm.list_models())}")
    if tag and name not in timm.list_models(stock + ".*", pretrained=True):
        tags = [n.partition(".")[2] for n in timm.list_models(stock + ".*", pretrained=True)]
        raise UnknownName(f"weights {tag!r} of {stock} do not exist.{suggestion(tag, tags)}")
    cfg = timm.get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise ModelError(f"timm has no weights for {stock}. Choose another name or a folder.")
    values = cfg.to_dict()
    num_classes = int(values["num_classes"])
    names, descriptions = _class_names(num_classes, ())
    return ResolvedModel(
        name=name,
        architecture=Architecture(stock, num_classes),
        weights=Weights(num_classes, tag=tag or str(values.get("tag") or "")),
        preprocess=_preprocess(values),
        class_names=names,
        class_descriptions=descriptions,
        license=str(values.get("license") or ""),
        source=f"timm:{name}",
    )


def _from_state_dict(path: Path, arch: str, image_px: int) -> ResolvedModel:
    stock, _, tag = arch.partition(".")
    if not timm.is_model(stock):
        raise UnknownName(f"model {stock!r} does not exist.{suggestion(stock, timm.list_models())}")
    cfg = timm.get_pretrained_cfg(arch)
    values = cfg.to_dict() if cfg is not None else {}
    num_classes = _num_classes_of(path, Architecture(stock, 2))
    spec = _preprocess(values)
    if image_px:
        spec = spec.model_copy(update={"height_px": image_px, "width_px": image_px})
    names, descriptions = _class_names(num_classes, ())
    args = {"img_size": image_px} if image_px and takes_img_size(stock) else {}
    return ResolvedModel(
        name=path.stem,
        architecture=Architecture(stock, num_classes, args),
        weights=Weights(num_classes, path=path),
        preprocess=spec,
        class_names=names,
        class_descriptions=descriptions,
        license="",
        source=str(path),
    )


def _num_classes_of(path: Path, architecture: Architecture) -> int:
    """Read how many classes a state dict has, from the rows of its head."""
    from timm.models import load_state_dict

    try:
        state = load_state_dict(str(path), device="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  (a damaged file raises nearly anything)
        reason = " ".join(str(error).split())[:160]
        raise ModelError(f"{path} must be a state dict. {reason}.") from error
    network: Any = build(architecture)
    head = {id(p) for p in network.get_classifier().parameters()}
    for name, parameter in network.named_parameters():
        if id(parameter) in head and name in state:
            return int(state[name].shape[0])
    raise ModelError(
        f"{path} must be a state dict of {architecture.name}. It lacks that network's head."
    )


def _class_names(
    num_classes: int, given: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...] | None]:
    """Return the names given, else ImageNet's (wnid and lemma) for 1,000 outputs, else none."""
    if len(given) == num_classes:
        return tuple(given), None
    if num_classes != 1000:
        return (), None
    info = ImageNetInfo()
    names = tuple(info.label_names())
    return names, tuple(str(info.label_name_to_description(name)) for name in names)


def _preprocess(cfg: Mapping[str, Any]) -> Preprocess:
    """Return the spec of timm's evaluation transform for a pretrained_cfg."""
    mode = cfg.get("crop_mode") or "center"
    if mode != "center":
        raise ModelError(f"crop_mode of the weights must be 'center'. Got {mode!r}.")
    values = resolve_data_config({}, pretrained_cfg=dict(cfg))
    channels, height, width = values["input_size"]
    if channels != 3:
        raise ModelError(f"the network must take 3 channels. Got {channels}.")
    return Preprocess(
        height_px=height,
        width_px=width,
        crop_frac=values["crop_pct"],
        interpolation=values["interpolation"],
        mean=tuple(values["mean"]),
        std=tuple(values["std"]),
    )


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ModelError(f"--classes {path} cannot be read: {error.strerror}.") from error

"""What training starts from: the network with its weights, the preprocessing, the batches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fieldmark.config import (
    AugmentConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    TrainConfig,
    without_idle,
)
from fieldmark.data.loader import FileBatches
from fieldmark.data.policy import facts_of, needs_facts, resolve_augment
from fieldmark.data.resident import ResidentBatches, fits_resident, load_resident
from fieldmark.data.source import Split
from fieldmark.data.split import Splits, check_held_out
from fieldmark.errors import ConfigError, DataError, ImageError, ModelError
from fieldmark.model import (
    Architecture,
    adapt_architecture,
    build,
    check_image_size,
    freeze_backbone,
    takes_img_size,
)
from fieldmark.packaging.resolve import ResolvedModel
from fieldmark.preprocess import Preprocess
from fieldmark.runtime.log import say, warn
from fieldmark.runtime.seed import derive_seed
from fieldmark.training.session import Batches

NORMALISATION_SAMPLE = 2_000  # images whose pixels the normalisation is measured on, when on disk
WHITENING_SAMPLE = 5_000
# Where images are large, fewer of them: a sample must not take more memory than the training.
NORMALISATION_PIXELS = NORMALISATION_SAMPLE * 224 * 224
WHITENING_PIXELS = WHITENING_SAMPLE * 64 * 64
_DEFAULT_PX = 224
_SMALL_PX = 64

BROKEN = "broken "  # kind of the decision that records a broken image, before its name

Decide = Callable[[str, Any, str], Any]
"""kind, value, why -> the value decided the first time."""

LeaveOut = Callable[[str, str], None]
"""Told of each broken image: kind of the decision, reason."""

Normalisation = tuple[tuple[float, float, float], tuple[float, float, float]]


@dataclass(frozen=True, slots=True)
class TrainImages:
    """The train split as it will be read, with the preprocessing that goes with it."""

    preprocess: Preprocess
    split: Split
    pixels: npt.NDArray[np.uint8] | None  # (N, H, W, 3) when resident
    labels: npt.NDArray[np.int64] | None  # those of `pixels`: broken images are left out
    augment: AugmentConfig  # what was decided: policy "custom", every key filled


def load_train_images(
    split: Split,
    *,
    data: DataConfig,
    augment: AugmentConfig,
    model: ModelConfig,
    evaluation: EvalConfig,
    pretrained: ResolvedModel | None,
    decide: Decide,
    leave_out: LeaveOut,
) -> TrainImages:
    """Decide size, normalisation, augmentation and storage; decode the images where they fit."""
    spec = preprocess_of(split, model, evaluation, pretrained)
    augment = decide_augment(
        augment, split, spec, data, decide, is_pretrained=pretrained is not None
    )
    resident = fits_resident(split, spec, augment, data)
    storage = decide("storage", "resident" if resident else "files", f"data.storage={data.storage}")
    pixels = labels = None
    if storage == "resident":
        pixels, labels, broken = load_resident(split, spec, data.max_resident_mb * 2**20)
        report_broken(broken, len(split), data.max_broken_frac, leave_out)
    if pretrained is None:
        sample = pixels if pixels is not None else _sample_pixels(split, spec)
        measured = decide("normalisation", measure_normalisation(sample), "of the train images")
        mean, std = (tuple(values) for values in measured)
        spec = spec.model_copy(update={"mean": mean, "std": std})
    return TrainImages(spec, split, pixels, labels, augment)


def preprocess_of(
    split: Split, model: ModelConfig, evaluation: EvalConfig, pretrained: ResolvedModel | None
) -> Preprocess:
    """Return the spec with the weights' normalisation, or with a placeholder to be measured."""
    if pretrained is not None:
        spec = pretrained.preprocess
    else:
        native_px = _native_px(split)
        px = native_px if 0 < native_px <= _SMALL_PX else _DEFAULT_PX
        spec = Preprocess(height_px=px, width_px=px, mean=(0, 0, 0), std=(1, 1, 1))
    return _with_changes(spec, model, evaluation)


def _with_changes(spec: Preprocess, model: ModelConfig, evaluation: EvalConfig) -> Preprocess:
    """Return a specification with what the configuration changes of it."""
    changes: dict[str, object] = {}
    if evaluation.scaled_decoding:
        changes["scaled_decoding"] = True
    if model.image_px:
        changes |= {"height_px": model.image_px, "width_px": model.image_px}
    if evaluation.crop_frac:
        changes["crop_frac"] = evaluation.crop_frac
    if evaluation.interpolation != "auto":
        changes["interpolation"] = evaluation.interpolation
    return spec.model_copy(update=changes)


def decide_augment(
    augment: AugmentConfig,
    split: Split,
    preprocess: Preprocess,
    data: DataConfig,
    decide: Decide,
    *,
    is_pretrained: bool = False,
) -> AugmentConfig:
    """Return what the policy means for these images, and say it; a resumed run keeps it."""
    facts = None
    if needs_facts(augment):
        facts = facts_of(
            split,
            preprocess,
            must_be_resident=data.storage == "resident",
            is_pretrained=is_pretrained,
        )
    resolved, line = resolve_augment(augment, facts)
    say(line)
    decided = decide("augment", resolved.model_dump(mode="json"), line)
    return AugmentConfig.model_validate(without_idle(AugmentConfig, decided))


def pretrained_preprocess(
    model: ModelConfig, evaluation: EvalConfig, pretrained: ResolvedModel
) -> Preprocess:
    """Return the preprocessing of pretrained weights, with what the configuration changes."""
    return _with_changes(pretrained.preprocess, model, evaluation)


def check_splits(
    splits: Splits,
    preprocess: Preprocess,
    max_broken_frac: float,
    decide: Decide,
    leave_out: LeaveOut,
) -> Splits:
    """Return the splits with every held-out image known to decode; records where each is from."""
    splits = check_held_out(splits, preprocess)
    report_broken(list(splits.broken), len(splits.train), max_broken_frac, leave_out)
    for name, origin in splits.origin.items():
        decide(f"split {name}", len(splits.parts().get(name, ())), origin)
    return splits


def make_network(
    config: ModelConfig,
    *,
    pretrained: ResolvedModel | None,
    class_names: tuple[str, ...],
    image_px: int,
    seed: int,
) -> tuple[nn.Module, Architecture]:
    """Return the network to train and what rebuilds it; says how a stem was adapted.

    Raises:
        ModelError: architecture, weights and input size do not fit each other.
    """
    num_classes = len(class_names)
    args = dict(config.args)
    for name in ("drop_rate", "drop_path_rate"):
        if getattr(config, name):
            args[name] = getattr(config, name)
    torch.manual_seed(derive_seed(seed, "initialisation"))
    if pretrained is None:
        wanted = Architecture(config.arch, num_classes, args)
        architecture, note = adapt_architecture(wanted, image_px, config.small_input)
        if architecture == wanted and takes_img_size(config.arch):
            architecture = Architecture(config.arch, num_classes, {"img_size": image_px, **args})
        if note:
            say(note)
        network = build(architecture)
    else:
        architecture = _pretrained_architecture(config, pretrained, num_classes, args, image_px)
        network = build(architecture, pretrained.weights)
        if pretrained.class_names == class_names:
            say(f"the head of {pretrained.name} is kept: its classes are the same")
        else:
            network.reset_classifier(num_classes)  # type: ignore[operator]
            say(f"{pretrained.name} gets a new head for {num_classes} classes")
    check_image_size(network, image_px)
    if config.freeze == "backbone":
        freeze_backbone(network)
    return network, architecture


def initialise_from_images(network: nn.Module, images: TrainImages) -> None:
    """Set the weights that a new network takes from its images, such as whitening filters."""
    initialise = getattr(network, "init_from_images", None)
    if initialise is not None:
        initialise(_normalised_sample(images))


def make_batches(
    images: TrainImages,
    *,
    leave_out: LeaveOut,
    data: DataConfig,
    augment: AugmentConfig,
    train: TrainConfig,
    num_classes: int,
    device: torch.device,
    image_px: Callable[[int], int] | None = None,
    rank: int = 0,
    num_ranks: int = 1,
) -> Batches:
    """Return training batches from memory or from files.

    Args:
        leave_out: told of each broken image, by kind of decision and reason.
        augment: a policy other than "custom" stands for what was decided for these images.
        image_px: update from 0 -> short side of its images in px; default: always the same.
        rank: of this process among `num_ranks`.
    """
    if augment.policy != "custom":
        augment = images.augment
    if images.pixels is not None and images.labels is not None:
        return ResidentBatches(
            images.pixels,
            images.labels,
            augment=augment,
            mean=images.preprocess.mean,
            std=images.preprocess.std,
            batch_size=train.examples_per_update,
            accumulation_steps=train.accumulation_steps,
            rank=rank,
            num_ranks=num_ranks,
            seed=train.seed,
            num_classes=num_classes,
            sampler=data.sampler,
            repeats=data.repeats,
            image_px=image_px,
            device=device,
            channels_last=train.channels_last,
        )

    def skip(name: str, reason: str) -> None:
        warn(f"skipped {name}: {reason}")
        leave_out(BROKEN + name, reason)

    return FileBatches(
        images.split,
        images.preprocess,
        augment=augment,
        batch_size=train.examples_per_update,
        accumulation_steps=train.accumulation_steps,
        rank=rank,
        num_ranks=num_ranks,
        seed=train.seed,
        num_classes=num_classes,
        sampler=data.sampler,
        repeats=data.repeats,
        image_px=image_px,
        num_workers=data.num_workers,
        max_broken_frac=data.max_broken_frac,
        on_broken=skip,
        device=device,
        channels_last=train.channels_last,
    )


def measure_normalisation(pixels: npt.NDArray[np.uint8]) -> Normalisation:
    """Return mean and std of each channel of uint8 (N, H, W, 3), as fractions, to 4 decimals."""
    count = np.zeros(3)
    total, squares = np.zeros(3), np.zeros(3)
    at_once = max(1, 2_000 * 32 * 32 * 3 // pixels[0].size)  # as float64 eight times as large
    for start in range(0, len(pixels), at_once):
        chunk = pixels[start : start + at_once]
        flat = chunk.reshape(-1, 3).astype(np.float64) / 255.0
        total += flat.sum(axis=0)
        squares += np.square(flat).sum(axis=0)
        count += len(flat)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    std = np.maximum(std, 1 / 255)  # a constant channel would be divided by zero
    return _triple(mean), _triple(std)


def report_broken(
    broken: list[tuple[str, str]],
    total: int,
    max_frac: float,
    leave_out: LeaveOut,
) -> None:
    """Name the images that were left out of training; too many are an error.

    Raises:
        DataError: the share of broken images is above data.max_broken_frac.
    """
    for name, reason in broken:
        leave_out(BROKEN + name, reason)
    for name, reason in broken[:20]:
        warn(f"skipped {name}: {reason}")
    if len(broken) > 20:
        warn(f"skipped {len(broken) - 20} more broken images")
    if len(broken) > max_frac * total:
        raise DataError(
            f"at most {max_frac:.1%} of the train images may be broken (data.max_broken_frac). "
            f"Got {len(broken)} of {total}, the first {broken[0][0]!r}."
        )


def _triple(values: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    a, b, c = (round(float(value), 4) for value in values)
    return a, b, c


def _native_px(split: Split) -> int:
    """The largest side in a seeded sample of images; 0 when none of them can be read."""
    rng = np.random.default_rng(derive_seed("native size"))
    largest = 0
    for index in rng.permutation(len(split))[:32]:
        try:
            largest = max(largest, *split.images.image(int(index)).size)
        except ImageError:
            continue
    return largest


def _sample_pixels(split: Split, spec: Preprocess) -> npt.NDArray[np.uint8]:
    rng = np.random.default_rng(derive_seed("normalisation"))
    at_most = max(1, NORMALISATION_PIXELS // (spec.height_px * spec.width_px))
    chosen = rng.permutation(len(split))[: min(NORMALISATION_SAMPLE, at_most)]
    sample = split.subset(np.sort(chosen), split.name)
    pixels, _, _ = load_resident(sample, spec, len(sample) * spec.height_px * spec.width_px * 3)
    return pixels


def _normalised_sample(images: TrainImages) -> torch.Tensor:
    pixels = images.pixels
    if pixels is None:
        pixels = _sample_pixels(images.split, images.preprocess)
    at_most = max(1, WHITENING_PIXELS // pixels[0, :, :, 0].size)
    x_BHWC = torch.from_numpy(pixels[: min(WHITENING_SAMPLE, at_most)].astype(np.float32)) / 255.0
    mean, std = torch.tensor(images.preprocess.mean), torch.tensor(images.preprocess.std)
    return ((x_BHWC - mean) / std).permute(0, 3, 1, 2)


def _pretrained_architecture(
    config: ModelConfig,
    pretrained: ResolvedModel,
    num_classes: int,
    args: dict[str, object],
    image_px: int,
) -> Architecture:
    name = pretrained.architecture.name
    if config.arch and config.arch != name:
        raise ConfigError(
            f"model.arch must be that of model.pretrained, {name!r}. Got {config.arch!r}. "
            "Leave model.arch empty."
        )
    if config.small_input == "always":
        raise ModelError(
            f"model.small_input=always would replace the stem that {pretrained.name} was trained "
            "with. Set model.small_input=auto, or train without model.pretrained."
        )
    merged = {**pretrained.architecture.args, **args}
    if image_px != pretrained.preprocess.height_px and takes_img_size(name):
        merged["img_size"] = image_px  # position embeddings are resampled to it
    return Architecture(name, num_classes, merged)

"""Augmented images as the network will receive them, before anything is trained."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fieldmark.config import (
    AugmentConfig,
    DataConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    override,
)
from fieldmark.cookbook import load_recipe
from fieldmark.data.grid import View, save_grid
from fieldmark.data.images import prepare
from fieldmark.data.labelled import Labels, Split
from fieldmark.data.order import epoch_order
from fieldmark.data.policy import describe
from fieldmark.data.resident import fits_resident, load_resident
from fieldmark.data.sizes import image_px_at
from fieldmark.data.source import open_source
from fieldmark.data.split import make_splits
from fieldmark.errors import ConfigError
from fieldmark.packaging.resolve import ResolvedModel
from fieldmark.preprocess import Pixels, Preprocess
from fieldmark.runtime.seed import derive_seed
from fieldmark.training.prepare import (
    TrainImages,
    decide_augment,
    make_batches,
    measure_normalisation,
    preprocess_of,
)

NUM_VIEWS = 8  # of each image
_SAMPLE = 256  # images that the normalisation is measured on
_MIXED = 0.01  # of a label, below which it is not named


def preview_config(source: str, recipe: str, settings: Sequence[str]) -> RunConfig:
    """Return the recipe's configuration for this source; without a recipe, policy auto alone."""
    if recipe:
        return override(load_recipe(recipe), [f"data.source={source}", *settings])
    plain = RunConfig(
        data=DataConfig(source=source),
        augment=AugmentConfig(policy="auto"),
        model=ModelConfig(arch="resnet18"),
        train=TrainConfig(epochs=1),
    )
    return override(plain, settings)


def draw_preview(
    out: Path, config: RunConfig, pretrained: ResolvedModel | None, *, num_rows: int
) -> dict[str, Any]:
    """Write the grid, and return what was decided: the values of all keys, and a line on them.

    Each column is one update of training on the images shown, so mixing partners are among them.
    With augment.sizes, the columns stand for a whole run.
    """
    if not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out} must be in a folder that exists. Make it first.")
    data = config.data
    source = open_source(
        data.source, image_column=data.image_column, label_column=data.label_column
    )
    splits = make_splits(
        source, val_frac=data.val_frac, test_frac=data.test_frac, split_seed=data.split_seed
    )
    why: list[str] = []

    def decide(kind: str, value: Any, reason: str) -> Any:
        why.append(reason)
        return value

    spec = preprocess_of(splits.train, config.model, config.eval, pretrained)
    augment = decide_augment(
        config.augment, splits.train, spec, data, decide, is_pretrained=pretrained is not None
    )
    resident = fits_resident(splits.train, spec, augment, data)
    if pretrained is None:
        spec = _normalised(splits.train, spec)
    chosen = _one_of_each(splits.train.labels, num_rows, config.train.seed)
    shown = splits.train.subset(chosen, "train")
    rows = _rows(shown, spec, augment, config, resident, splits.class_names)
    columns = ["as evaluated", *(f"view {index + 1}" for index in range(NUM_VIEWS))]
    save_grid(out, rows, columns, title=f"{data.source}: {why[0]}")
    return {
        "augment": augment.model_dump(mode="json"),
        "applied": describe(augment),
        "why": why[0],
        "storage": "resident" if resident else "files",
        "image_px": [spec.height_px, spec.width_px],
        "rows": len(rows),
        "views": NUM_VIEWS,
    }


def _normalised(split: Split, spec: Preprocess) -> Preprocess:
    """The spec with the normalisation of a sample; training measures it on more images."""
    rng = np.random.default_rng(derive_seed("preview", len(split)))
    sample = split.subset(np.sort(rng.permutation(len(split))[:_SAMPLE]), split.name)
    pixels, _, _ = load_resident(sample, spec, len(sample) * spec.height_px * spec.width_px * 3)
    mean, std = measure_normalisation(pixels)
    return spec.model_copy(update={"mean": mean, "std": std})


def _one_of_each(labels: Labels, num_rows: int, seed: int) -> Labels:
    """Positions of images at random, of as many classes as there are rows."""
    order = epoch_order(len(labels), derive_seed("preview rows", seed), 0)
    turn = np.zeros(len(order), dtype=np.int64)  # how many of the same class came before
    seen: dict[int, int] = {}
    for place, label in enumerate(labels[order].tolist()):
        turn[place] = seen.get(label, 0)
        seen[label] = turn[place] + 1
    taken = order[np.argsort(turn, kind="stable")[:num_rows]]
    return taken[np.argsort(labels[taken], kind="stable")]


def _rows(
    shown: Split,
    spec: Preprocess,
    augment: AugmentConfig,
    config: RunConfig,
    resident: bool,
    class_names: Sequence[str],
) -> list[list[View]]:
    count = len(shown)
    originals = [prepare(shown.images, index, spec) for index in range(count)]
    pixels = np.stack(originals) if resident else None
    labels = shown.labels if resident else None
    batches = make_batches(
        TrainImages(spec, shown, pixels, labels, augment),
        leave_out=lambda _kind, _reason: None,
        # Each update shows all rows once.
        data=config.data.model_copy(update={"sampler": "shuffle", "repeats": 1, "num_workers": 0}),
        augment=augment,
        train=config.train.model_copy(update={"batch_size": count, "accumulation_steps": 1}),
        num_classes=len(class_names),
        device=torch.device("cpu"),
        image_px=partial(_view_px, augment.sizes, default_px=min(spec.height_px, spec.width_px)),
    )
    names = [class_names[int(label)] for label in shown.labels]
    rows = [[View(original, name)] for original, name in zip(originals, names, strict=True)]
    for view, (images, targets) in zip(range(NUM_VIEWS), batches.batches(0), strict=False):
        for place, row in enumerate(epoch_order(count, config.train.seed, view)):
            caption = _caption(targets[place], class_names)
            rows[row].append(View(_to_pixels(images[place], spec), caption))
    return rows


def _view_px(sizes: Sequence[tuple[float, int]], view: int, *, default_px: int) -> int:
    return image_px_at(sizes, view, NUM_VIEWS, default_px)


def _to_pixels(image_CHW: Tensor, spec: Preprocess) -> Pixels:
    """Undo the normalisation; noise beyond black and white is cut off."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (spec.mean, spec.std))
    levels = (image_CHW * std + mean).mul(255).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(1, 2, 0).numpy()


def _caption(target: Tensor, class_names: Sequence[str]) -> str:
    """Name a view's class, or the shares of the two that are mixed."""
    if target.ndim == 0:
        return class_names[int(target)]
    shares = sorted(
        ((float(share), name) for share, name in zip(target, class_names, strict=True)),
        reverse=True,
    )
    named = [(share, name) for share, name in shares[:2] if share >= _MIXED]
    if len(named) == 1:
        return named[0][1]
    return "\n".join(f"{name}: {share:.0%}" for share, name in named)

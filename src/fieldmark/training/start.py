"""From a recipe, or a run to resume, to a session in front of its next update."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fieldmark.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from fieldmark.cookbook import load_recipe
from fieldmark.data.loader import prefetched_bytes
from fieldmark.data.sizes import size_at
from fieldmark.data.source import open_source
from fieldmark.data.split import Splits, make_splits
from fieldmark.errors import ConfigError, DataError, ModelError
from fieldmark.model import Architecture
from fieldmark.packaging.resolve import ResolvedModel, resolve_model
from fieldmark.runtime.log import say, warn
from fieldmark.training.batch_size import out_of_memory_explained, settle_batch_size
from fieldmark.training.capacity import (
    Run,
    check_memory,
    copies_bytes,
    rehearsal,
    validation_rehearsal,
)
from fieldmark.training.cost import training_flops
from fieldmark.training.device import autocast, pick_device, prepare, settle_precision
from fieldmark.training.features import frozen_digest, linear_head
from fieldmark.training.hardest import PROXY_SHARE, proxy_network
from fieldmark.training.losses import make_loss
from fieldmark.training.norm_statistics import check_norms, settle_freeze, settled
from fieldmark.training.optim import make_optimizer
from fieldmark.training.parts import Parts
from fieldmark.training.plan import Plan
from fieldmark.training.prepare import (
    TrainImages,
    check_splits,
    initialise_from_images,
    load_train_images,
    make_network,
    pretrained_preprocess,
)
from fieldmark.training.probe import ReadyProbe
from fieldmark.training.processes import local_world
from fieldmark.training.ranks import Ranks
from fieldmark.training.run_folder import RunFolder, default_folder, describe_environment
from fieldmark.training.session import Session, TrainResult, Validate

MakeValidation = Callable[..., Validate | None]


def open_run(
    recipe: str, settings: Sequence[str], out: Path | None, resume: bool, ranks: Ranks
) -> RunFolder:
    """Return a new run of the recipe, or the one in `out` to go on with."""

    def open_first() -> RunFolder:
        if resume:
            return RunFolder.open(_resumed_folder(recipe, settings, out))
        config = load_recipe(recipe, settings)
        return RunFolder.create(out or default_folder(config.name), config)

    return RunFolder.shared(ranks, open_first)


@dataclass(frozen=True)
class Ready:
    """A run in front of its first update."""

    session: Session
    splits: Splits
    images: TrainImages
    architecture: Architecture
    pretrained: ResolvedModel | None
    make_update: Callable[[], Run]  # a rehearsal of the update, for when memory runs out
    pflop_per_image: float | None  # of training, the mean over image sizes; None: not countable

    def fit(self) -> TrainResult:
        """Train to the end; a GPU that has no room is told with the largest update that fits."""
        train = self.session.train
        with out_of_memory_explained(
            lambda num_images: self.make_update()(num_images),
            batch_size=train.examples_per_update,
            accumulation_steps=train.accumulation_steps,
            num_ranks=self.session.rule.ranks.world,
        ):
            return self.session.fit()

    def cost(self, step: int) -> dict[str, Any]:
        """Return what training to update `step` costs: images, and 1e15 operations."""
        images = step * self.session.train.examples_per_update
        pflop = self.pflop_per_image
        return {"images": images, "pflop": None if pflop is None else round(pflop * images, 6)}


def start_session(run: RunFolder, config: RunConfig, make_validation: MakeValidation) -> Ready:
    """Open the data, build the network, restore the newest checkpoint.

    Args:
        make_validation: from the validation split to what measures a network on it.
    """
    device = pick_device(config.train.device)
    settled = settle_precision(config.train, device, run.decide_once)
    config = config.model_copy(update={"train": settled})
    data, train = config.data, config.train
    threads = prepare(train, device)
    environment = describe_environment(device, threads, run.ranks.world)
    for difference in run.check_environment(environment):
        warn(f"the run began elsewhere, so its last bits may differ: {difference}")
    splits = _open_splits(run, data)
    pretrained = resolve_pretrained(config.model)
    images = load_train_images(
        splits.train,
        data=data,
        augment=config.augment,
        model=config.model,
        evaluation=config.eval,
        pretrained=pretrained,
        decide=run.decide,
        leave_out=run.leave_out,
    )
    splits = check_splits(
        splits, images.preprocess, data.max_broken_frac, run.decide, run.leave_out
    )
    run.exchange()
    run.must_agree(_num_readable(images, splits), "images")
    say(f"run {run.path}: {splits.sizes()}, {device.type}, {threads} threads")
    network, architecture, model = _network(run, config, images, splits, pretrained)
    config = config.model_copy(update={"model": model})
    class_counts = np.bincount(
        splits.train.labels if images.labels is None else images.labels,
        minlength=len(splits.class_names),
    ).tolist()
    # Before memory is measured, as its images may stay there.
    validate = make_validation(
        splits.val,
        images.preprocess,
        batch_size=config.eval.batch_size,
        max_bytes=data.max_resident_mb * 2**20,
        device=device,
        rank=run.ranks.rank,
        num_ranks=run.ranks.world,
        gather=run.ranks.gather,
    )
    make_update = partial(_rehearsal, config, images, network.to(device), class_counts, device)
    train = _settle_memory(run, config, images, splits, network, make_update, device)
    pflop = _pflop_per_image(network, images, config)
    parts = Parts(run, config.model_copy(update={"train": train}), images, splits, class_counts)
    session = parts.session(network, validate, device)
    ready = Ready(session, splits, images, architecture, pretrained, make_update, pflop)
    say(_cost_sentence(session.plan, ready.cost(session.plan.total)))
    return ready


def _network(
    run: RunFolder,
    config: RunConfig,
    images: TrainImages,
    splits: Splits,
    pretrained: ResolvedModel | None,
) -> tuple[nn.Module, Architecture, ModelConfig]:
    """Return the network in front of training, what rebuilds it, and the section as settled."""
    spec = images.preprocess
    network, architecture = make_network(
        config.model,
        pretrained=pretrained,
        class_names=splits.class_names,
        image_px=spec.height_px,
        seed=config.train.seed,
    )
    if pretrained is None:
        initialise_from_images(network, images)
    settled_model = settle_freeze(
        config.model,
        config.train,
        network,
        height_px=spec.height_px,
        width_px=spec.width_px,
        num_ranks=run.ranks.world,
        decide_once=run.decide_once,
    )
    return network, architecture, settled_model


def _pflop_per_image(network: nn.Module, images: TrainImages, config: RunConfig) -> float | None:
    kept = config.data.keep_hardest_frac
    spec = images.preprocess
    sizes = [
        (begin, size_at(px, spec.height_px, spec.width_px))
        for begin, px in images.augment.sizes or ((0.0, None),)
    ]
    try:
        flops = kept * training_flops(network, sizes, num_images=1, freeze=settled(config.model))
        if kept < 1:
            flops += PROXY_SHARE * training_flops(proxy_network(10, 0), sizes, num_images=1)
        return flops / 1e15
    except (NotImplementedError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        warn(f"the operations of this network cannot be counted: {reason}")
        return None


def _cost_sentence(plan: Plan, cost: dict[str, Any]) -> str:
    pflop = "" if cost["pflop"] is None else f", {cost['pflop']:.3g} PFLOP"
    epochs = plan.total / plan.steps_per_epoch
    return f"{plan.total} updates ({epochs:.3g} epochs), {cost['images']:,} images{pflop}"


def _num_readable(images: TrainImages, splits: Splits) -> dict[str, int]:
    """Return how many images of each split decode."""
    found = {name: len(part) for name, part in splits.parts().items()}
    return found if images.labels is None else found | {"train": len(images.labels)}


def _rehearsal(
    config: RunConfig,
    images: TrainImages,
    network: nn.Module,
    class_counts: Sequence[int],
    device: torch.device,
) -> Run:
    """Return a run of updates, at the largest size that training shows, on a copy."""
    return rehearsal(
        network,
        make_optimizer=partial(make_optimizer, config=config.optim),
        loss_fn=make_loss(config.loss, class_counts=class_counts),
        autocast=partial(autocast, config.train, device),
        freeze=settled(config.model),
        image_shape=(3, *_side(images, max)),
        channels_last=config.train.channels_last,
    )


def _side(images: TrainImages, which: Callable[..., int | None]) -> tuple[int, int]:
    """Return height and width of the images that training shows when they are max or min."""
    spec = images.preprocess
    sides = [px for _, px in images.augment.sizes]
    return size_at(which(sides, default=None), spec.height_px, spec.width_px)


def _settle_memory(
    run: RunFolder,
    config: RunConfig,
    images: TrainImages,
    splits: Splits,
    network: nn.Module,
    make_update: Callable[[], Run],
    device: torch.device,
) -> TrainConfig:
    """Return the section with its batch size as a number, once it is known to fit."""
    spec = images.preprocess
    update = make_update()
    ranks = run.ranks
    train = settle_batch_size(
        config.train,
        update,
        num_ranks=ranks.world,
        num_updates=2,
        num_images=len(images.split if images.labels is None else images.labels),
        device=device,
        decide_once=run.decide_once,
    )
    validation = None
    if splits.val is not None:
        validation = validation_rehearsal(network, (3, spec.height_px, spec.width_px))
    at_a_time = train.examples_per_update // (train.accumulation_steps * ranks.world)
    height_px, width_px = _side(images, min)
    check_norms(
        settled(config.model),
        network,
        num_images=at_a_time * (ranks.world if train.sync_batch_norm else 1),
        height_px=height_px,
        width_px=width_px,
    )
    workers = config.data.num_workers if images.pixels is None else 0
    read_ahead = prefetched_bytes(workers, at_a_time, _side(images, max))
    num_averages = bool(train.ema_decay) + bool(config.optim.lookahead_steps)
    check_memory(
        train,
        update,
        validation,
        eval_batch_size=config.eval.batch_size,
        device=device,
        beside_bytes=read_ahead + copies_bytes(network, num_averages=num_averages),
        num_ranks=ranks.world,
        ranks_here=local_world(),
    )
    return train


def start_probe(run: RunFolder, config: RunConfig) -> ReadyProbe:
    """Open the data and build the network with a new head, for train.method=linear-probe."""
    device = pick_device(config.train.device)
    threads = prepare(config.train, device)
    for difference in run.check_environment(describe_environment(device, threads)):
        warn(f"the run began elsewhere, so its last bits may differ: {difference}")
    splits = _open_splits(run, config.data)
    pretrained = resolve_pretrained(config.model)
    if pretrained is None:
        raise ConfigError("train.method=linear-probe needs model.pretrained. Set it.")
    spec = pretrained_preprocess(config.model, config.eval, pretrained)
    network, architecture = make_network(
        config.model,
        pretrained=replace(pretrained, class_names=()),  # the head is new, whatever its classes
        class_names=splits.class_names,
        image_px=spec.height_px,
        seed=config.train.seed,
    )
    head = linear_head(network, spec.height_px)
    weights = frozen_digest(network)
    if run.decide("weights", weights, "of the frozen network") != weights:
        raise ModelError(
            f"{config.model.pretrained} changed since the run began: its weights are others. "
            "Restore it, or start a new run."
        )
    splits = check_splits(splits, spec, config.data.max_broken_frac, run.decide, run.leave_out)
    say(f"run {run.path}: {splits.sizes()}, {device.type}, {threads} threads")
    return ReadyProbe(
        run, network, head, splits, spec, architecture, pretrained, weights, device, threads
    )


def _open_splits(run: RunFolder, data: DataConfig) -> Splits:
    """Return the splits of a run's data, which must be what the run began with."""

    source = open_source(
        data.source, image_column=data.image_column, label_column=data.label_column
    )
    if run.decide("fingerprint", source.fingerprint, "of the data") != source.fingerprint:
        raise DataError(
            f"{data.source} changed since the run began: its fingerprint is another. "
            "Restore it, or start a new run."
        )
    return make_splits(
        source, val_frac=data.val_frac, test_frac=data.test_frac, split_seed=data.split_seed
    )


def resolve_pretrained(config: ModelConfig) -> ResolvedModel | None:
    """Return the weights that training starts from: any MODEL, or a tag of model.arch."""

    text = config.pretrained
    if not text:
        return None
    if ":" in text or Path(text).exists():
        return resolve_model(text)
    if not config.arch:
        raise ConfigError(
            f"model.pretrained must be timm:NAME, local-dir:PATH, a package, or a tag of "
            f"model.arch. Got {text!r}. Name the network: model.arch=NAME."
        )
    return resolve_model(f"timm:{config.arch}.{text}")


def _resumed_folder(recipe: str, settings: Sequence[str], out: Path | None) -> Path:
    if out is None:
        raise ConfigError("--resume needs the run's folder. Give it with --out DIR.")
    given = [recipe, *settings] if recipe else list(settings)
    if given:
        raise ConfigError(
            f"--resume goes on with the run's own configuration. Got {' '.join(given)!r}. "
            "Leave it out, or start a new run in another folder."
        )
    return out

"""The session of a run, put together from what was decided about it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from fieldmark.config import RunConfig
from fieldmark.data.loader import PREFETCHED
from fieldmark.data.sizes import image_px_at
from fieldmark.data.split import Splits
from fieldmark.errors import ConfigError
from fieldmark.training.assemble import make_rule, make_state, measure_timing
from fieldmark.training.hardest import HardestBatches, proxy_network, settle_hardest
from fieldmark.training.loop import UpdateRule
from fieldmark.training.norm_statistics import settled
from fieldmark.training.plan import Plan, make_plan
from fieldmark.training.prepare import TrainImages, initialise_from_images, make_batches
from fieldmark.training.run_folder import RunFolder
from fieldmark.training.session import Batches, Session, Validate


@dataclass(frozen=True)
class Parts:
    """What a session is put together from."""

    run: RunFolder
    config: RunConfig  # with the size of an update as a number
    images: TrainImages
    splits: Splits
    class_counts: Sequence[int]

    def session(
        self, network: nn.Module, validate: Validate | None, device: torch.device
    ) -> Session:
        """Decide the length of the run and return it in front of its next update."""
        config, train = self.config, self.config.train
        default_px = min(self.images.preprocess.height_px, self.images.preprocess.width_px)
        sizes = self.images.augment.sizes or ((0.0, default_px),)
        steps_per_epoch = self._batches(device).steps_per_epoch
        make = partial(self._rule, steps_per_epoch=steps_per_epoch, device=device)
        plan = make_plan(
            train,
            config.schedule,
            steps_per_epoch=steps_per_epoch,
            sizes=sizes,
            decide_once=self.run.decide_once,
            measure=lambda: measure_timing(
                make,
                network,
                lambda px: self._batches(device, lambda _: px),
                [px for _, px in sizes],
                validate,
                num_prepared=self._num_prepared(),
            ),
        )
        image_px = None
        if self.images.augment.sizes:
            image_px = partial(image_px_at, sizes, total_steps=plan.total, default_px=default_px)
        batches, keep = self._batches(device, image_px), 0
        if config.data.keep_hardest_frac < 1:
            keep = max(1, round(config.data.keep_hardest_frac * train.examples_per_update))
            batches = self._hardest(batches, keep, plan, device)
        rule = make(network, batch_size=keep)
        return Session(
            self.run,
            rule,
            make_state(rule, train=train, optim=config.optim, total_steps=plan.total),
            batches,
            validate,
            plan=plan,
            train=train,
            optim=config.optim,
        )

    def _num_prepared(self) -> int:
        """Return how many updates worker processes read ahead."""
        if self.images.pixels is not None:
            return 0
        return math.ceil(
            self.config.data.num_workers * PREFETCHED / self.config.train.accumulation_steps
        )

    def _hardest(
        self, batches: Batches, keep: int, plan: Plan, device: torch.device
    ) -> HardestBatches:
        """Return the batches with what a small network, trained here, finds hardest in them."""
        train, ranks = self.config.train, self.run.ranks
        if ranks.world > 1 or self.images.pixels is None:
            what = f"{ranks.world} processes" if ranks.world > 1 else "images read from files"
            raise ConfigError(
                "data.keep_hardest_frac below 1 needs one process and data.storage=resident. "
                f"Got {what}. Set it to 1."
            )
        proxy = proxy_network(len(self.splits.class_names), train.seed)
        initialise_from_images(proxy, self.images)
        masks = settle_hardest(
            self.run.path,
            self._rule(proxy, steps_per_epoch=plan.steps_per_epoch, device=device),
            batches,
            total_steps=plan.total,
            keep=keep,
            lr_factor=plan.lr_factor,
            decide_once=self.run.decide_once,
        )
        return HardestBatches(batches, masks, train.accumulation_steps)

    def _rule(
        self,
        network: nn.Module,
        *,
        steps_per_epoch: int,
        device: torch.device,
        batch_size: int = 0,
    ) -> UpdateRule:
        config = self.config
        return make_rule(
            network,
            train=config.train,
            optim=config.optim,
            loss=config.loss,
            freeze=settled(config.model),
            steps_per_epoch=steps_per_epoch,
            class_counts=self.class_counts,
            device=device,
            ranks=self.run.ranks,
            batch_size=batch_size,
        )

    def _batches(
        self, device: torch.device, image_px: Callable[[int], int] | None = None
    ) -> Batches:
        return make_batches(
            self.images,
            leave_out=self.run.leave_out,
            data=self.config.data,
            augment=self.images.augment,
            train=self.config.train,
            num_classes=len(self.splits.class_names),
            device=device,
            image_px=image_px,
            rank=self.run.ranks.rank,
            num_ranks=self.run.ranks.world,
        )

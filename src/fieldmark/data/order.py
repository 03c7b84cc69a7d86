"""Which image comes when, as a function of seed and epoch: permutations, or draws by class."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from fieldmark.data.labelled import Labels
from fieldmark.errors import ConfigError
from fieldmark.runtime.seed import derive_seed

SamplerName = Literal["shuffle", "balanced", "sqrt"]
Hashes = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Update:
    """The images of one update, of all its micro-batches and ranks."""

    step: int  # from 0
    epoch: int
    indices: Labels  # (batch_size,): positions in the training split
    copies: Labels  # (batch_size,): tells apart what an epoch shows more than once


class Order:
    """The endless sequence of updates.

    With sampler "shuffle" an epoch is a permutation. With "balanced" and "sqrt" it has as many
    images, drawn by class: each class as often as any other, or in proportion to the root of its
    size. The number of an epoch's draws that a class gets is its exact share, rounded down or up
    at random. A class's images come in permutations of it, one after the other, which go on from
    epoch to epoch: none comes again before all of its class came, save where one permutation
    meets the next. An epoch's draws are shuffled over its updates.

    With `repeats`, an update has that many copies of each of its images and fewer different ones,
    so that an epoch still shows as many images in as many updates. First copies come first, then
    second copies, and so on: micro-batches and ranks then hold different copies. Where the update
    is no multiple of the copies, some images lack their last.

    An epoch drops what is left over after its last full batch.

    Source: Hoffer et al. 2020, arXiv:1901.09335 (repeats); Mahajan et al. 2018, arXiv:1805.00932
    (the root of the size).
    """

    def __init__(
        self,
        labels: Labels,
        batch_size: int,
        seed: int,
        *,
        sampler: SamplerName = "shuffle",
        repeats: int = 1,
    ) -> None:
        check_batch_size(len(labels), batch_size)
        self._labels, self._batch_size, self._seed = labels, batch_size, seed
        self._sampler, self._repeats = sampler, repeats
        self._num_different = -(-batch_size // repeats)  # images of an update
        self.steps_per_epoch = len(labels) // batch_size

    def updates(self, start_step: int) -> Iterator[Update]:
        """Yield each update from `start_step` on, without end."""
        num_different = self._num_different
        epochs = self._epochs(start_step // self.steps_per_epoch)
        step = start_step
        for epoch, indices, occurrences in epochs:
            for place in range(step % self.steps_per_epoch, self.steps_per_epoch):
                part = slice(place * num_different, (place + 1) * num_different)
                copies = np.repeat(np.arange(self._repeats), num_different)
                copies += np.tile(occurrences[part] * self._repeats, self._repeats)
                shown = np.tile(indices[part], self._repeats)
                yield Update(step, epoch, shown[: self._batch_size], copies[: self._batch_size])
                step += 1

    def _epochs(self, start: int) -> Iterator[tuple[int, Labels, Labels]]:
        """Yield (epoch, images, how often each came in the epoch before) from `start` on."""
        if self._sampler == "shuffle":
            num_images = len(self._labels)
            none_came = np.zeros(num_images, dtype=np.int64)
            epoch = start
            while True:
                yield epoch, epoch_order(num_images, self._seed, epoch), none_came
                epoch += 1
        draws = _ClassDraws(
            self._labels,
            self.steps_per_epoch * self._num_different,
            self._seed,
            power=0.0 if self._sampler == "balanced" else 0.5,
        )
        yield from draws.epochs(start)


class _ClassDraws:
    """Epochs of `num_draws` images, a class's share being its size to the power of `power`."""

    def __init__(self, labels: Labels, num_draws: int, seed: int, power: float) -> None:
        self._num_draws, self._seed = num_draws, seed
        self._members = np.argsort(labels, kind="stable")  # class by class
        sizes = np.bincount(labels)
        self._sizes = sizes[sizes > 0]
        self._starts = np.cumsum(self._sizes) - self._sizes
        shares = np.cumsum(self._sizes.astype(np.float64) ** power)
        self._edges = shares / shares[-1]  # (K,): the last is exactly 1

    def epochs(self, start: int) -> Iterator[tuple[int, Labels, Labels]]:
        """Yield (epoch, images, how often each came in the epoch before) from `start` on."""
        drawn = np.zeros(len(self._sizes), dtype=np.int64)  # of each class, in earlier epochs
        for epoch in range(start):
            drawn += self.counts(epoch)
        epoch = start
        while True:
            counts = self.counts(epoch)
            indices, occurrences = self._draw(drawn, counts)
            order = epoch_order(self._num_draws, self._seed, epoch)
            yield epoch, indices[order], occurrences[order]
            drawn += counts
            epoch += 1

    def counts(self, epoch: int) -> Labels:
        """Return how many of the epoch's draws each class gets (systematic sampling)."""
        seed = derive_seed("class counts", self._seed, epoch)
        offset = np.random.Generator(np.random.PCG64(seed)).random()
        until = np.floor(self._num_draws * self._edges + offset).astype(np.int64)
        return np.diff(np.minimum(until, self._num_draws), prepend=0)

    def _draw(self, drawn: Labels, counts: Labels) -> tuple[Labels, Labels]:
        """Return each class's images after its first `drawn` ones, and the pass each is of.

        In a pass all images of a class come once, in the order of a hash of image and pass:
        thousands of passes over small classes then cost one sort, and no generator each.
        """
        first, last = drawn // self._sizes, (drawn + counts - 1) // self._sizes
        num_candidates = self._sizes * (last - first + 1)
        of_class = np.repeat(np.arange(len(counts)), num_candidates)
        begins = np.cumsum(num_candidates) - num_candidates
        place = np.arange(len(of_class)) - begins[of_class]
        passed, member = np.divmod(place, self._sizes[of_class])
        images = self._members[self._starts[of_class] + member]
        seed = np.uint64(derive_seed("class order", self._seed))
        keys = mix64(
            mix64(images.astype(np.uint64) + seed) + (first[of_class] + passed).astype("u8")
        )
        ranked = np.lexsort((keys, passed, of_class))
        skipped = (drawn - first * self._sizes)[of_class]
        is_drawn = (place >= skipped) & (place < skipped + counts[of_class])
        chosen = ranked[is_drawn]
        return images[chosen], passed[chosen]


def epoch_order(num_images: int, seed: int, epoch: int) -> Labels:
    """Return the permutation of an epoch."""
    rng = np.random.Generator(np.random.PCG64(derive_seed("order", seed, epoch)))
    return rng.permutation(num_images)


def mix64(values: Hashes) -> Hashes:
    """Return a hash of each number: neighbours become unrelated.

    The constants are splitmix64's. The products wrap at 64 bits, as they are meant to.
    """
    mixed = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


@dataclass(frozen=True)
class Shares:
    """How the processes of a run divide an update: into equal micro-batches, in order.

    Rank r of `num_ranks` takes `accumulation_steps` consecutive ones. So the micro-batches are
    those of one process that accumulates `num_ranks * accumulation_steps` of them.
    """

    batch_size: int
    accumulation_steps: int = 1
    rank: int = 0
    num_ranks: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % self.num_parts:
            raise ConfigError(
                "train.batch_size must be a multiple of processes times train.accumulation_steps. "
                f"Got {self.batch_size} for {self.num_ranks} and {self.accumulation_steps}. "
                "Change one of them."
            )

    @property
    def num_parts(self) -> int:
        """Micro-batches of an update, over all ranks."""
        return self.num_ranks * self.accumulation_steps

    @property
    def part_size(self) -> int:
        """Images of a micro-batch."""
        return self.batch_size // self.num_parts

    @property
    def parts(self) -> range:
        """The micro-batches of this rank, counted over all ranks."""
        first = self.rank * self.accumulation_steps
        return range(first, first + self.accumulation_steps)

    def positions(self, part: int) -> slice:
        """Where the images of a micro-batch are in the update."""
        return slice(part * self.part_size, (part + 1) * self.part_size)


def check_batch_size(num_images: int, batch_size: int) -> None:
    """Raise ConfigError unless there is at least one full batch."""
    if num_images < batch_size:
        raise ConfigError(
            f"train.batch_size must be at most the number of training images. Got {batch_size} "
            f"for {num_images} images. Lower it."
        )

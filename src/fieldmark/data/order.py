"""Which image comes when: a permutation per epoch, as a function of seed and epoch."""

from collections.abc import Iterator

import numpy as np

from fieldmark.data.labelled import Labels
from fieldmark.errors import ConfigError
from fieldmark.runtime.seed import derive_seed


def epoch_order(num_images: int, seed: int, epoch: int) -> Labels:
    """Return the permutation of an epoch."""
    rng = np.random.Generator(np.random.PCG64(derive_seed("order", seed, epoch)))
    return rng.permutation(num_images)


def update_indices(
    num_images: int, batch_size: int, seed: int, start_step: int
) -> Iterator[tuple[int, int, Labels]]:
    """Yield (step, epoch, image indices) of each update from `start_step` on, without end.

    Each epoch drops what is left over after its last full batch.
    """
    steps_per_epoch = num_images // batch_size
    step, known_epoch = start_step, -1
    order = np.empty(0, dtype=np.int64)
    while True:
        epoch, place = divmod(step, steps_per_epoch)
        if epoch != known_epoch:
            order, known_epoch = epoch_order(num_images, seed, epoch), epoch
        yield step, epoch, order[place * batch_size : (place + 1) * batch_size]
        step += 1


def check_batch_size(num_images: int, batch_size: int) -> None:
    """Raise ConfigError unless there is at least one full batch."""
    if num_images < batch_size:
        raise ConfigError(
            f"train.batch_size must be at most the number of training images. Got {batch_size} "
            f"for {num_images} images. Lower it."
        )

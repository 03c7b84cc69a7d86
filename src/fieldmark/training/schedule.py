"""How long a run is, and its learning rate: pure functions of the update."""

import math

from fieldmark.config import ScheduleConfig, TrainConfig
from fieldmark.errors import ConfigError

_AUTO_EPOCHS = 8.0


def total_steps(config: TrainConfig, steps_per_epoch: int) -> int:
    """Return the number of updates that the configured epochs, steps or examples come to.

    Epochs come to at least `min_steps`, so that a small data set is seen more often.
    """
    if config.steps:
        return config.steps
    batch_size = config.examples_per_update
    if config.examples:
        steps = config.examples // batch_size
    else:
        epochs = config.epochs
        if epochs == "auto":
            epochs = auto_epochs(steps_per_epoch * batch_size)
        steps = max(config.min_steps, round(epochs * steps_per_epoch))
    if steps < 1:
        raise ConfigError(
            f"training must last at least one update of train.batch_size={batch_size}. "
            "Got less. Raise train.epochs or lower train.batch_size."
        )
    return steps


def auto_epochs(num_images: int) -> float:
    """Return for how many epochs pretrained weights are trained: 8 up to 1,000 images.

    Above, 8 / (images / 1,000)^(1/4): 3 epochs of 50,000 images, 1.3 of ImageNet. The number of
    updates grows with the data, and that of looks at each image shrinks.
    """
    return _AUTO_EPOCHS * min(1.0, (num_images / 1_000) ** -0.25)


def warmup_steps(
    config: ScheduleConfig, *, total: int, steps_per_epoch: int, batch_size: int
) -> int:
    """Return the number of warm-up updates, converted from whichever unit is given.

    Raises:
        ConfigError: the warm-up would be as long as the whole run.
    """
    if config.warmup_epochs:
        steps = round(config.warmup_epochs * steps_per_epoch)
    elif config.warmup_examples:
        steps = config.warmup_examples // batch_size
    elif config.warmup_frac:
        steps = round(config.warmup_frac * total)
    else:
        steps = config.warmup_steps
    if steps >= total and steps > 0:
        raise ConfigError(
            f"warm-up must be shorter than the run of {total} updates. Got {steps}. "
            "Lower schedule.warmup_epochs (or its other units), or train longer."
        )
    return steps


def lr_factor(
    config: ScheduleConfig, step: int, *, total: int, warmup: int, steps_per_epoch: int = 0
) -> float:
    """Return the rate of update `step` (0 for the first) as a multiple of optim.lr.

    Warm-up is linear from `warmup_start_factor` to 1 over `warmup` updates. Then, with t the
    fraction of the decay already made, counted from the warm-up's end or, with decay_from=start,
    from update 0: cosine, end + (1 - end) (1 + cos(pi t)) / 2 (Loshchilov and Hutter 2016,
    arXiv:1608.03983, equation 5); linear, 1 - (1 - end) t; step, step_factor to the power of the
    decays so far, one at each full `step_epochs` (counted likewise); constant, 1.

    Args:
        steps_per_epoch: updates in an epoch; name=step needs it.
    """
    if step < warmup:
        start = config.warmup_start_factor
        return start + (1 - start) * step / warmup
    origin = warmup if config.decay_from == "warmup" else 0
    if config.name == "step":
        return config.step_factor ** _decays(config.step_epochs, step - origin, steps_per_epoch)
    t = min(1.0, (step - origin) / max(1, total - origin))
    end = config.end_factor
    if config.name == "cosine":
        return end + (1 - end) * 0.5 * (1 + math.cos(math.pi * t))
    if config.name == "linear":
        return 1 - (1 - end) * t
    return 1.0


def _decays(step_epochs: float, steps: int, steps_per_epoch: int) -> int:
    """Return how many whole `step_epochs` there are in `steps`, counted in updates."""
    # Rounded first: 0.07 epochs of 100 updates are 7 updates, not 7.000000000000001.
    return math.floor(round(steps / (step_epochs * steps_per_epoch), 9))

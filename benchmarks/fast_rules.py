"""The update rules of cifar10-fast95 and -fast96 against a plain re-statement, for 100 updates.

    .venv/bin/python benchmarks/fast_rules.py --data hf:PATH_OF_CIFAR10 --write

Both train the same network from the same weights on the same batches of real images: the recipe as
`fieldmark train` sets it up, and the rule written out below in thirty lines of torch. Batches are
smaller than the recipes' 1,024 (--batch-size), so that it takes minutes, and with them the epochs
that the schedules are cut into. What is compared is the loss of every update: the largest relative
difference must be below 1e-3. Of cifar10-fast96 the choice of the harder half is compared, too: a
small network, trained in the same number of updates, must choose at least 99 % of the same images
when it is written out. Exit status 1 if one is not so.
"""

import argparse
import copy
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import results_file
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fieldmark.cookbook import load_recipe
from fieldmark.runtime.log import say
from fieldmark.training import hardest
from fieldmark.training.loop import train_steps
from fieldmark.training.ranks import Alone
from fieldmark.training.run_folder import RunFolder
from fieldmark.training.start import start_session

UPDATES = 100
# What Jordan gives: rate per 1,024 * (1 + 1 / (1 - momentum)) examples, decay per 1,024 examples.
PUBLISHED: dict[str, dict[str, Any]] = {
    "cifar10-fast95": {"lr": 10.0, "decay": 0.0153, "warmup": 0.23, "end": 0.07},
    "cifar10-fast96": {"lr": 9.0, "decay": 0.012, "warmup": 0.10, "end": 0.0},
}


def main() -> int:
    """Compare both recipes; 0 if they agree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="cifar10", help="CIFAR-10 as a data source")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--widths", default="", help="narrower ones, such as [16,32,32]")
    parser.add_argument("--write", action="store_true", help="write the results file")
    options = parser.parse_args()
    narrow = [f"model.args.widths={options.widths}"] if options.widths else []
    found = {name: compare(name, options.data, options.batch_size, narrow) for name in PUBLISHED}
    passed = all(
        result["largest_difference"] < 1e-3 and result.get("chosen_by_both", 1) >= 0.99
        for result in found.values()
    )
    if options.write:
        results_file.write(
            "fast_rules",
            f"benchmarks/fast_rules.py --batch-size {options.batch_size} --write",
            {"what": f"loss of {UPDATES} updates, ours over a plain re-statement"} | found,
        )
    print(found)
    return 0 if passed else 1


def compare(name: str, data: str, batch_size: int, settings: list[str]) -> dict[str, Any]:
    """Return how far the losses of both are apart."""
    say(f"{name}: {UPDATES} updates of {batch_size}")
    rates = PUBLISHED[name]
    settings = [
        *settings,
        f"data.source={data}",
        f"train.steps={UPDATES}",
        f"train.batch_size={batch_size}",
        f"optim.stem_epochs={UPDATES * 3 / 15 * batch_size / 50_000!r}",
    ]
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng():
        config = load_recipe(name, settings)
        with RunFolder.create(Path(folder, "run"), config) as run:
            assert isinstance(run.ranks, Alone)
            with choices() as choice:
                session = start_session(run, config, lambda *_, **__: None).session
            network = copy.deepcopy(session.state.network)
            started = time.monotonic()
            ours = []
            steps = train_steps(
                session.rule, session.data.batches(0), start_step=0, total_steps=UPDATES
            )
            for step in steps:
                session.state.after_update(step.index, step.is_finite)
                ours.append(step.loss.item())
            ours_s = time.monotonic() - started
            theirs = list(
                restated(
                    network,
                    session.data.batches(0),
                    stem_steps=session.rule.stem_steps,
                    batch_size=session.rule.batch_size,
                    **rates,
                )
            )
            again = {name: round(same_choice(**one, **rates), 5) for name, one in choice.items()}
    apart = [abs(a - b) / b for a, b in zip(ours, theirs, strict=True)]
    return again | {
        "updates": UPDATES,
        "batch_size": batch_size,
        "widths": list(config.model.args["widths"]),
        "first_loss": round(theirs[0], 4),
        "last_loss": round(theirs[-1], 4),
        "largest_difference": max(apart),
        "ours_s": round(ours_s, 1),
    }


@contextmanager
def choices() -> Iterator[dict[str, Any]]:
    """Note what chooses the harder half of each update before a session starts, if anything does.

    Under "chosen_by_both": the small network as it begins, its updates, and what it chose.
    """
    noted: dict[str, Any] = {}
    find = hardest.find_hardest

    def find_and_note(rule: Any, batches: Any, **options: Any) -> hardest.Masks:
        start = copy.deepcopy(rule.network)
        masks = find(rule, batches, **options)
        noted["chosen_by_both"] = {
            "network": start,
            "batches": batches.batches(0),
            "masks": masks,
            "stem_steps": rule.stem_steps,
        }
        return masks

    hardest.find_hardest = find_and_note
    try:
        yield noted
    finally:
        hardest.find_hardest = find


def same_choice(
    network: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    masks: hardest.Masks,
    *,
    lr: float,
    decay: float,
    warmup: float,
    end: float,
    stem_steps: int,
) -> float:
    """Return which share of the chosen images a plain re-statement of the choice takes, too."""
    optimizer, first = sgd(network, lr, decay)
    network.train()
    num_same = 0
    for step, mask in enumerate(masks):
        images, labels = next(batches)
        set_rates(optimizer, network, first, step, warmup, end, stem_steps)
        if step % 4 == 0:
            optimizer.zero_grad(set_to_none=True)
            logits = network(images)
            F.cross_entropy(logits, labels, label_smoothing=0.2, reduction="sum").backward()
            optimizer.step()
        else:
            with torch.no_grad():
                logits = network(images)
        losses = F.cross_entropy(logits, labels, reduction="none")
        num_same += int(mask[losses.topk(int(mask.sum())).indices.numpy()].sum())
    return num_same / int(masks.sum())


def restated(
    network: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    *,
    lr: float,
    decay: float,
    warmup: float,
    end: float,
    stem_steps: int,
    batch_size: int,
) -> Iterator[float]:
    """Yield the mean loss of each update of airbench's rule, on the given network and batches."""
    optimizer, first = sgd(network, lr, decay)
    slow = {k: v.clone() for k, v in network.state_dict().items() if v.is_floating_point()}
    network.train()
    for step in range(UPDATES):
        set_rates(optimizer, network, first, step, warmup, end, stem_steps)
        images, labels = next(batches)
        loss = F.cross_entropy(network(images), labels, label_smoothing=0.2, reduction="sum")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        if (step + 1) % 5 == 0 and step + 1 < UPDATES:
            kept = 0.95**5 * ((step + 1) / UPDATES) ** 3
            with torch.no_grad():
                for key, fast in network.state_dict().items():
                    if key in slow:
                        slow[key].lerp_(fast, 1 - kept)
                        fast.copy_(slow[key])
        yield loss.item() / batch_size
    assert math.isfinite(loss.item())


def sgd(network: Any, lr: float, decay: float) -> tuple[torch.optim.SGD, list[float]]:
    """Return airbench's optimizer and the full rate of each of its groups, the stem's last."""
    kilostep = 1024 * (1 + 1 / (1 - 0.85))
    rate, shrink = lr / kilostep, decay * 1024 / kilostep
    norms = [p for n, p in network.named_parameters() if "norm" in n and p.requires_grad]
    stem = [network.whiten.bias]
    apart = {id(p) for p in [*norms, *stem]}
    others = [p for p in network.parameters() if p.requires_grad and id(p) not in apart]
    groups: list[dict[str, Any]] = [
        {"params": norms, "lr": 64 * rate, "weight_decay": shrink / (64 * rate)},
        {"params": others, "lr": rate, "weight_decay": shrink / rate},
        {"params": stem, "lr": rate, "weight_decay": shrink / rate},
    ]
    first = [group["lr"] for group in groups]
    return torch.optim.SGD(groups, momentum=0.85, nesterov=True), first


def set_rates(
    optimizer: torch.optim.SGD,
    network: Any,
    first: list[float],
    step: int,
    warmup: float,
    end: float,
    stem_steps: int,
) -> None:
    """Set the rates of an update; the stem's bias falls to 0 and is then left as it is."""
    top = round(warmup * UPDATES)
    if step < top:
        factor = 0.2 + 0.8 * step / top
    else:
        factor = 1 - (1 - end) * (step - top) / (UPDATES - top)
    for group, base, is_stem in zip(optimizer.param_groups, first, (0, 0, 1), strict=True):
        group["lr"] = base * (max(0.0, 1 - step / stem_steps) if is_stem else factor)
    network.whiten.bias.requires_grad_(step < stem_steps)


if __name__ == "__main__":
    sys.exit(main())

"""Training throughput on CIFAR-10: our trainer against the textbook loop and an eager step.

    .venv/bin/python benchmarks/train_step.py --data hf:PATH_OF_CIFAR10
    .venv/bin/python benchmarks/train_step.py --data hf:PATH_OF_CIFAR10 --arch small_resnet50 \\
        --rounds 3 --steps 2
    .venv/bin/python benchmarks/train_step.py --data hf:PATH_OF_CIFAR10 --arch small_efficientnet_b0

All train the same network (3x3 stem) with the same SGD, batch size and augmentation on the same
images and threads:

ours      the trainer as the recipe cifar10-resnet18 sets it up
textbook  eager, NCHW, with torchvision transforms on PIL images in a DataLoader with 4 workers
eager     the update of the textbook loop on our batches, NCHW: what the data cost is not in it
ours-default-allocator   ours, with glibc giving freed memory back to the kernel, as by default

Each measurement is a process of its own; the contenders take turns, so that a drift of the machine
meets all, and ratios are taken round by round.
"""

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import results_file
import torch
from torch import nn

from fieldmark.cookbook import find_recipe
from fieldmark.data.resident import ResidentBatches
from fieldmark.model import Architecture, build
from fieldmark.training import device

NAMES = {"small_resnet18": "train_step"}

BATCH_SIZE = 128
WARM_UP = 2
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


CONTENDERS = ("ours", "textbook", "eager", "ours-default-allocator")


def main() -> None:
    """Run the rounds and write the results file, or (with --one) one measurement."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="cifar10", help="a data source with a train split")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=5, help="timed updates of each measurement")
    parser.add_argument("--arch", default="small_resnet18", help="a network for 32 px")
    parser.add_argument("--one", choices=CONTENDERS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.arch, options.data, options.steps)))
        return
    rates: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for number in range(options.rounds):
        turn = number % len(CONTENDERS)
        for name in CONTENDERS[turn:] + CONTENDERS[:turn]:
            rates[name].append(run_one(name, options))
        shown = {name: f"{values[-1]:.1f}" for name, values in rates.items()}
        print(f"round {number + 1}: images/s {shown}", file=sys.stderr, flush=True)
    ratios = {
        f"ours / {name}": results_file.spread(
            [a / b for a, b in zip(rates["ours"], rates[name], strict=True)]
        )
        for name in CONTENDERS[1:]
    }
    results_file.write(
        NAMES.get(options.arch, f"train_step_{options.arch}"),
        f"benchmarks/train_step.py --arch {options.arch} --rounds {options.rounds} "
        f"--steps {options.steps}",
        {
            "what": f"{options.arch} at 32 px, batch 128: images per second of training",
            "images_per_s": {name: results_file.spread(rates[name]) for name in CONTENDERS},
            "ratios": ratios,
            "rounds": rates,
        },
    )


def run_one(name: str, options: argparse.Namespace) -> float:
    """Return images per second of one contender, measured in its own process."""
    command = [sys.executable, __file__, "--one", name, "--data", options.data]
    command += ["--arch", options.arch, "--steps", str(options.steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rate: float = json.loads(done.stdout.splitlines()[-1])["images_per_s"]
    return rate


def measure(name: str, arch: str, data: str, steps: int) -> dict[str, float]:
    """Time `steps` updates after the warm-up."""
    images, labels = load(data)
    if name == "ours-default-allocator":
        device.keep_freed_memory = lambda: False
    make = {"textbook": textbook, "eager": eager}.get(name, ours)
    updates = make(images, labels, arch)
    for _ in range(WARM_UP):
        next(updates)
    started = time.perf_counter()
    for _ in range(steps):
        next(updates)
    seconds = time.perf_counter() - started
    return {"images_per_s": steps * BATCH_SIZE / seconds}


def load(data: str, limit: int = 5_000) -> tuple[np.ndarray, np.ndarray]:
    """Return the first training images, uint8 (N, 32, 32, 3), and their labels."""
    from fieldmark.data.source import open_source

    split = open_source(data).splits["train"]
    indices = range(min(limit, len(split)))
    images = np.stack([np.asarray(split.images.image(index)) for index in indices])
    return images, split.labels[: len(images)]


def ours(images: np.ndarray, labels: np.ndarray, arch: str = "small_resnet18") -> Iterator[object]:
    """Yield after each update of our trainer, as the recipe cifar10-resnet18 sets it up."""
    from functools import partial

    from fieldmark.training.loop import UpdateRule, train_steps
    from fieldmark.training.losses import make_loss
    from fieldmark.training.optim import make_optimizer

    config = find_recipe("cifar10-resnet18")
    cpu = torch.device("cpu")
    device.prepare(config.train, cpu)
    network = build(Architecture(arch, 10)).to(memory_format=torch.channels_last)
    batches = resident(images, labels, channels_last=True)
    rule = UpdateRule(
        network=network,
        forward=network,
        loss_fn=make_loss(config.loss, class_counts=np.bincount(labels, minlength=10).tolist()),
        optimizer=make_optimizer(network, config.optim),
        scaler=device.make_scaler(config.train, cpu),
        lr_factor=lambda _: 1.0,
        autocast=partial(device.autocast, config.train, cpu),
        batch_size=BATCH_SIZE,
        accumulation_steps=1,
        max_grad_norm=0.0,
        freeze="none",
        seed=0,
    )
    return train_steps(rule, batches.batches(0), start_step=0, total_steps=10_000)


def resident(images: np.ndarray, labels: np.ndarray, *, channels_last: bool) -> ResidentBatches:
    """Return our batches, from memory."""
    return ResidentBatches(
        images,
        labels,
        augment=find_recipe("cifar10-resnet18").augment,
        mean=MEAN,
        std=STD,
        batch_size=BATCH_SIZE,
        accumulation_steps=1,
        seed=0,
        num_classes=10,
        device=torch.device("cpu"),
        channels_last=channels_last,
    )


def eager(images: np.ndarray, labels: np.ndarray, arch: str) -> Iterator[object]:
    """Yield after each update of the textbook's kind on our batches, in NCHW."""
    from fieldmark.runtime.cpu import num_cores

    torch.set_num_threads(num_cores())
    batches = resident(images, labels, channels_last=False).batches(0)
    yield from plain_updates(arch, batches)


def plain_updates(
    arch: str, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]
) -> Iterator[object]:
    """Yield after each update as every tutorial makes it."""
    network = build(Architecture(arch, 10)).train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    criterion = nn.CrossEntropyLoss()
    for inputs, targets in batches:
        optimizer.zero_grad()
        loss = criterion(network(inputs), targets)
        loss.backward()
        optimizer.step()
        yield loss


def textbook(
    images: np.ndarray, labels: np.ndarray, arch: str = "small_resnet18"
) -> Iterator[object]:
    """Yield after each update of the loop that tutorials teach."""
    from PIL import Image
    from torchvision import transforms

    from fieldmark.runtime.cpu import num_cores

    torch.set_num_threads(num_cores())
    transform = transforms.Compose(
        [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )

    class Cifar(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(images)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            return transform(Image.fromarray(images[index])), int(labels[index])

    loader = torch.utils.data.DataLoader(
        Cifar(), batch_size=BATCH_SIZE, shuffle=True, num_workers=4
    )
    endless = (batch for _ in itertools.count() for batch in loader)
    yield from plain_updates(arch, (batch for batch in endless if len(batch[0]) == BATCH_SIZE))


if __name__ == "__main__":
    main()

"""What only a CUDA device can show: mixed precision with a scaler, equal answers, its memory."""

import contextlib
import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import fieldmark
from fieldmark.config import AugmentConfig, LossConfig, OptimConfig, TrainConfig
from fieldmark.data.resident import ResidentBatches
from fieldmark.errors import OutOfMemory
from fieldmark.model import Architecture, build
from fieldmark.training.assemble import make_rule, make_state
from fieldmark.training.batch_size import (
    give_back,
    largest_that_fits,
    out_of_memory_explained,
    settle_batch_size,
)
from fieldmark.training.capacity import Run, measure_memory, peak_memory_bytes, rehearsal
from fieldmark.training.loop import train_steps
from fieldmark.training.losses import make_loss
from fieldmark.training.optim import make_optimizer
from fieldmark.training.ranks import Alone

pytestmark = pytest.mark.gpu

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@needs_cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("storage", ["resident", "files"])
def test_a_run_on_the_gpu_packages_what_the_cpu_repeats(
    tmp_path: Path, tiny_settings: list[str], precision: str, storage: str
) -> None:
    settings = [*tiny_settings, "train.device=cuda", f"train.precision={precision}"]
    result = fieldmark.train("digits", [*settings, f"data.storage={storage}"], out=tmp_path / "run")
    assert result.facts["top1_accuracy"]["value"] > 0.5
    assert fieldmark.export(str(tmp_path / "run")).passed


@needs_cuda
def test_a_resumed_run_equals_the_undisturbed_one(tmp_path: Path, tiny_settings: list[str]) -> None:
    from fieldmark.training.checkpoint import load_newest

    settings = [*tiny_settings, "train.device=cuda", "train.checkpoint_steps=5"]
    settings += ["train.keep_checkpoints=50"]
    states = []
    for name in ("calm", "resumed"):
        out = tmp_path / name
        fieldmark.train("digits", settings, out=out)
        if name == "resumed":
            for path in sorted((out / "checkpoints").glob("*.ckpt"))[2:]:
                path.unlink()
            (out / "metrics.json").unlink()
            fieldmark.train(out=out, resume=True)
        found = load_newest(out / "checkpoints")
        assert found is not None
        states.append(found[1]["network"])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def resnet18_update(network: torch.nn.Module) -> Run:
    return rehearsal(
        network,
        make_optimizer=lambda twin: make_optimizer(twin, OptimConfig()),
        loss_fn=make_loss(LossConfig(), class_counts=[1] * 10),
        autocast=contextlib.nullcontext,
        freeze="none",
        image_shape=(3, 64, 64),
        channels_last=True,
    )


@needs_cuda
def test_a_full_gpu_is_answered_with_the_largest_batch_that_fits() -> None:
    """On a card that is made small, so that the search takes seconds."""
    network = build(Architecture("resnet18", 10, {})).cuda()
    update = resnet18_update(network)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(2e9 / total)
    try:
        with (
            pytest.raises(OutOfMemory, match="must fit into the GPU's memory") as caught,
            out_of_memory_explained(update, batch_size=4096, accumulation_steps=1),
        ):
            update(4096)
        advised = re.search(r"train\.batch_size=(\d+), the largest", str(caught.value))
        assert advised is not None
        give_back()
        update(int(advised[1]))  # and it does
        give_back()
        assert largest_that_fits(update, 4096) < 4096
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        give_back()


@needs_cuda
def test_the_estimate_is_what_the_gpu_s_allocator_gave() -> None:
    """Tensors are the same on both devices; on this one the allocator counts them itself."""
    device = torch.device("cuda")
    network = build(Architecture("resnet18", 10, {})).to(device)
    update = resnet18_update(network)
    estimate = measure_memory(update).tensor_bytes(128)
    give_back()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    update(128)
    grown = peak_memory_bytes(device) - before
    assert 0.7 * grown < estimate < 1.1 * grown  # cuDNN's scratch memory is the rest


@needs_cuda
def test_auto_takes_a_batch_that_the_gpu_holds() -> None:
    network = build(Architecture("resnet18", 10, {})).cuda()
    settled = settle_batch_size(
        TrainConfig(epochs=1, batch_size="auto"),
        resnet18_update(network),
        num_updates=2,
        num_images=50_000,
        device=torch.device("cuda"),
        decide_once=lambda _, find: find()[0],
    )
    assert 32 <= settled.examples_per_update <= 1024


@needs_cuda
def test_no_batch_waits_for_the_gpu() -> None:
    config = AugmentConfig(
        crop_pad_px=2,
        flip="random",
        rotation_deg=10.0,
        elastic_px=1.0,
        cutout_px=4,
        erase_prob=0.5,
        erase_mode="pixel",
        mixup_alpha=0.2,
        cutmix_alpha=1.0,
    )
    images = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    batches = ResidentBatches(
        images,
        np.arange(64) % 4,
        config,
        mean=(0.5,) * 3,
        std=(0.25,) * 3,
        batch_size=16,
        seed=0,
        num_classes=4,
        device="cuda",
    ).batches(0)
    for _ in range(4):  # what is made once may wait
        next(batches)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(8):
            next(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@pytest.mark.parametrize("name", ["sgd", "adamw", "muon", "lookahead"])
def test_no_update_waits_for_the_gpu(name: str) -> None:
    more = {"lookahead_steps": 2} if name == "lookahead" else {}
    more |= {"filter_lr": 0.1} if name == "muon" else {}
    optim = OptimConfig(name="sgd" if name == "lookahead" else name, lr=0.01, **more)
    train = TrainConfig(steps=20, batch_size=8, ema_decay=0.9, precision="bfloat16")
    device = torch.device("cuda")
    rule = make_rule(
        build(Architecture("small_test_resnet", 4)).to(device),
        train=train,
        optim=optim,
        loss=LossConfig(),
        freeze="none",
        steps_per_epoch=10,
        class_counts=[8] * 4,
        device=device,
        ranks=Alone(),
    )
    state = make_state(rule, train=train, optim=optim, total_steps=20)
    images, labels = torch.randn(8, 3, 32, 32, device=device), torch.arange(8, device=device) % 4
    endless = itertools.repeat((images, labels))
    for step in train_steps(rule, endless, start_step=0, total_steps=20):
        state.after_update(step.index, step.is_finite)
        is_warm = 4 <= step.index < 20  # what is made once may wait
        torch.cuda.set_sync_debug_mode("error" if is_warm else "default")
    assert bool(step.is_finite)

"""The estimate of an update's memory against what processes really took."""

import json
import subprocess
import sys

import pytest

MEASURE = """
import contextlib, json, sys
import torch
from fieldmark.config import LossConfig, OptimConfig
from fieldmark.model import Architecture, adapt_architecture, build
from fieldmark.runtime.memory import keep_freed_memory, peak_resident_bytes
from fieldmark.training.capacity import measure_memory, rehearsal
from fieldmark.training.losses import make_loss
from fieldmark.training.optim import make_optimizer

name, px, num_images, measured = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
torch.set_num_threads(2)
keep_freed_memory()
architecture, _ = adapt_architecture(Architecture(name, 10, {}), px, "auto")
run = rehearsal(
    build(architecture),
    make_optimizer=lambda network: make_optimizer(network, OptimConfig()),
    loss_fn=make_loss(LossConfig(), class_counts=[1] * 10),
    autocast=contextlib.nullcontext,
    freeze="none",
    image_shape=(3, px, px),
    channels_last=True,
)
if measured == "estimated":
    memory = measure_memory(run)
    print(json.dumps([memory.tensor_bytes(num_images), memory.process_bytes(num_images)]))
else:
    before = peak_resident_bytes()
    run(num_images)
    print(json.dumps([peak_resident_bytes() - before] * 2))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "px", "num_images"),
    [
        ("resnet18", 32, 128),
        ("airnet", 32, 500),
        ("tf_efficientnet_lite0", 224, 16),
    ],
)
def test_the_estimate_is_near_what_a_process_grows_by(name: str, px: int, num_images: int) -> None:
    found = {}
    for kind in ("estimated", "measured"):
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, name, str(px), str(num_images), kind],
            capture_output=True,
            text=True,
            check=True,
        )
        found[kind] = json.loads(done.stdout.splitlines()[-1])
    tensors, estimate = found["estimated"]
    growth = found["measured"][0]
    print(name, num_images, {"tensors": tensors, "estimate": estimate, "growth": growth})
    assert tensors < growth
    # The same process grew by 821 to 1,003 MB in five runs (docs/decisions/0007), so that no
    # estimate is nearer to all of them than a tenth.
    assert 0.8 * growth < estimate < 1.3 * growth

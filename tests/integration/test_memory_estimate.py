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
    tensors, estimate = _run("estimated", name, px, num_images)
    # Gaps in the heap differ from process to process: of 24 on a busy machine the same update took
    # 800 to 1,071 MB, and once elsewhere 1,190 (docs/decisions/0007). The estimate is of the
    # middle one.
    growths = sorted(_run("measured", name, px, num_images)[0] for _ in range(3))
    print(name, num_images, {"tensors": tensors, "estimate": estimate, "growths": growths})
    assert tensors < growths[0]
    assert 0.8 * growths[1] < estimate < 1.3 * growths[1]


def _run(kind: str, name: str, px: int, num_images: int) -> list[int]:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, name, str(px), str(num_images), kind],
        capture_output=True,
        text=True,
        check=True,
    )
    found: list[int] = json.loads(done.stdout.splitlines()[-1])
    return found

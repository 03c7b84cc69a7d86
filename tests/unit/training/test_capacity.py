"""Memory of an update: estimated without touching the run, and refused with what would fit."""

import contextlib
import itertools
from pathlib import Path

import pytest
import torch
from torch import nn

from fieldmark.config import LossConfig, OptimConfig, TrainConfig
from fieldmark.cookbook import find_recipe
from fieldmark.errors import OutOfMemory
from fieldmark.model import Architecture, build
from fieldmark.runtime.memory import Room
from fieldmark.training.batch_size import (
    decide_batch_size,
    largest_that_fits,
    out_of_memory_explained,
    settle_batch_size,
    speed_of,
)
from fieldmark.training.capacity import (
    Memory,
    Run,
    check_memory,
    check_update_fits,
    check_validation_fits,
    measure_memory,
    peak_memory_bytes,
    rehearsal,
    validation_rehearsal,
)
from fieldmark.training.losses import make_loss
from fieldmark.training.optim import make_optimizer
from fieldmark.training.run_folder import RunFolder

MB = 10**6


def rehearse(network: nn.Module, **changes: object) -> Run:
    settings = {
        "make_optimizer": lambda twin: make_optimizer(twin, OptimConfig()),
        "loss_fn": make_loss(LossConfig(), class_counts=[1] * 10),
        "autocast": contextlib.nullcontext,
        "freeze": "none",
        "image_shape": (3, 32, 32),
        "channels_last": True,
    }
    return rehearsal(network, **(settings | changes))  # type: ignore[arg-type]


def small_network() -> nn.Module:
    return build(Architecture("airnet", 10, {"widths": [8, 8, 16]}))


def test_the_bytes_of_a_network_counted_by_hand() -> None:
    # Held at the peak, as backward leaves the second layer: the momentum of both; the images; what
    # the layers keep (ReLU its output, which is the second one's input); the gradient of the
    # hidden layer with that of the second's weights, which momentum's first half precedes.
    inside, hidden, classes = 64, 128, 10
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(inside, hidden, bias=False), nn.ReLU(), nn.Linear(hidden, classes)
    )

    def loss_fn(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(logits, labels)

    memory = measure_memory(
        rehearse(
            network,
            make_optimizer=lambda twin: torch.optim.SGD(twin.parameters(), 0.1, momentum=0.9),
            loss_fn=loss_fn,
            image_shape=(1, 8, 8),
            channels_last=False,
        )
    )
    weights = 4 * (inside * hidden + hidden * classes + classes)
    # Many images: images, matmul's output, ReLU's, and the gradients of those two, at once at most.
    many = 100_000
    lower = 4 * many * (inside + 2 * hidden)
    upper = 4 * many * (inside + 4 * hidden + 4 * classes + 4) + 3 * weights
    assert lower <= memory.tensor_bytes(many) <= upper
    # No images to speak of: gradients and momentum of all weights.
    assert 2 * weights <= memory.tensor_bytes(0) <= 3.1 * weights


def test_the_estimate_is_what_a_larger_update_then_holds() -> None:
    run = rehearse(build(Architecture("resnet18", 10, {})), image_shape=(3, 64, 64))
    memory = measure_memory(run)

    class OfTwelve:
        def __call__(self, num_images: int, /) -> None:
            run(12 * num_images // 2)

    measured = measure_memory(OfTwelve())  # its "2" and "4" are 12 and 24 images
    assert memory.tensor_bytes(12) == measured.tensor_bytes(2)
    assert memory.tensor_bytes(24) == measured.tensor_bytes(4)


def test_the_rehearsal_changes_nothing_of_the_run() -> None:
    network = small_network()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    random_before = torch.random.get_rng_state()
    network.eval()
    measure_memory(rehearse(network))
    measure_memory(validation_rehearsal(network, (3, 32, 32)))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert torch.equal(torch.random.get_rng_state(), random_before)
    assert not network.training


def test_validation_holds_much_less_than_training_for_each_image() -> None:
    network = build(Architecture("resnet18", 10, {}))
    train = measure_memory(rehearse(network))
    val = measure_memory(validation_rehearsal(network, (3, 32, 32)))
    assert 0 < val.tensor_bytes(1000) < train.tensor_bytes(1000) / 2


def test_what_fits_and_its_inverse_agree() -> None:
    memory = Memory((50.0 * MB, 10.0 * MB), (0.0, 3.0 * MB))
    for room in (200 * MB, 777 * MB, 5000 * MB):
        most = memory.most_images(room)
        assert memory.process_bytes(most) <= room < memory.process_bytes(most + 1)
    assert memory.most_images(150 * MB) == 0


def test_an_update_that_does_not_fit_is_refused_with_what_would() -> None:
    memory = Memory((0.0,), (10.0 * MB,))
    room = Room(1300 * MB, "the control group's memory.max")  # (1300 - 100) / 1.2 / 10 = 100 images
    assert check_update_fits(memory, room, batch_size=100, accumulation_steps=1) <= room.num_bytes
    with pytest.raises(OutOfMemory) as caught:
        check_update_fits(memory, room, batch_size=384, accumulation_steps=2)
    assert str(caught.value) == (
        "an update of train.batch_size=384 must fit into the 1.3 GB left by the control group's "
        "memory.max. Got about 2.4 GB for 192 images at a time. Set train.accumulation_steps=4, "
        "the same update in smaller parts, or train.batch_size=200, the largest that fits."
    )
    with pytest.raises(OutOfMemory, match="Not one image fits: choose a smaller network"):
        check_update_fits(memory, Room(9 * MB, "x"), batch_size=4, accumulation_steps=1)
    with pytest.raises(OutOfMemory, match="Set eval.batch_size=100"):
        check_validation_fits(memory, room, 250)
    check_validation_fits(memory, room, 100)


def test_the_peak_of_a_process_is_at_least_what_it_holds() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    held = torch.ones(60 * MB, dtype=torch.uint8)
    assert peak_memory_bytes(torch.device("cpu")) >= min(before, held.nbytes)
    assert peak_memory_bytes(torch.device("cpu")) > 60 * MB


class Limited:
    """A GPU that holds so many images."""

    def __init__(self, most: int) -> None:
        self.most, self.tried = most, list[int]()

    def __call__(self, num_images: int, /) -> None:
        self.tried.append(num_images)
        if num_images > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has")


@pytest.mark.slow
@pytest.mark.parametrize("most", [0, 1, 2, 3, 31, 64, 99, 100, 5000])
def test_the_largest_batch_is_found_by_bisection(most: int) -> None:
    gpu = Limited(most)
    assert largest_that_fits(gpu, 100) == min(most, 100)
    assert len(gpu.tried) <= 8


@pytest.mark.slow
def test_a_full_gpu_is_explained_after_its_tensors_are_gone() -> None:
    import weakref

    alive: list[weakref.ref[torch.Tensor]] = []

    class Watching(Limited):
        def __call__(self, num_images: int, /) -> None:
            assert alive[0]() is None  # else the measurement would find too little room
            super().__call__(num_images)

    def update() -> None:
        activations = torch.ones(10)
        alive.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has")

    with (
        pytest.raises(
            OutOfMemory,
            match=r"batch_size=256 must fit into the GPU's memory. Got: CUDA out of memory, with "
            r"128 images at a time. Set train.accumulation_steps=4, .* or train.batch_size=136,",
        ),
        out_of_memory_explained(Watching(75), batch_size=256, accumulation_steps=2),
    ):
        update()


def decide(**changes: object) -> tuple[int, str]:
    settings = {
        "num_images": 50_000,
        "accumulation_steps": 1,
        "most_images": 10_000,
        "images_per_s": None,
    }
    return decide_batch_size(**(settings | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 1024),
        ({"most_images": 282}, 256),
        ({"most_images": 281}, 128),  # 256 would leave no margin
        ({"num_images": 5_000}, 128),  # 250 is a 20th
        ({"num_images": 300}, 8),
        ({"num_images": 7}, 2),
        ({"most_images": 71, "accumulation_steps": 4}, 256),
        ({"num_images": 1_000, "accumulation_steps": 3}, 48),
    ],
)
def test_auto_takes_what_data_and_memory_allow(changes: dict[str, object], expected: int) -> None:
    size, why = decide(**changes)
    assert size == expected
    assert "a 20th of" in why


def test_auto_takes_the_smallest_of_nearly_the_best_speed() -> None:
    speeds = {32: 100.0, 64: 150.0, 128: 196.0, 256: 200.0}
    asked: list[int] = []

    def images_per_s(size: int) -> float:
        asked.append(size)
        return speeds[size]

    size, why = decide(images_per_s=images_per_s)
    assert size == 128
    assert "32: 100, 64: 150, 128: 196, 256: 200" in why
    assert asked == [32, 64, 128, 256]  # 512 is not tried after a doubling that gained 2 %
    size, _ = decide(images_per_s=lambda size: float(size))
    assert size == 512


def test_auto_refuses_when_nothing_fits() -> None:
    with pytest.raises(OutOfMemory, match="one image at a time"):
        decide(most_images=0)


def test_auto_is_settled_once_on_this_machine_and_replayed(tmp_path: Path) -> None:
    train = TrainConfig(epochs=1, batch_size="auto")
    with pytest.raises(ValueError, match="must have been decided"):
        _ = train.examples_per_update
    update = rehearse(small_network())
    settings = {"num_updates": 2, "num_images": 1_400, "device": torch.device("cpu")}
    with RunFolder.create(tmp_path / "run", find_recipe("digits")) as run:
        settled = settle_batch_size(train, update, **settings, decide_once=run.decide_once)  # type: ignore[arg-type]
    assert settled.examples_per_update in (32, 64)  # 70 is a 20th
    assert settled.model_copy(update={"batch_size": "auto"}) == train

    def never(num_images: int, /) -> None:
        raise AssertionError(num_images)

    with RunFolder.open(tmp_path / "run") as run:
        again = settle_batch_size(train, never, **settings, decide_once=run.decide_once)  # type: ignore[arg-type]
    assert again == settled


def test_a_run_larger_than_this_machine_is_refused() -> None:
    train = TrainConfig(epochs=1, batch_size=2**22)
    network = small_network()
    update, val = rehearse(network), validation_rehearsal(network, (3, 32, 32))
    cpu = torch.device("cpu")
    with pytest.raises(OutOfMemory, match=r"left by .*Set train.accumulation_steps=\d+"):
        check_memory(train, update, val, eval_batch_size=8, device=cpu)
    train = TrainConfig(epochs=1, batch_size=8)
    with pytest.raises(OutOfMemory, match=r"Set eval.batch_size=\d+"):
        check_memory(train, update, val, eval_batch_size=2**22, device=cpu)
    assert check_memory(train, update, val, eval_batch_size=8, device=cpu) > 100 * MB
    with pytest.raises(OutOfMemory, match="Not one image fits"):
        check_memory(train, update, val, eval_batch_size=8, device=cpu, beside_bytes=2**50)


def test_speed_is_measured_of_warm_updates() -> None:
    calls: list[int] = []
    measure = speed_of(calls.append, num_updates=2)
    assert measure(8) > 0
    assert measure(16) > 0
    assert calls == [8] + [8] * 3 + [16] * 3  # the first warms up


def test_a_control_flow_that_depends_on_the_images_falls_back_on_the_peaks() -> None:
    def run(num_images: int) -> None:
        held = [torch.empty(250_000) for _ in range(num_images)]  # 1 MB each
        del held

    memory = measure_memory(run)
    assert [memory.tensor_bytes(n) for n in (2, 10)] == [2 * MB, 10 * MB]
    assert list(itertools.chain(memory.fixed, memory.per_image)) == [0.0, 1.0 * MB]

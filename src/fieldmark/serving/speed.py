"""How fast each variant of a package is on this machine. Torch-free.

All that is compared runs interleaved: a round gives each combination of variant, batch and threads
one turn, in an order drawn anew, so that a machine that slows down meets them all. How many calls
a turn has is decided from the warm-up, before anything is timed.
"""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import count

import numpy as np
import numpy.typing as npt

from fieldmark.measure import Predict
from fieldmark.packaging.entries import Precision
from fieldmark.packaging.golden import read_golden
from fieldmark.packaging.manifest import WEIGHTS, Package
from fieldmark.preprocess import Pixels
from fieldmark.runtime import log
from fieldmark.runtime.memory import resident_bytes
from fieldmark.serving.workers import Setting, open_workers

Opener = Callable[[str, int], Predict]
"""A variant's name, threads -> the opened model."""

REFERENCE = "torch"  # the trained model, which is no variant
_WARM_CALLS = 2  # of each worker, twice: the first time allocates


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is timed, and what the package says of it."""

    name: str
    kind: str  # as in the manifest; torch for the trained model
    precision: Precision
    num_bytes: int  # of its file
    sha256: str
    obstacles: tuple[str, ...]  # why it is not deployable

    @property
    def deployable(self) -> bool:
        """Whether it may serve."""
        return not self.obstacles


@dataclass(frozen=True, slots=True)
class Combo:
    """One combination that is timed."""

    variant: str
    batch: int
    setting: Setting


@dataclass(frozen=True, slots=True)
class Timing:
    """What was measured of one combination."""

    combo: Combo
    latencies_ms: npt.NDArray[np.float64]  # (n,), of every call of all rounds
    images_per_s: npt.NDArray[np.float64]  # (rounds,)


@dataclass(frozen=True, slots=True)
class Memory:
    """What a variant takes at one setting, opened and warm."""

    variant: str
    setting: Setting
    num_bytes: int | None  # grown since before it was opened; None where the system does not say


@dataclass(frozen=True, slots=True)
class Plan:
    """What is timed with what, and for how long."""

    variants: tuple[str, ...]
    batches: tuple[int, ...]
    settings: tuple[Setting, ...]
    rounds: int
    seconds: float  # of all turns together, warm-up not counted
    seed: int

    @property
    def turn_s(self) -> float:
        """How long a turn should last."""
        num_combos = len(self.variants) * len(self.batches) * len(self.settings)
        return self.seconds / (self.rounds * num_combos)


@dataclass(slots=True)
class _Runner:
    """A combination, opened and warm."""

    combo: Combo
    predict: Predict
    images: Pixels
    pool: ThreadPoolExecutor
    call_s: float  # wall time by call, as the warm-up suggests
    num_calls: int  # timed in a turn, of all workers together

    @property
    def turn_s(self) -> float:
        """What a turn will take, the calls that are not timed included."""
        return (self.num_calls + self.combo.setting.workers) * self.call_s


def candidate(package: Package, name: str) -> Candidate:
    """Return what the package says of a variant, or of its trained model."""
    files = package.manifest.files
    if name == REFERENCE:
        entry, why = files[WEIGHTS], ("It is the trained model, not an exported variant.",)
        return Candidate(name, REFERENCE, "float32", entry.bytes, entry.sha256, why)
    variant = package.manifest.variants[name]
    return Candidate(
        name,
        variant.kind,
        variant.precision,
        package.num_bytes(variant),
        files[variant.file].sha256,
        tuple(variant.obstacles()),
    )


def example_pixels(package: Package, batch: int, seed: int) -> Pixels:
    """Return uint8 (batch, H, W, 3): golden samples, repeated, or noise where there are none."""
    if package.manifest.golden.count:
        pixels = read_golden(package).pixels
        return np.ascontiguousarray(pixels[np.arange(batch) % len(pixels)])
    spec = package.preprocess
    shape = (batch, spec.height_px, spec.width_px, 3)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def time_variants(
    plan: Plan, package: Package, candidates: Sequence[Candidate], opener: Opener
) -> tuple[list[Timing], list[Memory]]:
    """Open and time every combination of the plan; return times in its order, and the memory."""
    runners: list[_Runner] = []
    memory: list[Memory] = []
    images = {batch: example_pixels(package, batch, plan.seed) for batch in plan.batches}
    kinds = {item.name: item.kind for item in candidates}
    with ExitStack() as pools:
        with log.progress("warm up", len(plan.variants) * len(plan.settings), "models") as bar:
            for variant in plan.variants:
                for setting in plan.settings:
                    pool = pools.enter_context(ThreadPoolExecutor(setting.workers))
                    before = resident_bytes()
                    predict = open_workers(
                        partial(opener, variant), setting, shared=kinds[variant] == "onnx"
                    )
                    for batch, pixels in images.items():
                        combo = Combo(variant, batch, setting)
                        runners.append(_warm(combo, predict, pixels, pool, plan.turn_s))
                    memory.append(Memory(variant, setting, _grown(before)))
                    bar.advance(note=variant)
        _say_length(plan, runners)
        return _run(plan, runners), memory


def _warm(
    combo: Combo, predict: Predict, images: Pixels, pool: ThreadPoolExecutor, turn_s: float
) -> _Runner:
    """Return a combination after some calls, with as many calls a turn as fit into `turn_s`."""
    workers = combo.setting.workers
    runner = _Runner(combo, predict, images, pool, 0.0, _WARM_CALLS * workers)
    for _ in range(2):
        _, wall_s = _turn(runner)
    runner.call_s = wall_s / runner.num_calls
    runner.num_calls = max(workers, int(turn_s / runner.call_s) - workers)
    return runner


def _grown(before: int | None) -> int | None:
    after = resident_bytes()
    return None if before is None or after is None else max(0, after - before)


def _say_length(plan: Plan, runners: Sequence[_Runner]) -> None:
    expected_s = plan.rounds * sum(runner.turn_s for runner in runners)
    text = f"{len(runners)} combinations, {plan.rounds} rounds, {log.duration(expected_s)}"
    if expected_s > 1.2 * plan.seconds:
        slowest = max(runners, key=lambda runner: runner.turn_s)
        text += (
            f" instead of {log.duration(plan.seconds)}: a call of {slowest.combo.variant} with "
            f"batch {slowest.combo.batch} takes {slowest.call_s:.2g} s, and each needs two a turn. "
            "Fewer batches, threads or rounds are done sooner"
        )
    log.say(text)


def _run(plan: Plan, runners: Sequence[_Runner]) -> list[Timing]:
    """Give each combination its turn in every round."""
    latencies: list[list[float]] = [[] for _ in runners]
    rates = np.zeros((len(runners), plan.rounds))
    rng = np.random.default_rng(plan.seed)
    with log.progress("time", plan.rounds * len(runners), "turns") as bar:
        for number in range(plan.rounds):
            for index in rng.permutation(len(runners)).tolist():
                runner = runners[index]
                taken_ms, wall_s = _turn(runner)
                latencies[index] += taken_ms
                rates[index, number] = runner.num_calls * runner.combo.batch / wall_s
                bar.advance(note=f"round {number + 1}")
    return [
        Timing(runner.combo, np.array(taken), rate)
        for runner, taken, rate in zip(runners, latencies, rates, strict=True)
    ]


def _turn(runner: _Runner) -> tuple[list[float], float]:
    """Return the milliseconds of each call, and the seconds of all together.

    One call of each worker comes first and is not timed: it fills the caches that the other
    combinations emptied. Workers take the next call as they become free, as those of a service do.
    """
    predict, images, num_calls = runner.predict, runner.images, runner.num_calls
    started: list[float] = []
    gate = threading.Barrier(
        runner.combo.setting.workers, action=lambda: started.append(time.perf_counter())
    )
    numbers = count()

    def work() -> tuple[list[float], float]:
        try:
            predict(images)
        except BaseException:
            gate.abort()  # or the others would wait for this one
            raise
        gate.wait()
        taken_ms: list[float] = []
        now = time.perf_counter()
        while next(numbers) < num_calls:
            predict(images)
            before, now = now, time.perf_counter()
            taken_ms.append((now - before) * 1e3)
        return taken_ms, now

    futures = [runner.pool.submit(work) for _ in range(runner.combo.setting.workers)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    done = [future.result() for future in futures]
    wall_s = max(end for _, end in done) - started[0]
    return [one for taken_ms, _ in done for one in taken_ms], max(wall_s, 1e-9)

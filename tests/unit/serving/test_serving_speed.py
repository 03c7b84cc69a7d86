"""workers.py, speed.py and bench.py: what is opened, timed and planned. No assertion on times."""

import threading
from collections import Counter

import numpy as np
import pytest

from fieldmark.errors import ConfigError, PackageError, UnknownName
from fieldmark.packaging.golden import read_golden
from fieldmark.packaging.load import open_onnx
from fieldmark.packaging.manifest import open_package
from fieldmark.serving.bench import Asked, bench, make_plan
from fieldmark.serving.speed import Plan, candidate, example_pixels, time_variants
from fieldmark.serving.workers import (
    Setting,
    default_setting,
    default_settings,
    open_workers,
    parse_setting,
)


def asked(**changes):
    values = {
        "variants": (),
        "batches": (1, 3),
        "threads": ("1", "2x1"),
        "rounds": 4,
        "seconds": 0.05,
        "max_latency_ms": 500.0,
        "seed": 0,
    }
    return Asked(**(values | changes))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_settings():
    assert parse_setting("2", 4) == Setting(1, 2)
    assert parse_setting("4x1", 4) == Setting(4, 1)
    assert [str(one) for one in default_settings(4)] == ["1x1", "1x4", "4x1"]
    assert default_settings(1) == [Setting(1, 1)]
    assert [str(one) for one in default_settings(32)] == ["1x1", "1x32", "32x1", "4x8"]
    found = {n: str(default_setting(n)) for n in (1, 2, 8, 9, 64)}
    assert found == {1: "1x1", 2: "2x1", 8: "8x1", 9: "4x2", 64: "4x16"}
    assert Setting(2, 1).words() == "2 requests at a time with 1 thread each"
    for text in ("0", "x2", "2x0", "-1", "two", "2 x 1", "1.5"):
        with pytest.raises(ConfigError, match="threads must be a number, or calls x threads"):
            parse_setting(text, 64)
    with pytest.raises(ConfigError, match=r"at most 4 for each of the 2 cores.* Got 3x3"):
        parse_setting("3x3", 2)


def test_each_worker_has_a_model_of_its_own_and_no_more_run_at_once():
    inside, most, used = Counter(), [0], []
    lock = threading.Lock()

    def open_one(threads):
        number = len(used)
        used.append(threads)

        def predict(images):
            with lock:
                inside[number] += 1
                assert inside[number] == 1  # never two calls in one model
                most[0] = max(most[0], sum(inside.values()))
            meet()
            with lock:
                inside[number] -= 1
            return images

        return predict

    predict = open_workers(open_one, Setting(3, 2), shared=True)
    assert used == [2, 2, 2]
    gate = threading.Barrier(3)
    meet = gate.wait  # three calls are inside together, or this would never end
    callers = [threading.Thread(target=predict, args=(None,)) for _ in range(9)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(20)
    assert most == [3]
    used.clear()
    open_workers(open_one, Setting(3, 1), shared=True)
    assert used == [1]  # onnxruntime runs them in one session
    open_workers(open_one, Setting(3, 1), shared=False)
    assert used == [1, 1, 1, 1]


def test_inputs_are_golden_samples_repeated_or_noise(tiny_package, write_tiny_package):
    package = open_package(tiny_package)
    golden = read_golden(package).pixels
    assert np.array_equal(example_pixels(package, 6, 0), np.concatenate([golden, golden[:2]]))
    without = open_package(write_tiny_package(with_golden=False))
    noise = example_pixels(without, 3, 5)
    assert noise.shape == (3, 16, 16, 3)
    assert np.array_equal(noise, example_pixels(without, 3, 5))
    assert not np.array_equal(noise, example_pixels(without, 3, 6))


def plan_of(package, **changes):
    return make_plan(package, asked(**changes))


def test_every_combination_has_a_turn_in_every_round(tiny_package):
    """And they are interleaved: no round lists them in the same order as all others."""
    package = open_package(tiny_package)
    seen = []

    def opener(variant, threads):
        def predict(images):
            seen.append((threads, len(images)))
            return np.zeros((len(images), 3), np.float32)

        return predict

    plan = Plan(("onnx",), (1, 3, 5), (Setting(1, 1), Setting(1, 2)), 6, 1e-9, 0)
    timings, memory = time_variants(plan, package, [candidate(package, "onnx")], opener)
    assert [(t.combo.batch, t.combo.setting.threads) for t in timings] == [
        (batch, threads) for threads in (1, 2) for batch in (1, 3, 5)
    ]
    assert all(len(t.latencies_ms) == 6 and len(t.images_per_s) == 6 for t in timings)
    assert all((t.latencies_ms > 0).all() and (t.images_per_s > 0).all() for t in timings)
    assert [one.setting.threads for one in memory] == [1, 2]
    turns = seen[-6 * 6 * 2 :: 2]  # a call that is not timed, then one that is
    rounds = [tuple(turns[start : start + 6]) for start in range(0, 36, 6)]
    assert all(len(set(one)) == 6 for one in rounds)
    assert len(set(rounds)) > 1


def test_calls_fill_the_time_and_all_of_them_count(tiny_package):
    package = open_package(tiny_package)
    timed = Counter()

    def opener(variant, threads):
        def predict(images):
            timed[len(images)] += 1
            return np.zeros((len(images), 3), np.float32)

        return predict

    plan = Plan(("onnx",), (2,), (Setting(2, 1),), 3, 0.3, 0)
    [timing], _ = time_variants(plan, package, [candidate(package, "onnx")], opener)
    warm = 2 * (2 + 2 * 2)  # two turns of one call and two timed ones for each of two workers
    assert len(timing.latencies_ms) == timed[2] - warm - 3 * 2
    assert len(timing.latencies_ms) > 100


@pytest.mark.timeout(30)
def test_an_error_of_a_model_ends_the_measurement(tiny_package):
    package = open_package(tiny_package)
    calls = iter(range(10**6))

    def opener(variant, threads):
        def predict(images):
            if next(calls) == 5:
                raise PackageError("it broke.")
            return np.zeros((len(images), 3), np.float32)

        return predict

    plan = Plan(("onnx",), (1,), (Setting(2, 1),), 3, 0.1, 0)
    with pytest.raises(PackageError, match="it broke"):
        time_variants(plan, package, [candidate(package, "onnx")], opener)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batches": (4, 0)}, "batch must be at least 1. Got 0"),
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"seconds": 0}, "seconds must be above 0"),
        ({"seconds": float("inf")}, "seconds must be above 0"),
        ({"max_latency_ms": float("nan")}, "max_latency_ms must be above 0"),
        ({"threads": ("none",)}, "threads must be a number"),
    ],
)
def test_what_cannot_be_planned(tiny_package, changes, message):
    with pytest.raises(ConfigError, match=message):
        plan_of(open_package(tiny_package), **changes)


def test_a_plan_names_variants_that_exist_once(tiny_package):
    package = open_package(tiny_package)
    assert plan_of(package).variants == ("onnx",)
    assert plan_of(package, variants=["torch", "onnx", "torch"]).variants == ("torch", "onnx")
    with pytest.raises(UnknownName, match="Did you mean 'onnx'"):
        plan_of(package, variants=["onx"])


def test_facts_of_a_package_without_a_deployable_variant(tiny_package):
    package = open_package(tiny_package)
    facts = bench(package, asked(), lambda name, threads: open_onnx(package, name, threads))
    assert [(row["batch"], row["workers"]) for row in facts["rows"]] == [
        (1, 1), (3, 1), (1, 2), (3, 2),
    ]  # fmt: skip
    for row in facts["rows"]:
        rate, middle = row["images_per_s"], row["p50_ms"]
        assert rate["min"] <= rate["median"] <= rate["max"]
        assert rate["n"] == 4
        assert (row["p99_ms"] is None) == (middle["n"] < 100)
        assert row["ratio"] is None
    [variant] = facts["variants"]
    assert variant["deployable"] is False
    assert "Parity was not measured on real images." in variant["obstacles"]
    assert variant["bytes"] == package.manifest.files["variants/onnx.onnx"].bytes
    assert facts["preferred"] is None
    assert "deployable" in facts["why"]
    assert facts["machine"]["cores"] >= 1
    assert facts["versions"]["onnxruntime"]

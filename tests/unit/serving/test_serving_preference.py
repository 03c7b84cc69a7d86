"""preference.py: what is chosen from timings, what is kept of it, and what serves then."""

import json
import re
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from fieldmark.packaging.entries import GoldenCheck, Measured, Parity
from fieldmark.packaging.load import open_onnx
from fieldmark.packaging.manifest import open_package
from fieldmark.runtime.seed import derive_seed
from fieldmark.serving import preference
from fieldmark.serving.bench import Asked, bench
from fieldmark.serving.predictor import open_variant
from fieldmark.serving.preference import (
    choose,
    choose_served,
    preferred,
    read_record,
    record_path,
)
from fieldmark.serving.speed import Candidate, Combo, Timing
from fieldmark.serving.workers import Setting, default_setting


def timing(name, rate, *, ms=5.0, batch=1, workers=1, threads=2, noise=0.001, rounds=9):
    rng = np.random.default_rng(derive_seed(name, batch, workers, threads))
    combo = Combo(name, batch, Setting(workers, threads))
    return Timing(combo, np.full(200, ms), rate * rng.normal(1, noise, rounds))


def candidates(**more):
    """Variants by name: fp32 and int8 are deployable; the fast one is not."""
    listed = {
        "onnx": Candidate("onnx", "onnx", "float32", 100, "a" * 64, ()),
        "int8": Candidate("int8", "onnx", "int8", 30, "b" * 64, ()),
        "broken": Candidate("broken", "onnx", "int8", 25, "c" * 64, ("It disagrees.",)),
        "script": Candidate("script", "torchscript", "float32", 99, "d" * 64, ()),
        "torch": Candidate("torch", "torch", "float32", 99, "e" * 64, ("It is no variant.",)),
    }
    return listed | more


def chosen(*timings, limit=500.0):
    best, why = choose(timings, candidates(), limit)
    return None if best is None else (best.combo.variant, str(best.combo.setting)), why


def test_the_fastest_deployable_variant_is_chosen():
    found, why = chosen(timing("onnx", 100), timing("int8", 190), timing("broken", 900))
    assert found == ("int8", "1x2")
    assert "the most images/s" in why


@pytest.mark.parametrize("fast", ["broken", "script", "torch"])
def test_what_is_not_deployable_or_cannot_be_served_is_never_chosen(fast):
    assert chosen(timing(fast, 900), timing("onnx", 100))[0] == ("onnx", "1x2")
    found, why = chosen(timing(fast, 900))
    assert found is None
    assert "no variant that was measured is deployable" in why


def test_ties_within_the_noise_go_to_float32_then_to_fewer_calls_then_to_lower_latency():
    noisy = {"noise": 0.1}
    found, why = chosen(timing("onnx", 100, **noisy), timing("int8", 103, **noisy))
    assert found == ("onnx", "1x2")
    assert "within the noise" in why
    assert chosen(timing("onnx", 100), timing("int8", 103))[0] == ("int8", "1x2")  # beyond it
    side = timing("int8", 191, workers=2, threads=1, ms=10, noise=0.05)
    assert chosen(side, timing("int8", 190, noise=0.05))[0] == ("int8", "1x2")
    far = timing("int8", 260, workers=2, threads=1, ms=10, noise=0.05)
    assert chosen(far, timing("int8", 190, noise=0.05))[0] == ("int8", "2x1")
    slow, quick = timing("onnx", 100, ms=9, noise=0.05), timing("onnx", 99, batch=8, ms=8)
    assert chosen(slow, quick)[0] == ("onnx", "1x2")
    assert choose([slow, quick], candidates(), 500)[0] is quick


def test_a_latency_that_is_too_long_is_not_chosen():
    large = timing("int8", 300, batch=64, ms=600)
    assert chosen(large, timing("onnx", 100))[0] == ("onnx", "1x2")
    assert chosen(large, timing("onnx", 100), limit=700)[0] == ("int8", "1x2")
    found, why = chosen(large, timing("onnx", 100, ms=550), limit=10)
    assert found == ("onnx", "1x2")
    assert "none answers within 10 ms" in why
    # Of many calls the 99th percentile counts; of few, the slowest.
    spiky = timing("int8", 190)
    spiky.latencies_ms[0] = 5000
    assert chosen(spiky, timing("onnx", 100))[0] == ("int8", "1x2")
    few = Timing(spiky.combo, spiky.latencies_ms[:50], spiky.images_per_s)
    assert chosen(few, timing("onnx", 100))[0] == ("onnx", "1x2")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fieldmark" / "speed"


def add_variants(folder):
    """Give a copy two deployable variants, onnx and twin, of one content."""
    golden = GoldenCheck(
        num_samples=4,
        max_level_difference=0,
        allowed_level_difference=0,
        max_abs_delta_logit=0.0,
        tolerance=0.01,
        num_wrong_answers=0,
        instruction_set="any",
    )
    rate = Measured(value=1.0, low=0.99, high=1.0, n=2000)
    parity = Parity(
        top1_agreement=rate,
        max_abs_delta_logit=0.0,
        mean_abs_delta_logit=0.0,
        accuracy_drop=Measured(value=0.0, low=0.0, high=0.0, n=2000),
        data="drawn",
        instruction_set="any",
    )
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    measured = {"golden": golden.model_dump(), "parity": parity.model_dump()}
    variant = manifest["variants"]["onnx"] | measured
    manifest["variants"] = {"onnx": variant, "twin": variant}
    file.write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def folder(tiny_package, tmp_path):
    return add_variants(shutil.copytree(tiny_package, tmp_path / "package"))


def measure(folder, monkeypatch, rates, *, variants=(), workers=2, threads=1):
    """Bench with invented times: what `rates` says of each variant."""

    def time_variants(plan, package, listed, opener):
        return [
            timing(one.name, rates[one.name], workers=workers, threads=threads) for one in listed
        ], []

    monkeypatch.setattr("fieldmark.serving.bench.time_variants", time_variants)
    package = open_package(folder)
    asked = Asked(variants, (1,), (), 9, 1.0, 500.0, 0)
    return bench(package, asked, lambda name, threads: open_onnx(package, name, threads))


def test_the_choice_is_kept_and_found_again(folder, monkeypatch, cache):
    facts = measure(folder, monkeypatch, {"onnx": 100, "twin": 150})
    package = open_package(folder)
    assert facts["record"] == str(record_path(package))
    assert [path.name for path in cache.iterdir()] == [record_path(package).name]
    found = preferred(package)
    assert found is not None
    assert found.choice.model_dump() == facts["preferred"]
    assert (found.choice.variant, found.choice.workers, found.choice.threads) == ("twin", 2, 1)
    assert found.measured == ("onnx", "twin")
    served = choose_served(package)
    assert (served.variant, served.setting) == ("twin", Setting(2, 1))
    assert re.match(r"preferred on this machine: 1\d\d\.\d images/s on 20", served.why)


def test_what_is_asked_for_goes_first(folder, monkeypatch):
    package = open_package(folder)
    cores = preference.num_cores()
    before = choose_served(package)
    assert (before.variant, before.setting) == ("onnx", default_setting(cores))
    assert before.why == f"not measured here: fieldmark bench {folder}"
    measure(folder, monkeypatch, {"onnx": 100, "twin": 150})
    assert choose_served(package, "onnx").variant == "onnx"
    assert choose_served(package, "onnx").setting == default_setting(cores)
    assert choose_served(package, "twin").setting == Setting(2, 1)
    threads = choose_served(package, setting=Setting(1, 3))
    assert (threads.variant, threads.setting) == ("twin", Setting(1, 3))


@pytest.mark.parametrize("name", ["cpu_name", "instruction_set", "num_cores"])
def test_another_machine_has_another_record(folder, monkeypatch, capsys, name):
    measure(folder, monkeypatch, {"onnx": 100, "twin": 150})
    package = open_package(folder)
    here = record_path(package)
    monkeypatch.setattr(preference, name, lambda: 7 if name == "num_cores" else "another")
    assert record_path(package) != here
    assert preferred(package) is None
    assert choose_served(package).variant == "onnx"
    capsys.readouterr()
    shutil.copy(here, record_path(package))  # a record under a name that is not its own
    assert preferred(package) is None
    assert "it is of another machine" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "\0\xff",
        lambda text: "[]",
        lambda text: text.replace('"format_version": 1', '"format_version": 2'),
        lambda text: text.replace('"threads": 1', '"threads": 0'),
        lambda text: text.replace('"threads": 1', '"threads": "1"'),
        lambda text: text.replace('"why"', '"whence"'),
    ],
)
def test_a_damaged_record_is_ignored_with_a_note(folder, monkeypatch, capsys, damage):
    measure(folder, monkeypatch, {"onnx": 100, "twin": 150})
    package = open_package(folder)
    path = record_path(package)
    changed = damage(path.read_text())
    assert changed != path.read_text()
    path.write_text(changed, encoding="latin-1")
    capsys.readouterr()
    assert preferred(package) is None
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith(f"note: the speed record of {folder} was ignored: it is damaged.")
    assert choose_served(package).variant == "onnx"


def test_a_cache_that_cannot_be_read_or_written_is_no_error(folder, monkeypatch, capsys, cache):
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the folder should be")
    facts = measure(folder, monkeypatch, {"onnx": 100, "twin": 150})
    assert facts["record"] is None
    assert facts["preferred"]["variant"] == "twin"
    assert "could not be kept" in " ".join(capsys.readouterr().err.split())
    assert preferred(open_package(folder)) is None
    cache.unlink()
    record_path(open_package(folder)).mkdir(parents=True)
    assert preferred(open_package(folder)) is None
    assert "was ignored" in " ".join(capsys.readouterr().err.split())


def test_a_record_is_written_whole_or_not_at_all(folder, monkeypatch, cache):
    measure(folder, monkeypatch, {"onnx": 100, "twin": 150})
    path = record_path(open_package(folder))
    before = path.read_bytes()

    def fail(*arguments):
        raise OSError("no more")

    monkeypatch.setattr("fieldmark.runtime.files.os.fsync", fail)
    facts = measure(folder, monkeypatch, {"onnx": 300, "twin": 150})
    assert facts["record"] is None
    assert path.read_bytes() == before
    assert list(cache.iterdir()) == [path]


def test_a_relative_cache_folder_is_not_used(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert record_path(open_package(folder)).parent == tmp_path / ".cache/fieldmark/speed"


def edit(folder, change):
    file = folder / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest["variants"])
    file.write_text(json.dumps(manifest))
    return open_package(folder)


def test_a_choice_that_the_package_no_longer_bears_out_is_not_used(folder, monkeypatch):
    measure(folder, monkeypatch, {"onnx": 100, "twin": 150})
    package = edit(folder, lambda variants: variants["twin"].update(parity=None))
    assert preferred(package) is None
    assert choose_served(package).variant == "onnx"
    package = edit(folder, lambda variants: variants.pop("twin"))
    assert choose_served(package).variant == "onnx"


def test_a_choice_is_of_one_file(folder, monkeypatch):
    measure(folder, monkeypatch, {"onnx": 100, "twin": 150})
    path = record_path(open_package(folder))
    content = json.loads(path.read_text())
    content["choice"]["file_sha256"] = "0" * 64
    path.write_text(json.dumps(content))
    assert read_record(open_package(folder)) is not None
    assert preferred(open_package(folder)) is None


def test_a_variant_that_came_since_is_told(folder, monkeypatch):
    measure(folder, monkeypatch, {"onnx": 100, "twin": 150})
    package = edit(folder, lambda variants: variants.update(third=variants["onnx"]))
    assert f"; third came since: fieldmark bench {folder}" in choose_served(package).why


def test_some_variants_alone_do_not_decide(folder, monkeypatch, capsys):
    facts = measure(folder, monkeypatch, {"onnx": 100}, variants=["onnx"])
    assert facts["not_measured"] == ["twin"]
    assert facts["record"] is None
    assert "twin may be served too and was not measured" in " ".join(
        capsys.readouterr().err.split()
    )
    assert read_record(open_package(folder)) is None


def test_without_a_deployable_variant_none_is_recorded(tiny_package, monkeypatch):
    facts = measure(tiny_package, monkeypatch, {"onnx": 100})
    assert facts["preferred"] is None
    package = open_package(tiny_package)
    found = read_record(package)
    assert found is not None
    assert found.choice is None
    assert preferred(package) is None
    assert choose_served(package).variant == "onnx"


def no_torch(folder, variant):
    raise AssertionError("ONNX needs no torch")


def test_predict_takes_the_preferred_variant(folder, monkeypatch, capsys):
    opened = []

    def seen(package, variant, threads, device):
        opened.append((variant, threads))
        return open_onnx(package, variant, threads, device)

    monkeypatch.setattr("fieldmark.serving.predictor.open_served", seen)
    open_variant(folder, "auto", no_torch)
    measure(folder, monkeypatch, {"onnx": 100, "twin": 150}, workers=1, threads=2)
    capsys.readouterr()
    open_variant(folder, "auto", no_torch)
    assert "variant twin: preferred on this machine" in capsys.readouterr().err
    measure(folder, monkeypatch, {"onnx": 100, "twin": 150}, workers=2, threads=1)
    open_variant(folder, "auto", no_torch)
    open_variant(folder, "onnx", no_torch)
    assert opened == [("onnx", 0), ("twin", 2), ("twin", 0), ("onnx", 0)]


SERVE = "import sys; from fieldmark.serving.server import serve; serve(sys.argv[1], port=0)"


def test_a_service_takes_the_preferred_variant_and_says_so(folder, monkeypatch):
    measure(folder, monkeypatch, {"onnx": 100, "twin": 150})
    command = [sys.executable, "-c", SERVE, str(folder)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stderr.readline()
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    setting = "2 requests at a time with 1 thread each"
    assert f"with variant twin on cpu ({setting}: preferred on" in line


def test_a_variant_of_which_each_call_has_a_copy_begins_with_one_call(folder):
    package = open_package(folder)
    package.manifest.variants["twin"] = package.manifest.variants["twin"].model_copy(
        update={"kind": "openvino"}
    )
    assert choose_served(package, "twin").setting == Setting(1, preference.num_cores())

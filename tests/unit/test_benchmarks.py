"""What benchmarks share: a results file that grows by rows, and the long-tailed images."""

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from fieldmark.config import RunConfig
from fieldmark.cookbook import load_recipe
from fieldmark.data.images import ArrayImages
from fieldmark.data.source import Source, Split, open_source
from fieldmark.errors import CheckFailed, ConfigError, DataError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def results_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not BENCHMARKS.is_dir():
        pytest.skip("the benchmarks are in the repository alone")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import results_file

    monkeypatch.setattr(results_file, "RESULTS", tmp_path)
    return results_file


@pytest.fixture
def imbalance(results_file: ModuleType) -> ModuleType:
    import imbalance

    assert imbalance.results_file is sys.modules["results_file"]
    return imbalance


def test_rows_are_added_and_found_again(results_file: ModuleType, tmp_path: Path) -> None:
    assert results_file.rows("speed") == []
    for seed in range(2):
        row = {"method": "a", "seed": seed, "rate": 10.0 * seed}
        results_file.append_row("speed", "run", row, lambda rows: {"num_rows": len(rows)})
    content = json.loads((tmp_path / "speed.json").read_text())
    assert (content["command"], content["num_rows"]) == ("run", 2)
    assert [row["rate"] for row in content["rows"]] == [0, 10]
    assert all({"machine", "commit", "date"} <= set(row) for row in content["rows"])
    found = results_file.rows("speed")
    assert results_file.has_row(found, {"method": "a", "seed": 1})
    assert not results_file.has_row(found, {"method": "a", "seed": 2})
    assert not results_file.has_row(found, {"method": "a", "speed": 1})
    results_file.write_rows("speed", "run", [])
    assert results_file.rows("speed") == []


def test_a_row_is_whole_or_not_there(
    results_file: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results_file.append_row("speed", "run", {"seed": 0})
    before = (tmp_path / "speed.json").read_bytes()

    def stop(_: object) -> dict[str, object]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        results_file.append_row("speed", "run", {"seed": 1}, stop)
    assert (tmp_path / "speed.json").read_bytes() == before


def test_differences_are_taken_seed_by_seed(imbalance: ModuleType) -> None:
    def row(method: str, seed: int, accuracy: float) -> dict[str, object]:
        return {
            "method": method,
            "seed": seed,
            "epochs": 8.0,
            "settings": imbalance.settings_of(method, 8.0),
            "balanced_accuracy": accuracy,
            "worst_recall": accuracy / 2,
        }

    rows = [row("plain", 0, 0.5), row("plain", 1, 0.6), row("focal", 1, 0.65)]
    rows += [row("focal", 0, 0.45), row("focal", 2, 0.9)]
    rows.append(row("focal", 3, 0.1) | {"settings": ["of another day"]})
    of_8 = imbalance.summarise(rows)["summary"]["8 epochs"]
    assert of_8["plain"]["balanced_accuracy"] == {"n": 2, "median": 0.55, "min": 0.5, "max": 0.6}
    assert of_8["focal"]["balanced_accuracy"]["n"] == 3
    minus = of_8["focal"]["balanced_accuracy"]["minus_plain"]
    assert minus == pytest.approx({"n": 2, "median": 0, "min": -0.05, "max": 0.05})


def test_the_long_tail_is_chosen_once_and_reads_back(
    imbalance: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert imbalance.class_sizes() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(imbalance, "LARGEST", 20)
    monkeypatch.setattr(imbalance, "FACTOR", 10)
    pixels = np.random.default_rng(0).integers(0, 256, (90, 4, 4, 3), dtype=np.uint8)
    labels = np.arange(90, dtype=np.int64) % 3
    splits = {name: Split(name, ArrayImages(pixels, name), labels) for name in ("train", "test")}
    source = Source("made", ("b", "a", "c"), None, splits, "f" * 64)
    folder = imbalance.long_tailed(source)
    found = open_source(f"hf:{folder}")
    assert found.class_names == source.class_names
    train = found.splits["train"]
    assert np.bincount(train.labels).tolist() == [20, 6, 2]
    chosen = imbalance.choose(source)
    assert train.labels.tolist() == labels[chosen].tolist()
    for place, index in enumerate(chosen):
        assert (np.asarray(train.images.image(place)) == pixels[index]).all()
    assert found.splits["test"].labels.tolist() == labels.tolist()
    assert imbalance.long_tailed(source) == folder
    assert len(list(folder.parent.iterdir())) == 1  # nothing unfinished is left behind
    monkeypatch.setattr(imbalance, "LARGEST", 31)
    with pytest.raises(DataError, match="must have 31 train images of b. Got 30"):
        imbalance.choose(source)


def test_the_settings_of_races_models_and_fine_tuning_are_understood(
    results_file: ModuleType,
) -> None:
    import finetune
    import models
    import profile_step
    import race

    told = [(race.RECIPE, settings) for settings in race.ARMS.values()]
    told += [(race.RECIPE, settings) for settings in profile_step.CASES.values()]
    told += [*models.MODELS.values(), *finetune.JOBS.values()]
    for recipe, settings in told:
        load_recipe(recipe, [*settings, "model.pretrained=x"] if "probe" in recipe else settings)
    plain = load_recipe(race.RECIPE, race.ARMS["plain"])
    assert (plain.train.batch_size, plain.train.epochs, plain.augment.sizes) == (2000, 8, ())
    assert plain.optim.filter_lr == 0.24
    assert plain.optim.weight_decay * plain.optim.lr == pytest.approx(4e-3)
    assert len({race.fingerprint(arm) for arm in race.ARMS}) == len(race.ARMS)


def test_a_model_of_the_cache_is_taken_only_if_it_is_the_one_asked_for(
    results_file: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import models

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    run = models.cache_folder() / "cifar10"
    run.mkdir(parents=True)
    config = load_recipe("cifar10-fast94", ["data.source=hf:elsewhere"])

    def keep(config: RunConfig, accuracy: float) -> None:
        (run / "config.json").write_text(config.model_dump_json())
        (run / "metrics.json").write_text(json.dumps({"top1_accuracy": {"value": accuracy}}))

    keep(config, 0.9)
    assert models.model("cifar10", "hf:here") == run
    keep(load_recipe("cifar10-fast94", ["train.epochs=1"]), 0.9)
    with pytest.raises(ConfigError, match=r"another train\.epochs\. Remove it"):
        models.model("cifar10", "hf:here")
    keep(config, 0.88)
    with pytest.raises(CheckFailed, match=r"must have a top-1 accuracy of 89%\. Got 88\.00%"):
        models.model("cifar10", "hf:here")

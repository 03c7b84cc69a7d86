"""What a user types: verbs, --json, exit statuses, and one sentence for each mistake."""

import io
import json
import shutil
import sys
from pathlib import Path

import pytest

from fieldmark import cli

VERBS = [
    "train",
    "evaluate",
    "package",
    "export",
    "quantize",
    "verify",
    "calibrate",
    "predict",
    "serve",
    "recipes",
    "info",
    "bench",
    "augment",
    "quickstart",
    "lr-find",
    "sweep",
    "push",
    "pull",
]


class Cli:
    """Runs the command line in this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        self.status, self.out, self.err = 0, "", ""

    def __call__(self, *arguments: object) -> "Cli":
        self._monkeypatch.setattr(sys, "argv", ["fieldmark", *map(str, arguments)])
        self._capsys.readouterr()
        try:
            cli.main()
            self.status = 0
        except SystemExit as stop:
            self.status = int(stop.code or 0)
        captured = self._capsys.readouterr()
        self.out, self.err = captured.out, captured.err
        return self

    @property
    def json(self) -> dict[str, object]:
        """What --json printed: exactly one object on stdout."""
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(monkeypatch, capsys)


@pytest.mark.parametrize("verb", VERBS)
def test_help_fits_a_screen(run: Cli, verb: str) -> None:
    run(verb, "--help")
    assert run.status == 0
    lines = run.out.splitlines()
    assert len(lines) <= 40
    assert "--json" in run.out


def test_the_verbs_are_those_of_the_python_package(run: Cli) -> None:
    import fieldmark

    run("--help")
    for verb in VERBS:
        assert verb in run.out
        assert callable(getattr(fieldmark, verb.replace("-", "_")))
    assert run("--version").out.strip() == fieldmark.__version__


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "cifar10-smok"], "recipe 'cifar10-smok' does not exist. Did you mean"),
        (["train", "digits", "optim.lrr=1"], "Did you mean 'optim.lr'?"),
        (["train", "digits", "epochs=3"], "a setting must be section.key=value. Got 'epochs=3'."),
        (["train", "digits", "model.arch=resnet81"], "Did you mean 'resnet18'?"),
        (["train", "digits", "data.source=folder:nowhere"], "path that does not exist"),
        (["train", "digits", "data.source=digts"], "does not exist. Did you mean 'digits'?"),
        (["train", "digits", "train.batch_size=5000"], "train.batch_size must be at most"),
        (["train", "digits", "model.image_px=8"], "smallest size that works is 9 px"),
        (["train", "digits", "train.device=tpu"], "train.device: Input should be"),
        (["train"], "See: fieldmark recipes."),
        (["train", "--resume"], "--out DIR"),
        (["evaluate", "nowhere", "--data", "digits"], "model 'nowhere' does not exist"),
        (["evaluate", "timm:resnt18", "--data", "digits"], "Did you mean 'resnet18'?"),
        (["evaluate", "local-dir:nowhere", "--data", "digits"], "config.json"),
        (["package", "timm:resnet18", "--out", "p", "--golden", "data"], "--data SOURCE"),
        (["export", "nowhere"], "nowhere must be a package. It does not exist."),
        (["verify", "."], "It has no manifest.json."),
        (["predict", "nowhere", "x.png"], "nowhere must be a package"),
        (["serve", "nowhere", "--port", "0"], "nowhere must be a package"),
        (["augment", "digts"], "does not exist. Did you mean 'digits'?"),
        (["augment", "digits", "augment.polic=auto"], "Did you mean 'augment.policy'?"),
        (["augment", "digits", "--recipe", "digit"], "recipe 'digit' does not exist."),
        (["augment", "digits", "--out", "no/x.png"], "must be in a folder that exists"),
        (["augment", "digits", "augment.sizes=[[0,999]]"], "augment.sizes must be from 8 px"),
        (["push", "nowhere", "file:///x"], "nowhere must be a package"),
        (["push", "nowhere", "packages/x"], "file:///srv/packages/birds. Got 'packages/x'."),
        (["push", "nowhere", "hf:one"], "hf:OWNER/NAME or hf:OWNER/NAME@REVISION. Got 'hf:one'."),
        (["push", "nowhere", "nofs://x/y"], "must be of a file system that fsspec knows"),
        (["pull", "packages/x", "--out", "y"], "SOURCE must be hf:OWNER/NAME or a URL"),
        (["pull", "memory://no/where", "--out", "y"], "It has no manifest.json."),
        (["pull", "memory://no/where", "--out", "."], ". must not exist."),
        (["pull", "memory://x", "--out", "y", "--expect", "ab"], "64 digits of 0-9 and a-f"),
        (["info", "nowhere"], "data.source 'nowhere' does not exist"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_status_2(
    run: Cli, in_empty_folder: Path, arguments: list[str], message: str
) -> None:
    run(*arguments)
    assert run.status == 2, run.err
    flat = " ".join(run.err.split())
    assert message in flat
    assert "Traceback" not in run.err
    assert run.out == ""
    as_json = run(*arguments, "--json").json["error"]
    assert message in " ".join(as_json["message"].split())  # type: ignore[index]


@pytest.mark.parametrize(
    ("world", "message"),
    [("abc", "Got 'abc'. Unset it to train in one process."), ("2", "Start them with torchrun")],
)
def test_an_environment_that_torchrun_did_not_set_is_one_sentence(
    run: Cli, in_empty_folder: Path, monkeypatch: pytest.MonkeyPatch, world: str, message: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    run("train", "digits")
    assert run.status == 2
    assert message in " ".join(run.err.split())
    assert "Traceback" not in run.err


def test_a_mistake_leaves_no_run_behind(run: Cli, in_empty_folder: Path) -> None:
    run("train", "digits", "data.source=folder:nowhere")
    assert run.status == 2
    assert not list(in_empty_folder.rglob("config.json"))


def test_recipes_are_listed(run: Cli) -> None:
    found = {item["name"]: item for item in run("recipes", "--json").json["recipes"]}  # type: ignore[union-attr]
    assert {"digits", "cifar10-resnet18", "cifar10-resnet50", "cifar10-smoke", "finetune"} <= (
        found.keys()
    )
    assert "cifar10-smoke" in run("recipes").out


def test_train_prints_the_result_and_json_says_the_same(
    run: Cli, tmp_path: Path, tiny_settings: list[str]
) -> None:
    short = [s for s in tiny_settings if "epochs" not in s] + ["train.steps=3"]
    run("train", "digits", *short, "--out", tmp_path / "a")
    assert run.status == 0
    assert "measured on test" in run.out
    assert "95 % interval" in run.out
    assert "striped" in run.out
    facts = run("train", "digits", *short, "--out", tmp_path / "b", "--json").json
    rate = facts["top1_accuracy"]
    assert isinstance(rate, dict)
    assert set(rate) == {"value", "low", "high", "n"}
    assert 0 <= rate["low"] <= rate["value"] <= rate["high"] <= 1
    assert facts["package"] == str(tmp_path / "b" / "package")


def test_evaluate_agrees_with_the_run_and_between_variants(
    run: Cli, tiny_package: Path, tiny_run: Path, tiny_images: Path
) -> None:
    data = f"folder:{tiny_images}"
    recorded = json.loads((tiny_run / "metrics.json").read_text())
    torch_result = run("evaluate", tiny_run, "--data", data, "--json").json
    assert torch_result["top1_accuracy"] == recorded["top1_accuracy"]
    assert torch_result["loss"] == pytest.approx(recorded["loss"], rel=1e-5)
    onnx = run("evaluate", tiny_package, "--data", data, "--variant", "onnx", "--json").json
    assert onnx["confusion"] == torch_result["confusion"]
    assert (tiny_run / "evaluations" / "test-torch" / "predictions.npz").is_file()
    assert "balanced accuracy" in run("evaluate", tiny_run, "--data", data).out


def test_evaluate_without_a_test_split_uses_what_training_held_out(
    run: Cli, tiny_run: Path, tiny_images: Path
) -> None:
    val = run("evaluate", tiny_run, "--data", f"folder:{tiny_images}", "--split", "val", "--json")
    assert val.json["num_examples"] == 16
    run("evaluate", tiny_run, "--data", f"folder:{tiny_images}", "--split", "tset")
    assert run.status == 2
    assert "Did you mean 'test'" in run.err


def test_labels_are_matched_by_name(
    run: Cli, tiny_package: Path, tiny_images: Path, tmp_path: Path
) -> None:
    some = tmp_path / "some"
    for name in ("striped", "green"):  # fewer classes: by index they would be 0 and 1
        shutil.copytree(tiny_images / "test" / name, some / name)
    few = run("evaluate", tiny_package, "--data", f"folder:{some}", "--json").json
    assert set(few["per_class_accuracy"]) == {"striped", "green"}  # type: ignore[call-overload]
    assert few["top1_accuracy"]["value"] > 0.5  # type: ignore[index]
    (some / "green").rename(some / "gren")
    run("evaluate", tiny_package, "--data", f"folder:{some}")
    assert run.status == 2
    assert "'gren' is none of them. Did you mean 'green'?" in " ".join(run.err.split())


def test_a_source_that_changed_is_not_taken_for_unseen_images(
    run: Cli, tmp_path: Path, tiny_settings: list[str], tiny_images: Path
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "run"
    shutil.copytree(tiny_images / "train", photos)
    settings = [s for s in tiny_settings if not s.startswith(("data.source", "train.epochs"))]
    settings += [f"data.source=folder:{photos}", "data.test_frac=0.25", "train.steps=2"]
    assert run("train", "digits", *settings, "--out", out).status == 0
    assert run("evaluate", out, "--data", f"folder:{photos}", "--json").json["num_examples"] == 16
    shutil.copy(photos / "red" / "00.png", photos / "red" / "99.png")
    run("evaluate", out, "--data", f"folder:{photos}")
    assert run.status == 2
    assert "Its fingerprint changed" in " ".join(run.err.split())
    run("evaluate", out, "--data", f"folder:{photos}", "--split", "all")
    assert run.status == 0


def test_a_variant_that_disagreed_is_not_served_or_used(
    run: Cli, tiny_package: Path, tiny_image_files: list[Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_package, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["variants"]["onnx"]["parity"]["top1_agreement"]["value"] = 0.5
    (copy / "manifest.json").write_text(json.dumps(manifest))
    run("predict", copy, tiny_image_files[0], "--variant", "onnx")
    assert run.status == 1
    assert "must agree with the trained model" in " ".join(run.err.split())


def test_paths_that_cannot_be_written_are_one_sentence(run: Cli, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    run("train", "digits", "--out", file / "run")
    assert run.status == 2
    assert "Traceback" not in run.err
    run("train", "digits", "--out", tmp_path / "run", "--pie", tmp_path / "no" / "pie.png")
    assert run.status == 2
    assert "must be in a folder that exists" in " ".join(run.err.split())
    assert not (tmp_path / "run").exists()


def test_a_broken_image_is_an_error_in_evaluation(
    run: Cli, tiny_package: Path, tiny_images: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    shutil.copytree(tiny_images / "test", data)
    (data / "red" / "00.png").write_bytes(b"not an image")
    run("evaluate", tiny_package, "--data", f"folder:{data}")
    assert run.status == 2
    assert "red/00.png" in " ".join(run.err.split())


def test_verify_passes_and_fails_with_its_exit_status(
    run: Cli, tiny_package: Path, tmp_path: Path, tiny_images: Path
) -> None:
    run("verify", tiny_package)
    assert run.status == 0
    assert "top-1 agreement" in run.out
    result = run("verify", tiny_package, "--data", f"folder:{tiny_images}", "--json").json
    onnx = result["variants"]["onnx"]  # type: ignore[index]
    assert onnx["deployable"] is True
    assert onnx["parity"]["top1_agreement"]["value"] == 1.0
    copy = tmp_path / "copy"
    shutil.copytree(tiny_package, copy)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    run("verify", copy)
    assert run.status == 1
    assert "must match its SHA-256" in " ".join(run.err.split())


def test_torchscript_is_exported_and_verified_too(
    run: Cli, tiny_package: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_package, copy)
    run("export", copy, "--to", "torchscript")
    assert run.status == 0, run.err
    assert "deprecates TorchScript" in run.err
    info = run("info", copy, "--json").json
    assert set(info["variants"]) == {"onnx", "torchscript"}  # type: ignore[call-overload]
    image = str(copy / "golden" / "000.png")
    answers = [
        run("predict", copy, image, "--variant", name, "--json").json["results"]
        for name in ("onnx", "torchscript", "torch")
    ]
    best = [answer[0]["predictions"][0] for answer in answers]  # type: ignore[index]
    assert len({b["class_name"] for b in best}) == 1
    assert best[0]["probability"] == pytest.approx(best[2]["probability"], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("to", "note", "operator"),
    [
        ("pt2", "torch does not promise to read .pt2 files in later versions", "conv2d"),
        ("openvino", "exported", "Convolution"),
    ],
)
def test_other_formats_are_exported_verified_and_used(
    run: Cli,
    tiny_package: Path,
    tiny_images: Path,
    tmp_path: Path,
    to: str,
    note: str,
    operator: str,
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_package, copy)
    run("export", copy, "--to", to)
    assert run.status == 0, run.err
    assert note in run.err
    assert "verified" in run.out
    variant = run("info", copy, "--json").json["variants"][to]  # type: ignore[index]
    files = [variant["file"], *filter(None, [variant["weights_file"]])]
    assert len(files) == (2 if to == "openvino" else 1)
    assert variant["bytes"] == sum((copy / file).stat().st_size for file in files)
    assert variant["graph"]["operators"][operator] == 7
    assert variant["deployable"] is True
    assert run("verify", copy, "--variant", to).status == 0
    data = f"folder:{tiny_images}"
    scores = [
        run("evaluate", copy, "--data", data, "--variant", name, "--json").json["top1_accuracy"]
        for name in (to, "torch")
    ]
    assert scores[0] == scores[1]
    image = copy / "golden" / "000.png"
    assert run("predict", copy, image, "--variant", to).status == 0
    shown = run("info", copy).out
    assert f"{to}: {to}, float32" in shown
    assert f"{operator} 7" in shown
    run("export", copy, "--to", to, "--features")
    assert run.status == 2
    assert f"must be given with --to onnx. Got {to}" in " ".join(run.err.split())


def test_class_maps_of_a_network_that_has_none_are_refused(
    run: Cli, tiny_package: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_package, copy)
    before = (copy / "manifest.json").read_bytes()
    run("export", copy, "--features")
    assert run.status == 2
    assert "Got AirNet: its logits are not the mean" in " ".join(run.err.split())
    assert (copy / "manifest.json").read_bytes() == before


@pytest.mark.slow
def test_class_maps_are_exported_and_told(run: Cli, tmp_path: Path) -> None:
    import torch

    from fieldmark.model import Architecture, build

    weights, names, out = tmp_path / "weights.pth", tmp_path / "names.txt", tmp_path / "package"
    torch.save(build(Architecture("test_resnet", 3)).state_dict(), weights)
    names.write_text("a\nb\nc\n")
    more = ("--arch", "test_resnet", "--classes", names, "--image-px", "64")
    assert run("package", weights, "--out", out, *more).status == 0, run.err
    run("export", out, "--features")
    assert run.status == 0, run.err
    shown = run("info", out).out
    assert "features, float32 (batch, 96, 2, 2)" in shown
    assert "onnx: onnx, float32, opset 20" in shown
    assert "Conv 15" in shown
    image = next((out / "golden").glob("*.png"))
    assert run("predict", out, image).status == 0


def test_predict_ranks_classes_and_goes_on_after_a_broken_file(
    run: Cli, tiny_package: Path, tiny_image_files: list[Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(tiny_image_files[0].read_bytes()[:40])
    run("predict", tiny_package, tiny_image_files[0], broken, tiny_image_files[1], "--json")
    assert run.status == 1
    first, second, third = run.json["results"]  # type: ignore[misc]
    assert "error" in second
    for result in (first, third):
        probabilities = [p["probability"] for p in result["predictions"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1.0)
    run("predict", tiny_package, tiny_image_files[0], "--top-k", "2")
    assert run.status == 0
    assert len(run.out.splitlines()) == 3
    out = tmp_path / "answers.csv"
    run("predict", tiny_package, tiny_image_files[0].parent, broken, "--csv", out, "--top-k", "1")
    assert run.status == 1
    rows = out.read_text().splitlines()
    assert len(rows) == 1 + 8 + 1


def test_predict_reads_standard_input(
    run: Cli, tiny_package: Path, tiny_image_files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    stdin = io.TextIOWrapper(io.BytesIO(tiny_image_files[0].read_bytes()))
    monkeypatch.setattr(sys, "stdin", stdin)
    run("predict", tiny_package, "-", "--json")
    assert run.json["results"][0]["file"] == "-"  # type: ignore[index]


def test_info_counts_classes_and_draws_them(run: Cli, tiny_images: Path, tmp_path: Path) -> None:
    pie = tmp_path / "pie.png"
    run("info", f"folder:{tiny_images}", "--pie", pie)
    assert run.status == 0
    assert "striped" in run.out
    assert pie.read_bytes().startswith(b"\x89PNG")
    facts = run("info", f"folder:{tiny_images}", "--json").json
    assert facts["num_images"] == {"train": 64, "test": 32}
    assert facts["class_counts"][0] == {"class_name": "blue", "train": 16, "test": 8}  # type: ignore[index]


def test_info_describes_packages_and_runs(run: Cli, tiny_package: Path, tiny_run: Path) -> None:
    facts = run("info", tiny_package, "--json").json
    assert facts["class_names"] == ["blue", "green", "red", "striped"]
    assert facts["variants"]["onnx"]["opset"] == 20  # type: ignore[index]
    assert run("info", tiny_run, "--json").json["has_package"] is True
    run("info", tiny_run.parent)
    assert "folder:" in run.err


def test_package_copies_a_run_with_synthetic_or_no_golden_samples(
    run: Cli, tiny_run: Path, tmp_path: Path
) -> None:
    for golden, count in (("synthetic", 12), ("none", 0)):
        out = tmp_path / golden
        run("package", tiny_run, "--out", out, "--golden", golden, "--license", "CC0-1.0")
        assert run.status == 0, run.err
        facts = run("info", out, "--json").json
        assert facts["golden"] == {"kind": golden, "count": count}
        assert facts["license"] == "CC0-1.0"
    run("package", tiny_run, "--out", tmp_path / "none")
    assert run.status == 2
    assert "must be empty or not exist" in " ".join(run.err.split())


def test_a_state_dict_becomes_a_package(run: Cli, tmp_path: Path, tiny_images: Path) -> None:
    import torch

    from fieldmark.model import Architecture, build

    torch.manual_seed(0)
    network = build(Architecture("test_resnet", 4))
    weights, names = tmp_path / "weights.pth", tmp_path / "names.txt"
    torch.save(network.state_dict(), weights)
    names.write_text("red\ngreen\nblue\nstriped\n")
    base = ["package", weights, "--out", tmp_path / "package"]
    assert "--arch NAME" in run(*base).err
    assert "--classes FILE" in " ".join(run(*base, "--arch", "test_resnet").err.split())
    run(*base, "--arch", "test_resnet", "--classes", names, "--data", f"folder:{tiny_images}")
    assert run.status == 0, run.err
    facts = run("info", tmp_path / "package", "--json").json
    assert facts["class_names"] == ["red", "green", "blue", "striped"]
    assert facts["golden"]["kind"] == "data"  # type: ignore[index]
    assert "test" in facts["metrics"]  # type: ignore[operator]


@pytest.mark.slow
def test_augment_draws_what_training_will_see(run: Cli, in_empty_folder: Path) -> None:
    from PIL import Image

    grid = in_empty_folder / "grid.png"
    facts = run("augment", "digits", "--out", grid, "--rows", "3", "--json").json
    assert run.status == 0, run.err
    assert "policy auto: strong" in run.err
    assert facts["augment"]["policy"] == "custom"  # type: ignore[index]
    assert (facts["storage"], facts["rows"], facts["image_px"]) == ("resident", 3, [32, 32])
    first = grid.read_bytes()
    size = Image.open(grid).size
    assert size[0] > size[1] > 400
    run("augment", "digits", "--out", grid, "--rows", "3")
    assert "rotation up to 15" in " ".join(run.out.split())
    assert grid.read_bytes() == first  # the same draws
    settings = ["augment.policy=none", "augment.ops=trivialaugment"]
    recipe = run("augment", "digits", *settings, "--recipe", "digits", "--out", grid, "--json").json
    assert recipe["storage"] == "files"
    assert recipe["applied"] == "trivialaugment"  # not the recipe's own shift
    assert grid.read_bytes() != first


def test_keys_are_made_listed_and_taken_away(run: Cli, in_empty_folder: Path) -> None:
    file = in_empty_folder / "keys.json"
    made = run("keys", "add", "shop", "--file", file, "--per-minute", 600, "--json").json
    assert (made["name"], made["file"]) == ("shop", str(file))
    assert str(made["key"]) not in file.read_text()
    assert run("keys", "add", "press", "--file", file, "--expires", "2999-01-31").out.strip()
    listed = run("keys", "list", "--file", file, "--json").json["keys"]
    assert isinstance(listed, list)
    found = [(one["name"], one["expires"], one["images_per_minute"]) for one in listed]
    assert found == [("shop", None, 600), ("press", "2999-01-31", None)]
    assert "2999-01-31" in run("keys", "list", "--file", file).out
    assert run("keys", "remove", "shop", "--file", file, "--json").json["name"] == "shop"
    assert "press is no longer" in run("keys", "remove", "press", "--file", file).err
    assert run("keys", "list", "--file", file, "--json").json == {"keys": []}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["remove", "shpo"], "Did you mean 'shop'?"),
        (["add", "shop"], "'shop' is in use"),
        (["add", "a b"], "name must have"),
        (["add", "press", "--expires", "soon"], "expires must be a day such as 2030-01-31"),
        (["add", "press", "--per-minute", "0"], "per-minute"),
    ],
)
def test_a_mistake_with_keys_is_one_sentence_and_changes_nothing(
    run: Cli, in_empty_folder: Path, arguments: list[str], message: str
) -> None:
    file = in_empty_folder / "keys.json"
    run("keys", "add", "shop", "--file", file)
    before = file.read_bytes()
    run("keys", *arguments, "--file", file)
    assert (run.status, run.out) == (2, "")
    assert message in run.err
    assert "Traceback" not in run.err
    assert file.read_bytes() == before

"""`fieldmark bench` on a package that was really trained and exported. No assertion on times."""

import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fieldmark import cli
from fieldmark.packaging.manifest import open_package
from fieldmark.pipeline import export
from fieldmark.serving.preference import preferred, record_path

FAST = ["--seconds", "0.3", "--rounds", "3"]
Bench = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bench:
    """Run the verb in this process: exit status, stdout, stderr on one line."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fieldmark", "bench", *map(str, arguments)])
        capsys.readouterr()
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        printed = capsys.readouterr()
        return status, printed.out, " ".join(printed.err.split())

    return run


def test_the_best_variant_is_recorded_and_shown(
    bench: Bench, tiny_package: Path, tmp_path: Path
) -> None:
    manifest = (tiny_package / "manifest.json").read_bytes()
    status, out, _ = bench(tiny_package, "--show")
    assert status == 0
    assert f"next: fieldmark bench {tiny_package}" in out
    results, picture = tmp_path / "results.json", tmp_path / "speed.png"
    status, out, err = bench(tiny_package, *FAST, "--out", results, "--plot", picture)
    assert status == 0, err
    assert "p99 ms" in out
    assert "preferred on this machine: onnx, " in out
    assert Image.open(picture).size > (500, 300)
    facts = json.loads(results.read_text())
    assert {row["batch"] for row in facts["rows"]} == {1, 8}
    assert facts["preferred"]["variant"] == "onnx"
    assert (tiny_package / "manifest.json").read_bytes() == manifest
    found = preferred(open_package(tiny_package))
    assert found is not None
    assert found.choice is not None
    assert found.choice.model_dump() == facts["preferred"]
    shown = json.loads(bench(tiny_package, "--show", "--json")[1])
    assert shown["preferred"] == facts["preferred"]
    assert shown["record"] == str(record_path(open_package(tiny_package)))
    _, out, _ = bench(tiny_package, "--show")
    assert "preferred on this machine: onnx, " in out
    assert shown["machine"]["cpu"] in " ".join(out.split())


def test_what_torch_runs_is_timed_beside_but_never_preferred(
    bench: Bench, tiny_package: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_package, copy)
    export(str(copy), "torchscript")
    names = [word for name in ("torch", "torchscript", "onnx") for word in ("--variant", name)]
    options = ["--threads", "1", "--threads", "2x1", "--batch", "2"]
    status, out, err = bench(copy, *names, *options, *FAST, "--json")
    assert status == 0, err
    facts: dict[str, Any] = json.loads(out)
    rows = [(row["variant"], row["workers"], row["threads"]) for row in facts["rows"]]
    assert rows == [(name, w, 1) for name in ("torch", "torchscript", "onnx") for w in (1, 2)]
    assert [row["ratio"] is None for row in facts["rows"]] == [True] * 2 + [False] * 4
    about = {item["variant"]: item for item in facts["variants"]}
    assert about["torch"]["deployable"] is False
    assert about["torchscript"]["deployable"] is True  # but `serve` cannot open it
    assert facts["preferred"]["variant"] == "onnx"
    status, out, err = bench(copy, "--variant", "torch", *options, *FAST)
    assert "not deployable: It is the trained model" in " ".join(out.split())
    assert "nothing was recorded as preferred: onnx may be served too" in err
    assert json.loads(bench(copy, "--show", "--json")[1])["preferred"] == facts["preferred"]


BLOCKED = """
    import sys
    sys.modules.update(dict.fromkeys(["torch", "timm", "onnx", "matplotlib", "safetensors"]))
    from fieldmark import cli
    cli.main()
"""


def test_onnx_is_timed_without_torch(tiny_package: Path) -> None:
    options = [*FAST, "--batch", "1", "--threads", "1", "--json"]
    program = [sys.executable, "-c", textwrap.dedent(BLOCKED), "bench", str(tiny_package), *options]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["preferred"]["variant"] == "onnx"
    assert preferred(open_package(tiny_package)) is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variant", "onx"], "Did you mean 'onnx'?"),
        (["--threads", "many"], "Write 2, or 2x1 for two calls at once"),
        (["--seconds", "0"], "seconds must be above 0. Got 0."),
        (["--out", "no/such/results.json"], "must be in a folder that exists"),
        (["--plot", "no/such/speed.png"], "must be in a folder that exists"),
        (["--show", "--rounds", "3"], "--show must stand alone"),
        (["--show", "--seed", "1"], "--show must stand alone"),
    ],
)
def test_a_mistake_is_one_sentence(
    bench: Bench, tiny_package: Path, in_empty_folder: Path, arguments: list[str], message: str
) -> None:
    status, out, err = bench(tiny_package, *arguments)
    assert status == 2
    assert message in err
    assert out == ""
    assert not list(in_empty_folder.iterdir())

"""What a user pushes and pulls: without real images and local paths, unless asked for."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import fieldmark
from fake_hub import fake_hub
from fieldmark.errors import ConfigError, MissingDependency, UnknownName
from fieldmark.packaging.golden import read_golden
from fieldmark.packaging.manifest import open_package


def share_of(tmp_path: Path, name: str = "share") -> tuple[Path, str]:
    return tmp_path / name, f"file://{tmp_path / name}"


def test_real_images_and_paths_stay_here_by_default(
    tiny_package: Path, tiny_images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    share, url = share_of(tmp_path)
    facts = fieldmark.push(tiny_package, url).facts
    assert facts["sent"] == "package"
    assert facts["golden"] == {"kind": "synthetic", "count": 12}
    assert facts["id"] != facts["id_here"] == open_package(tiny_package).id
    assert "has no licence" in capsys.readouterr().err
    sent = open_package(share)
    everything = b"".join(path.read_bytes() for path in share.rglob("*") if path.is_file())
    assert str(tiny_images).encode() not in everything
    assert any(str(tiny_images) in change for change in facts["changes"])
    assert sent.manifest.training["source"] == f"folder:{tiny_images.name}"  # type: ignore[index]
    real = {data for data in read_golden(open_package(tiny_package)).encoded}
    assert not real & set(read_golden(sent).encoded)
    onnx, before = sent.manifest.variants["onnx"], open_package(tiny_package).manifest.variants
    assert onnx.file == before["onnx"].file
    assert onnx.parity.top1_agreement == before["onnx"].parity.top1_agreement  # type: ignore[union-attr]
    assert onnx.golden.num_samples == 12  # type: ignore[union-attr]
    assert onnx.deployable
    again = fieldmark.push(tiny_package, url).facts
    assert (again["sent"], again["id"]) == ("nothing", facts["id"])
    out = tmp_path / "got"
    got = fieldmark.pull(url, out, expect=facts["id"]).facts
    assert got["variants"] == {"onnx": True}
    assert fieldmark.verify(out).passed
    image = next((out / "golden").glob("*.png"))
    (answer,) = fieldmark.predict(out, [image])
    assert answer.predictions


def test_as_it_is_keeps_images_paths_and_id(
    tiny_package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    share, url = share_of(tmp_path)
    facts = fieldmark.push(tiny_package, url, golden="keep").facts
    assert facts["id"] == facts["id_here"]
    assert facts["changes"] == []
    assert facts["golden"]["kind"] == "data"
    assert "names folders of this machine" in capsys.readouterr().err
    assert (share / "manifest.json").read_bytes() == (tiny_package / "manifest.json").read_bytes()


def test_without_golden_samples_nothing_is_deployable_and_that_is_said(
    tiny_package: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    find_spec = __import__("importlib.util").util.find_spec
    hidden = lambda name, *more: None if name == "torch" else find_spec(name, *more)  # noqa: E731
    monkeypatch.setattr("importlib.util.find_spec", hidden)
    share, url = share_of(tmp_path)
    with pytest.raises(MissingDependency, match="--golden none, or --golden keep"):
        fieldmark.push(tiny_package, url)
    assert not share.exists()
    facts = fieldmark.push(tiny_package, url, golden="none").facts
    assert facts["golden"] == {"kind": "none", "count": 0}
    assert "'onnx' is not deployable as it is sent" in " ".join(capsys.readouterr().err.split())
    assert not list(share.glob("golden/*"))


def test_a_card_that_a_person_wrote_is_carried(tiny_package: Path, tmp_path: Path) -> None:
    share, url = share_of(tmp_path)
    fieldmark.push(tiny_package, url, license="CC0-1.0")
    out = tmp_path / "got"
    assert fieldmark.pull(url, out).facts["license"] == "CC0-1.0"
    card = out / "README.md"
    made = card.read_text()
    assert made.startswith('---\nlicense: "cc0-1.0"\n')
    second, second_url = share_of(tmp_path, "second")
    assert fieldmark.push(out, second_url).facts["card"] == "written from the manifest"
    assert (second / "README.md").read_text() == made  # same package, same words
    card.write_text(made.replace("# digits", "# Colours\n\nBy hand."))
    assert fieldmark.push(out, second_url).facts["sent"] == "card"
    assert "By hand." in (second / "README.md").read_text()
    third, third_url = share_of(tmp_path, "third")
    facts = fieldmark.push(out, third_url).facts
    assert facts["card"] == "README.md of the package"
    assert facts["changes"] == []  # nothing to hide any more: the id stays
    assert "By hand." in (third / "README.md").read_text()
    assert open_package(third).id == open_package(out).id
    fieldmark.export(out)  # changing a package leaves its card alone
    assert "By hand." in card.read_text()


def test_mistakes_are_told_before_anything_is_written(tiny_package: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must have a licence to be on the hub"):
        fieldmark.push(tiny_package, "hf:me/birds")
    wrong: Any = "keeep"
    with pytest.raises(UnknownName, match="Did you mean 'keep'"):
        fieldmark.push(tiny_package, f"file://{tmp_path}/x", golden=wrong)
    assert not (tmp_path / "x").exists()


def fieldmark_in(folder: Path, *words: str, **env: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "fieldmark", *words]
    return subprocess.run(
        command, cwd=folder, env=os.environ | env, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_the_command_line_through_a_hub(tiny_package: Path, tmp_path: Path) -> None:
    with fake_hub() as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_x"}
        env["HF_HOME"] = str(tmp_path / "home")
        words = ["push", str(tiny_package), "hf:me/colours", "--license", "mit"]
        done = fieldmark_in(tmp_path, *words, **env)
        assert done.returncode == 0, done.stderr
        assert "is new, and private" in done.stderr
        sent = json.loads(fieldmark_in(tmp_path, *words, "--json", **env).stdout)
        assert sent["sent"] == "nothing"
        words = ["pull", "hf:me/colours", "--out", "got", "--expect", sent["id"]]
        done = fieldmark_in(tmp_path, *words, **env)
        assert done.returncode == 0, done.stderr
        assert "mit" in done.stdout
        open_package(tmp_path / "got").check_files()
        assert "hf_x" not in done.stdout + done.stderr
        before = time.monotonic()
        words[3] = "got2"
        done = fieldmark_in(tmp_path, *words, **(env | {"HF_HUB_OFFLINE": "1"}))
        assert done.returncode == 2
        assert "HF_HUB_OFFLINE is set" in " ".join(done.stderr.split())
        assert time.monotonic() - before < 60
        assert not (tmp_path / "got2").exists()


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["push", "pull"])
def test_killed_within_a_file_nothing_opens_and_a_second_try_succeeds(
    tiny_package: Path, tmp_path: Path, verb: str
) -> None:
    """With a file so large that the process is killed while it is being written."""
    from fieldmark.packaging.write import add_variant

    package = Path(shutil.copytree(tiny_package, tmp_path / "package"))
    large = add_variant(package, "large", os.urandom(1 << 20) * 300, kind="onnx")
    size = large.manifest.files[large.manifest.variants["large"].file].bytes
    share, url = share_of(tmp_path)
    if verb == "push":
        words, partial = ["push", str(package), url, "--golden", "keep"], share
    else:
        fieldmark.push(package, url, golden="keep")
        words, partial = ["pull", url, "--out", str(tmp_path / "got")], tmp_path / ".got.pull"
    process = subprocess.Popen([sys.executable, "-m", "fieldmark", *words], cwd=tmp_path)
    try:
        deadline = time.monotonic() + 120
        while not any(0 < p.stat().st_size < size for p in partial.glob("variants/large*")):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    target = share if verb == "push" else tmp_path / "got"
    assert not (target / "manifest.json").exists()
    assert not (partial / "manifest.json").exists()
    done = fieldmark_in(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    open_package(target).check_files()
    assert not (tmp_path / ".got.pull").exists()

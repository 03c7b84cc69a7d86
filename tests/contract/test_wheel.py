"""The plain install, without torch, predicts and serves a package, with equal answers."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# What would let the second environment see the first one, or this checkout.
HIDDEN = {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"}
ENV = {key: value for key, value in os.environ.items() if key not in HIDDEN}
START_S = 60
NO_REGISTRY = ("Failed to establish a new connection", "Temporary failure in name resolution")


def run(*command: str | Path, cwd: Path) -> str:
    """Return what the command prints; if it fails, fail with all of it."""
    done = subprocess.run(command, cwd=cwd, env=ENV, capture_output=True, text=True, timeout=300)
    if any(text in done.stderr for text in NO_REGISTRY) and "CI" not in os.environ:
        pytest.skip("The package registry cannot be reached, so nothing can be installed.")
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


pytestmark = pytest.mark.slow  # a wheel is built and installed


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dist = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]  # no download of hatchling
    run(*build, "--outdir", dist, ROOT, cwd=dist)
    [path] = dist.glob("fieldmark-*.whl")
    return path


@pytest.fixture(scope="module")
def plain_bin(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the programs of a second environment, which holds the wheel without extras."""
    venv = tmp_path_factory.mktemp("plain") / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=venv.parent)
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin/python", "install", "--quiet"]
    run(*pip, "--constraint", ROOT / "constraints.txt", wheel, cwd=venv.parent)
    return venv / "bin"


@contextmanager
def serving(command: list[str | Path], port: int, cwd: Path) -> Iterator[None]:
    """Run the server until the block ends; enter the block when it says that it is ready."""
    with (cwd / "serve.log").open("w+") as log:
        server = subprocess.Popen(command, cwd=cwd, env=ENV, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + START_S
            while not is_ready(port):
                late = server.poll() is not None or time.monotonic() > deadline
                assert not late, f"The server is not ready:\n{Path(log.name).read_text()}"
                time.sleep(0.1)
            yield
        finally:
            server.send_signal(signal.SIGINT)  # without the wait of SIGTERM
            try:
                server.wait(timeout=20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def is_ready(port: int) -> bool:
    try:
        return request(port, "GET", "/readyz")[0] == 200
    except OSError:
        return False


def request(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request(method, path, body, {"Content-Type": "image/png"} if body else {})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_wheel_holds_every_source_file(wheel: Path) -> None:
    source = ROOT / "src"
    files = {
        path.relative_to(source).as_posix()
        for path in (source / "fieldmark").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert any(name.startswith("fieldmark/data/") for name in files)
    assert packed == files


def test_plain_install_holds_no_torch(plain_bin: Path, tmp_path: Path) -> None:
    script = "import importlib.util as i; print([m for m in ('torch', 'timm') if i.find_spec(m)])"
    assert run(plain_bin / "python", "-c", script, cwd=tmp_path).strip() == "[]"


def test_plain_install_predicts_and_serves_alike(
    plain_bin: Path, tiny_package: Path, tiny_image_files: list[Path], tmp_path: Path
) -> None:
    image, port = tiny_image_files[0], free_port()
    fieldmark = plain_bin / "fieldmark"
    printed = run(fieldmark, "predict", tiny_package, image, "--json", cwd=tmp_path)
    [result] = json.loads(printed)["results"]
    predicted = result["predictions"][0]

    serve = [fieldmark, "serve", tiny_package, "--host", "127.0.0.1", "--port", str(port)]
    with serving(serve, port, tmp_path):
        status, body = request(port, "POST", "/v1/classify?top_k=3", image.read_bytes())
    assert status == 200, body
    served = json.loads(body)["predictions"][0]
    assert served["class_name"] == predicted["class_name"]
    assert served["probability"] == pytest.approx(predicted["probability"], abs=1e-4)


def test_plain_install_checks_golden_samples_and_describes(
    plain_bin: Path, tiny_package: Path, tmp_path: Path
) -> None:
    checked = json.loads(
        run(plain_bin / "fieldmark", "verify", tiny_package, "--json", cwd=tmp_path)
    )
    onnx = checked["variants"]["onnx"]
    assert onnx["golden"]["passed"]
    assert onnx["parity"] is None
    assert any("needs torch" in note for note in onnx["notes"])
    described = json.loads(
        run(plain_bin / "fieldmark", "info", tiny_package, "--json", cwd=tmp_path)
    )
    assert described["kind"] == "package"
    assert "digits" in run(plain_bin / "fieldmark", "recipes", cwd=tmp_path)

"""The Open Inference Protocol as tritonclient speaks it: a real client, a real process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fieldmark.serving.keys import add_key
from fieldmark.serving.predictor import open_predictor

PYTHON = Path(__file__).parents[3] / ".clients" / "python" / "bin" / "python"
CALLS = Path(__file__).with_name("triton_calls.py")


def asked(package, options, arguments):
    """Serve in a process; return what the clients' Python has done with `arguments(HOST:PORT)`."""
    serve = [sys.executable, "-m", "fieldmark", "serve", package, "--port", "0", "--json", *options]
    with subprocess.Popen(list(map(str, serve)), stdout=subprocess.PIPE, text=True) as process:
        try:
            at = json.loads(process.stdout.readline())["url"].removeprefix("http://")
            command = [PYTHON, *arguments(at)]
            return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        finally:
            process.terminate()


@pytest.mark.slow
def test_tritonclient_works_unchanged(tiny_package, tmp_path, encode):
    if not PYTHON.exists():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{PYTHON} must have tritonclient. Run: make clients.", pytrace=False)
        pytest.skip("tritonclient is not here. Run: make clients.")
    images = [encode("red"), encode("blue", "JPEG"), encode("green", "WEBP")]
    files = [tmp_path / f"{k}.image" for k in range(3)]
    for file, image in zip(files, images, strict=True):
        file.write_bytes(image)
    told = asked(tiny_package, [], lambda at: [CALLS, at, "colours", *files])
    assert told.returncode == 0, told.stderr
    answer = json.loads(told.stdout)
    predictor = open_predictor(tiny_package)
    decoded = np.stack([predictor.decode(image) for image in images])
    pixels = np.stack([np.full((16, 16, 3), 40 * k, np.uint8) for k in range(3)])
    expected, of_pixels = predictor.predict(decoded), predictor.predict(pixels)
    found = answer["found"]
    ways = {"binary", "json output", "gzip", "deflate", "gzip reply", "deflate reply", "version"}
    ways |= {f"aio {name}" for name in ("gzip", "deflate", "gzip reply", "deflate reply")}
    for name in ways | {"async", "aio", "json input", "aio json input"}:
        assert np.array_equal(np.float32(found[name]), expected), name
    packed = {"pixels, gzip", "pixels in json, gzip"}
    for name in packed | {"pixels", "pixels in json", "aio pixels", "aio pixels in json"}:
        assert np.array_equal(np.float32(found[name]), of_pixels), name
    for name in [f"{aio}classes {binary}" for aio in ("", "aio ") for binary in (True, False)]:
        best = [row[0].split(":")[1:] for row in found[name]]
        assert best == [["0", "red"], ["2", "blue"], ["1", "green"]]
        assert all(len(row) == 2 for row in found[name])
    assert answer["about"]["inputs"][0] == {
        "name": "images",
        "datatype": "UINT8",
        "shape": [-1, 16, 16, 3],
    }
    statuses = {name: status for name, (status, _) in answer["errors"].items()}
    assert statuses == {
        **dict.fromkeys(["model", "version", "metadata", "aio model"], "404"),
        **dict.fromkeys(["shape", "output", "aio shape"], "400"),
        **dict.fromkeys(["image", "aio image"], "422"),
        "large": "413",
        **dict.fromkeys(["timeout", "aio timeout"], "504"),
    }
    assert answer["errors"]["image"][1].startswith("image must")


KEYED = """
import json, sys
import numpy as np
import tritonclient.http as sync
from tritonclient.utils import InferenceServerException

client = sync.InferenceServerClient(sys.argv[1])
image = sync.InferInput("encoded", [1], "BYTES")
image.set_data_from_numpy(np.array([open(sys.argv[3], "rb").read()], dtype=object))
statuses = []
for headers in (None, {"Authorization": "Bearer " + sys.argv[2]}, {"x-api-key": sys.argv[2]}):
    try:
        client.infer("colours", [image], headers=headers)
        statuses.append("200")
    except InferenceServerException as error:
        statuses.append(error.status())
print(json.dumps(statuses))
"""


@pytest.mark.slow
def test_tritonclient_hears_of_keys_and_allowances(tiny_package, tmp_path, encode):
    if not PYTHON.exists():
        pytest.skip("tritonclient is not here. Run: make clients.")
    key = add_key(tmp_path / "keys.json", "shop", images_per_minute=1)
    (tmp_path / "image").write_bytes(encode("red"))
    told = asked(
        tiny_package,
        ["--keys", tmp_path / "keys.json"],
        lambda at: ["-c", KEYED, at, key, tmp_path / "image"],
    )
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout) == ["401", "200", "429"]

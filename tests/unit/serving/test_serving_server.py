"""server.py: a real process, its socket and its end."""

import dataclasses
import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from fieldmark.errors import CheckFailed, ConfigError
from fieldmark.serving.server import listen, serve, url_of

SERVE = "import sys; from fieldmark.serving.server import serve; serve(sys.argv[1], port=0)"


class Served:
    """A process that serves, and the one line that it prints when it is ready."""

    def __init__(self, *arguments, script=SERVE):
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
            stderr=subprocess.PIPE,
            text=True,
        )

    def url(self):
        self.line = self.process.stderr.readline()
        found = re.search(r" at (http://127\.0\.0\.1:\d+) ", self.line)
        if not found:
            self.process.kill()  # or reading the rest would wait for its end
            pytest.fail(self.line + self.process.stderr.read())
        return found[1]

    def end(self, number):
        self.process.send_signal(number)
        return self.wait()

    def wait(self):
        status = self.process.wait(20)
        self.rest = self.process.stderr.read()
        return status

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()


def test_serves_answers_like_alone_and_ends_on_sigterm(tiny_package, encode, make_predictor):
    draw = np.random.default_rng(2)
    bodies = [
        encode(Image.fromarray(draw.integers(0, 256, (40, 30, 3), dtype=np.uint8)), format)
        for format in ("JPEG", "PNG", "WEBP") * 10
    ]
    with Served(tiny_package) as served:
        url = served.url()
        assert served.line.startswith(f"Serving {tiny_package} at {url} ")
        command = served.line.partition("Ask it: ")[2]
        assert shlex.split(command)[-1] == f"{url}/v1/classify?top_k=1"
        with httpx.Client(base_url=url) as client, ThreadPoolExecutor(8) as pool:

            def ask(body):
                reply = client.post("/v1/classify", content=body)
                assert reply.status_code == 200
                return reply.json()["predictions"]

            assert client.get("/readyz").status_code == 200
            assert "server" not in client.get("/livez").headers
            alone = list(map(ask, bodies))
            together = list(pool.map(ask, bodies))
            too_long = client.post("/v1/classify", content=bytes(10_000_001))
            assert too_long.status_code == 413
            assert client.post("/v1/classify", content=b"no image").status_code == 422
        assert together == alone
        predictor = make_predictor()
        for body, got in zip(bodies, alone, strict=True):
            [expected] = predictor.classify_pixels(predictor.decode(body)[None])
            assert [item["class_name"] for item in got] == [item.class_name for item in expected]
        assert served.end(signal.SIGTERM) == 0
        assert served.rest == ""


ANNOUNCING = """
    import json, sys
    from fieldmark.serving.server import serve
    serve(sys.argv[1], port=0, announce=lambda facts: print(json.dumps(facts), file=sys.stderr))
"""


def test_announces_and_ends_on_sigint_and_frees_its_port(tiny_package):
    with Served(tiny_package, script=ANNOUNCING) as served:
        facts = json.loads(served.process.stderr.readline())
        url = served.url()
        port = int(url.rpartition(":")[2])
        assert facts == {"url": url, "model": httpx.get(f"{url}/readyz").json()["model"]}
        assert served.end(signal.SIGINT) == 0
        assert served.rest == ""
    with listen("127.0.0.1", port):
        pass


LOADING = """
    import sys, time
    from pathlib import Path
    from fieldmark.serving import server
    open_predictor = server.open_predictor
    def slow(*arguments):
        while not Path(sys.argv[2]).exists():
            time.sleep(0.02)
        return open_predictor(*arguments)
    server.open_predictor = slow
    print(flush=True, file=sys.stderr)
    listen = server.listen
    def shown(host, port):
        listener = listen(host, port)
        print("listening at " + server.url_of(listener) + " ", file=sys.stderr)
        return listener
    server.listen = shown
    server.serve(sys.argv[1], port=0)
"""


def test_alive_but_not_ready_while_the_model_loads(tiny_package, tmp_path):
    go = tmp_path / "go"
    with Served(tiny_package, go, script=LOADING) as served:
        assert served.process.stderr.readline() == "\n"
        url = served.url()
        with httpx.Client(base_url=url) as client:
            assert client.get("/livez").status_code == 200
            assert client.get("/readyz").status_code == 503
            go.touch()
            deadline = time.monotonic() + 10
            while client.get("/readyz").status_code != 200:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        assert served.url() == url  # the line comes when it is ready
        assert served.end(signal.SIGTERM) == 0


SLOW = """
    import sys, time
    from fieldmark.serving import server
    open_predictor = server.open_predictor
    def slow(*arguments):
        predictor = open_predictor(*arguments)
        predict = predictor.predict
        def wait(pixels):
            print("in the model", file=sys.stderr, flush=True)
            time.sleep(0.4)
            return predict(pixels)
        object.__setattr__(predictor, "predict", wait)
        return predictor
    server.open_predictor = slow
    server.serve(sys.argv[1], port=0)
"""


def test_sigterm_lets_a_request_finish(tiny_package, encode):
    with Served(tiny_package, script=SLOW) as served, ThreadPoolExecutor(1) as pool:
        url = served.url()
        answer = pool.submit(httpx.post, f"{url}/v1/classify", content=encode("red"))
        assert served.process.stderr.readline() == "in the model\n"
        assert served.end(signal.SIGTERM) == 0
        assert answer.result().json()["predictions"][0]["class_name"] == "red"
        assert served.rest == ""


EARLY = """
    import os, signal, sys
    import uvicorn
    from fieldmark.serving.server import serve
    run = uvicorn.Server.run
    def signalled_first(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return run(*arguments, **options)
    uvicorn.Server.run = signalled_first
    serve(sys.argv[1], port=0)
"""


def test_sigterm_before_the_server_runs_is_not_lost(tiny_package):
    with Served(tiny_package, script=EARLY) as served:
        assert served.wait() == 0


@pytest.mark.timeout(60)
def test_a_failed_check_ends_serving_with_its_error(write_tiny_package, capsys):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    folder = write_tiny_package(
        change=lambda golden: dataclasses.replace(golden, logits=golden.logits + np.float32(1))
    )
    with pytest.raises(CheckFailed, match="^variant 'onnx' of "):
        serve(folder, port=0)
    assert capsys.readouterr().err == ""
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_port_in_use(tiny_package):
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=f"^port {port} of 127.0.0.1 must be free.* in use"):
            serve(tiny_package, port=port)


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("no such host", 0, "host must be an address"),
        ("192.0.2.1", 0, "not an address of this machine"),
        ("127.0.0.1", -1, "from 0 to 65535"),
        ("127.0.0.1", 65536, "from 0 to 65535"),
    ],
)
def test_address_that_cannot_be_served_on(tiny_package, host, port, message):
    with pytest.raises(ConfigError, match=message):
        serve(tiny_package, host=host, port=port)


@pytest.mark.parametrize(
    ("host", "shown"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::1", r"\[::1\]"), ("::", r"\[::1\]")],
)
def test_url_can_be_opened_here(host, shown):
    if ":" in host and not Path("/proc/net/if_inet6").exists():
        pytest.skip("no IPv6 here")
    with listen(host, 0) as listener:
        url = url_of(listener)
        assert re.fullmatch(rf"http://{shown}:\d+", url)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        address = ("::1" if family == socket.AF_INET6 else "127.0.0.1", int(url.split(":")[-1]))
        with socket.socket(family) as client:
            client.connect(address)


def test_serving_in_a_thread_leaves_the_signals_alone(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    errors = []

    def run():
        try:
            serve(tmp_path / "nothing", port=0)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    assert [error.code for error in errors] == ["bad_package"]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before

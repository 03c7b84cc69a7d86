"""server.py: a real process, its socket and its end."""

import contextlib
import dataclasses
import json
import os
import platform
import re
import shlex
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import onnxruntime
import pytest
from PIL import Image
from served import SLOW, Served

from fieldmark.errors import CheckFailed, ConfigError, PackageError
from fieldmark.serving.cost import BatchCost
from fieldmark.serving.server import _open, listen, serve, url_of, warm_up
from fieldmark.serving.supervisor import Supervisor
from fieldmark.serving.workers import Setting


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
        model = httpx.get(f"{url}/readyz").json()["model"]
        assert facts == {"url": url, "model": model, "variant": "onnx", "device": "cpu"}
        assert served.end(signal.SIGINT) == 0
        assert served.rest == ""
    with listen("127.0.0.1", port):
        pass


HEAPS = """
    import ctypes, sys
    from fieldmark.serving.server import serve
    def tell(facts):
        libc = ctypes.CDLL(None)
        libc.fopen.restype = ctypes.c_void_p
        out = libc.fopen(sys.argv[2].encode(), b"w")
        libc.malloc_info(0, ctypes.c_void_p(out))
        libc.fclose(ctypes.c_void_p(out))
    serve(sys.argv[1], port=0, announce=tell)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_the_threads_of_a_service_share_a_heap(tiny_package, tmp_path):
    with Served(tiny_package, tmp_path / "heaps", script=HEAPS) as served:
        served.url()
        assert (tmp_path / "heaps").read_text().count("<heap nr=") == 1


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
            assert "fieldmark_ready 0.0" in client.get("/metrics").text
            go.touch()
            deadline = time.monotonic() + 10
            while client.get("/readyz").status_code != 200:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        assert served.url() == url  # the line comes when it is ready
        assert served.end(signal.SIGINT) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_a_request_finish(tiny_package, encode, number):
    with Served(tiny_package, script=SLOW) as served, ThreadPoolExecutor(1) as pool:
        url = served.url()
        answer = pool.submit(httpx.post, f"{url}/v1/classify", content=encode("red"))
        assert served.process.stderr.readline() == "in the model\n"
        assert served.end(number) == 0
        assert answer.result().json()["predictions"][0]["class_name"] == "red"
        assert served.rest == ""


HUNG = """
    import json, sys, time
    from fieldmark.serving import server
    from fieldmark.serving.limits import Limits
    warm_up = server.warm_up
    def hanging(predictor, *rest):
        warm_up(predictor, *rest)
        def hang(pixels):
            print("in the model", file=sys.stderr, flush=True)
            time.sleep(1000)
        object.__setattr__(predictor, "predict", hang)
        object.__setattr__(predictor, "alone", None)
    server.warm_up = hanging
    server.END_WITHIN_S = server._LAST_WORK_S = 1
    server.serve(sys.argv[1], port=0, limits=Limits(**json.loads(sys.argv[2])))
"""


def test_a_model_that_hangs_does_not_keep_the_process(tiny_package, encode):
    with Served(tiny_package, script=HUNG) as served, ThreadPoolExecutor(1) as pool:
        url = served.url()
        asked = pool.submit(httpx.post, f"{url}/v1/classify", content=encode("red"), timeout=30)
        assert served.process.stderr.readline() == "in the model\n"
        assert served.end(signal.SIGTERM) == 1
        assert "did not come to an end" in served.rest
        with contextlib.suppress(httpx.HTTPError):
            assert asked.result().status_code != 200


def test_sigterm_while_the_model_loads_ends_at_once(tiny_package, tmp_path):
    with Served(tiny_package, tmp_path / "never", script=LOADING) as served:
        assert served.process.stderr.readline() == "\n"
        assert httpx.get(f"{served.url()}/livez").status_code == 200
        assert served.end(signal.SIGTERM) == 0
        assert "Serving" not in served.rest


def test_sigterm_turns_readiness_off_and_goes_on_serving_for_a_while(tiny_package, encode):
    with Served(tiny_package, drain_s=2) as served, httpx.Client() as client:
        url = served.url()
        assert "connection" not in client.get(f"{url}/readyz").headers
        signalled = time.monotonic()
        served.process.send_signal(signal.SIGTERM)
        while client.get(f"{url}/readyz").status_code == 200:
            assert time.monotonic() < signalled + 2
        for path in ("/readyz", "/v2/health/ready"):
            refused = client.get(url + path)
            assert refused.status_code == 503
            assert refused.headers["connection"] == "close"
        assert client.get(f"{url}/livez").status_code == 200
        answer = client.post(f"{url}/v1/classify", content=encode("red"))
        assert answer.json()["predictions"][0]["class_name"] == "red"
        assert served.wait() == 0
        assert time.monotonic() >= signalled + 2
        assert served.rest == ""


def test_a_second_sigterm_ends_the_wait(tiny_package):
    with Served(tiny_package, drain_s=60) as served:
        url = served.url()
        served.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while httpx.get(f"{url}/readyz").status_code == 200:
            assert time.monotonic() < deadline
        assert served.end(signal.SIGTERM) == 0


PATIENT = """
    import json, sys
    from fieldmark.serving import connections
    from fieldmark.serving.limits import Limits
    from fieldmark.serving.server import serve
    connections.LAST_CALL_S = 20
    serve(sys.argv[1], port=0, limits=Limits(**json.loads(sys.argv[2])))
"""


def test_a_request_that_is_on_its_way_when_the_service_ends_is_answered(tiny_package):
    """Its connection is open and its first byte comes only after the listener is closed."""
    with (
        Served(tiny_package, script=PATIENT) as served,
        socket.create_connection(served.address()) as client,
    ):
        served.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        address = client.getpeername()
        while True:
            try:
                socket.create_connection(address).close()
            except OSError:
                break
            assert time.monotonic() < deadline
            time.sleep(0.02)  # or these are so many that the waiting one makes room for them
        client.sendall(b"GET /livez HTTP/1.1\r\nHost: here\r\n\r\n")
        client.settimeout(10)
        answer = b"".join(iter(lambda: client.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"connection: close" in answer.lower()
        assert served.wait() == 0


def test_a_cold_model_is_warmed_and_its_cost_known_before_the_first_request(make_predictor):
    predictor, cost = make_predictor(), BatchCost()
    warm_up(predictor, 8, cost)
    assert cost.is_known
    assert cost.seconds(8, 8) > 0


def test_as_many_of_the_largest_batches_as_can_be_run_at_once_before_it_is_ready(make_predictor):
    together, seen = threading.Barrier(2), []

    def predict(pixels):
        if threading.current_thread() is not threading.main_thread():
            seen.append(len(pixels))
            together.wait(10)  # or it breaks, as nobody else comes
        return np.zeros((len(pixels), 3), np.float32)

    warm_up(dataclasses.replace(make_predictor(predict), workers=2), 8, BatchCost())
    assert seen == [8, 8]


def test_a_model_that_fails_as_it_is_warmed_is_told(make_predictor):
    def predict(pixels):
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("no memory for two")
        return np.zeros((len(pixels), 3), np.float32)

    with pytest.raises(RuntimeError, match="no memory for two"):
        warm_up(make_predictor(predict), 8, BatchCost())


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


JSON_LOG = """
    import sys
    from fieldmark.runtime import log
    from fieldmark.serving.server import serve
    log.use_json()
    serve(sys.argv[1], port=0)
"""


def test_a_log_for_machines_has_a_line_for_each_request(tiny_package, encode):
    with Served(tiny_package, script=JSON_LOG) as served:
        ready = json.loads(served.process.stderr.readline())
        assert (ready["event"], ready["device"]) == ("ready", "cpu")
        url = ready["url"] + "/v1/classify"
        assert json.loads(served.process.stderr.readline())["message"].startswith("Serving ")
        secret = "not for the log"
        headers = {"X-Request-Id": "mine", "Authorization": f"Bearer {secret}"}
        assert httpx.post(url, content=encode("red"), headers=headers).status_code == 200
        assert httpx.post(url, content=secret.encode()).status_code == 422
        assert httpx.get(f"{ready['url']}/{secret}").status_code == 404
        assert served.end(signal.SIGINT) == 0
        first, second, third = map(json.loads, served.rest.splitlines())
        assert set(first) == {
            *("time", "level", "event", "request_id", "method", "route", "status"),
            *("seconds", "images"),
        }
        assert (first["request_id"], first["status"], first["images"]) == ("mine", 200, 1)
        assert (second["route"], second["status"]) == ("/v1/classify", 422)
        assert (third["route"], third["status"]) == ("other", 404)
        assert secret not in served.rest


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("tpu", "device must be auto, cpu or cuda. Got 'tpu'"),
        pytest.param(
            "cuda",
            "Install onnxruntime-gpu",
            marks=pytest.mark.skipif(
                "CUDAExecutionProvider" in onnxruntime.get_available_providers(),
                reason="this onnxruntime was built for CUDA",
            ),
        ),
    ],
)
def test_a_device_that_is_not_there_is_refused(tiny_package, device, message):
    with pytest.raises(ConfigError, match=message):
        serve(tiny_package, port=0, device=device)


def test_a_provider_that_does_not_start_is_no_silent_fallback(tiny_package, monkeypatch, capsys):
    """As onnxruntime does where CUDA's libraries are missing: a warning, and the CPU."""
    kept = onnxruntime.InferenceSession

    def falls_back(model, options, providers):
        return kept(model, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr("onnxruntime.InferenceSession", falls_back)
    both = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: both)
    with pytest.raises(PackageError, match="must run on cuda"):
        serve(tiny_package, port=0, device="cuda")
    assert capsys.readouterr().err == ""
    predictor, _ = _open(tiny_package, "auto", None, "auto", True)
    assert predictor.device == "cpu"
    assert "serving on the cpu instead of cuda" in capsys.readouterr().err


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


@pytest.mark.parametrize(
    ("threads", "message"),
    [(300, "at most 4 for each of the"), ("2x300", "at most 4 for each"), ("two", "a number, or")],
)
def test_threads_that_cannot_be(tiny_package, threads, message):
    with pytest.raises(ConfigError, match=message):
        serve(tiny_package, port=0, threads=threads)


def test_calls_at_once_and_threads_are_as_asked(tiny_package):
    predictor, why = _open(tiny_package, "auto", Setting(2, 1), "cpu", True)
    assert predictor.workers == 2
    assert why.startswith("2 requests at a time with 1 thread each")


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
        ("a..b", 0, "host must be an address"),
        ("a" * 64 + ".example", 0, "host must be an address"),
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


def test_parts_of_an_answer_do_not_wait_for_an_acknowledgement():
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted = listener.accept()[0]
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_systemd_hears_that_the_service_is_ready_lives_and_stops(
    tiny_package, tmp_path, monkeypatch, kind
):
    name = f"@fieldmark-{os.getpid()}" if kind == "abstract" else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(name.replace("@", "\0"))
        supervisor.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        monkeypatch.setenv("WATCHDOG_USEC", "400000")
        with Served(tiny_package) as served:
            served.url()
            heard = {supervisor.recv(100) for _ in range(6)}
            assert heard == {b"READY=1", b"WATCHDOG=1"}
            assert served.end(signal.SIGTERM) == 0
            while (last := supervisor.recv(100)) == b"WATCHDOG=1":
                pass
            assert last == b"STOPPING=1"


def test_a_model_that_hangs_gives_no_sign_of_life(tiny_package, encode, tmp_path, monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(tmp_path / "notify"))
        supervisor.settimeout(1.5)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "400000")
        with (
            Served(tiny_package, script=HUNG, hung_after_s=0.5) as served,
            ThreadPoolExecutor(1) as pool,
        ):
            asked = pool.submit(httpx.post, f"{served.url()}/v1/classify", content=encode("red"))
            assert served.process.stderr.readline() == "in the model\n"
            ends = time.monotonic() + 20
            with contextlib.suppress(TimeoutError):
                while time.monotonic() < ends:
                    supervisor.recv(100)
            assert time.monotonic() < ends  # nothing came for 1.5 s
            served.process.kill()
            with contextlib.suppress(httpx.HTTPError):
                asked.result()


def test_without_a_supervisor_nothing_is_said_and_a_signal_of_another_process_is_not_ours():
    silent = Supervisor({})
    silent.tell("READY=1")
    assert not silent.is_waiting()
    of_another = {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1"}
    assert not Supervisor(of_another).is_waiting()
    nobody = Supervisor({"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "1000000"})
    assert nobody.is_waiting()
    nobody.lives()  # which nobody hears
    assert not nobody.is_waiting()

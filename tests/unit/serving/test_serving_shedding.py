"""shedding.py: what is refused for want of room is refused when its headers are there."""

import asyncio
import json
import math
import re
import socket
import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from starlette.requests import Request

from fieldmark.serving.app import create_app
from fieldmark.serving.door import count_images
from fieldmark.serving.keys import Keys, add_key
from fieldmark.serving.limits import Limits
from fieldmark.serving.replies import Busy
from fieldmark.serving.server import _Server, listen
from fieldmark.serving.service import Service
from fieldmark.serving.shedding import Shedding

URL = "/v1/classify"
ONE = Limits(max_inside=1, max_images=1)
POST = b"POST /v1/classify HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n"
LIVE = b"GET /livez HTTP/1.1\r\nHost: here\r\n\r\n"


def asked(path=URL, method="POST", **headers):
    """What a connection knows of a request when its headers are there."""
    pairs = [(name.replace("_", "-").encode(), text.encode()) for name, text in headers.items()]
    return {"type": "http", "method": method, "path": path, "headers": pairs, "state": {}}


@pytest.fixture
def full(make_predictor, encode):
    """Run a function with a service that has no room for another image."""

    def run(use, limits=ONE):
        release = threading.Event()

        def slow(pixels):
            assert release.wait(10)
            return np.zeros((len(pixels), 3), np.float32)

        async def probe():
            service = Service(make_predictor(slow), limits)
            inside = asyncio.create_task(service.logits([encode("red")], math.inf))
            await asyncio.sleep(0.05)
            try:
                return use(service)
            finally:
                release.set()
                await inside

        return asyncio.run(probe())

    return run


def test_what_there_is_no_room_for_is_not_taken_from_what_a_key_may_send(full, tmp_path):
    key = add_key(tmp_path / "keys.json", "shop", images_per_minute=1)
    keys = Keys(tmp_path / "keys.json")
    assert keys.name_of({"authorization": f"Bearer {key}"}) == "shop"

    def use(service):
        request = Request(asked() | {"state": {"key": "shop", "keys": keys}})
        with pytest.raises(Busy, match="may wait"):
            count_images(request, service, 1, 1, math.inf)
        return keys.wait_s("shop", 1)

    assert full(use) == 0


@pytest.mark.parametrize(
    ("path", "route"),
    [
        (URL, URL),
        ("/v2/models/colours/infer", "/v2/models/{name}/infer"),
        ("/v2/models/a/versions/b/infer", "/v2/models/{name}/versions/{version}/infer"),
    ],
)
def test_there_is_no_room_for_what_wants_the_model(full, path, route):
    def use(service):
        answer = Shedding(service).refusal(asked(path, x_request_id="mine"))
        return answer, service.metrics.page("")[0].decode()

    answer, page = full(use)
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 429 Too Many Requests\r\n")
    fields = dict(line.split(": ") for line in head.decode().split("\r\n")[1:])
    assert int(fields["retry-after"]) >= 1
    assert int(fields["content-length"]) == len(body)
    assert (fields["x-request-id"], fields["x-model-id"]) == ("mine", "f" * 64)
    error = json.loads(body)["error"]
    message = error if path != URL else error["message"]
    assert message.startswith("at most 1 images may wait")
    of = f'route="{route}",status="429"'
    assert f'fieldmark_requests_total{{reason="queue_full",{of}}} 1.0' in page
    assert 'fieldmark_refused_total{reason="queue_full"} 1.0' in page


def test_the_app_answers_everything_else(full):
    def use(service):
        shedding = Shedding(service)
        others = [
            asked("/livez", "GET"),
            asked("/v2/models/colours", "GET"),
            asked("/v1/classify/", "POST"),
            asked(URL, "GET"),
            asked(x_request_timeout_seconds="soon"),  # a 400
        ]
        found = [shedding.refusal(one) for one in others]
        service.is_draining = True  # the answer closes the connection: first the body is read
        return [*found, shedding.refusal(asked())]

    assert full(use) == [None] * 6


def test_with_room_nothing_is_refused(full, make_predictor):
    assert Shedding(Service(make_predictor(), Limits())).refusal(asked()) is None
    assert full(lambda service: Shedding(service).refusal(asked()), Limits()) is None


def test_who_has_no_key_is_not_told_whether_there_is_room(full, tmp_path):
    path = tmp_path / "keys.json"
    key = add_key(path, "me")

    def use(service):
        shedding = Shedding(service, Keys(path))
        known = asked(authorization=f"Bearer {key}")
        return shedding.refusal(asked()), shedding.refusal(known), known["state"]["key"]

    nobody, me, name = full(use)
    assert (nobody, name) == (None, "me")
    assert me.startswith(b"HTTP/1.1 429 ")


@contextmanager
def served(predictor):
    """A service in a thread, with room for one image."""
    app = create_app(predictor, limits=ONE)
    with listen("127.0.0.1", 0) as listener:
        server = _Server(app, app.state.service, None)
        running = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        running.start()
        try:
            yield SimpleNamespace(address=listener.getsockname(), service=app.state.service)
        finally:
            server.should_exit = True
            running.join(20)
            app.state.service.close()


@pytest.fixture
def busy(make_predictor, encode):
    """The address of a service whose one place is taken until the test lets go of it."""
    release = threading.Event()

    def slow(pixels):
        assert release.wait(20)
        return np.zeros((len(pixels), 3), np.float32)

    image = encode("red")
    with served(make_predictor(slow)) as found, connect(found.address) as first:
        first.sendall(POST % len(image) + b"\r\n" + image)
        until = time.monotonic() + 10
        while not found.service.num_inside:
            assert time.monotonic() < until
            time.sleep(0.01)
        yield found.address
        release.set()
        assert first.recv(65536).startswith(b"HTTP/1.1 200 ")  # who was inside loses nothing


def connect(address):
    return socket.create_connection(address, timeout=10)


def statuses(answer):
    return re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)


def test_the_answer_does_not_wait_for_the_body_and_the_connection_goes_on(busy):
    with connect(busy) as client:
        for _ in range(3):
            client.sendall(POST % 100_000 + b"\r\n" + bytes(1000))
            answer = client.recv(65536)
            assert statuses(answer) == [b"429"]
            assert b"connection: close" not in answer
            client.sendall(bytes(99_000) + LIVE)  # the rest of the body is no request
            assert statuses(client.recv(65536)) == [b"200"]


def test_chunks_and_who_waits_for_100_are_refused_too(busy):
    with connect(busy) as client:
        client.sendall(POST.replace(b"Content-Length: %d", b"Transfer-Encoding: chunked") + b"\r\n")
        assert statuses(client.recv(65536)) == [b"429"]
        client.sendall(b"3\r\nabc\r\n0\r\n\r\n" + POST % 9 + b"Expect: 100-continue\r\n\r\n")
        assert statuses(client.recv(65536)) == [b"429"]


def test_requests_that_come_together_are_refused_in_their_order(busy):
    with connect(busy) as client:
        client.sendall((POST % 3 + b"X-Request-Id: a\r\n\r\nabc") + LIVE + POST % 3 + b"\r\nabc")
        answer = b""
        while len(statuses(answer)) < 3:
            answer += client.recv(65536)
        assert statuses(answer) == [b"429", b"200", b"429"]
        assert answer.count(b"x-request-id: a\r\n") == 1


def test_an_answer_that_closes_the_connection_comes_after_the_body(busy):
    with connect(busy) as client:
        client.sendall(POST % 1000 + b"Connection: close\r\n\r\n")
        client.settimeout(0.3)
        with pytest.raises(TimeoutError):
            client.recv(65536)
        client.settimeout(10)
        client.sendall(bytes(1000))
        answer = b""
        while chunk := client.recv(65536):
            answer += chunk
        assert statuses(answer) == [b"429"]

"""app.py: one image in, ranked classes out, and one shape for every error."""

import asyncio
import base64
import dataclasses
import gzip
import json
import math
import random
import struct
import threading
import time
import zlib
from concurrent.futures import Future

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from fieldmark.errors import CheckFailed, ImageError
from fieldmark.runtime.cpu import num_cores
from fieldmark.serving.app import create_app
from fieldmark.serving.limits import HTTP_FORMATS, Limits
from fieldmark.serving.predictor import Predictor
from fieldmark.serving.replies import Busy, Late
from fieldmark.serving.service import Service

URL = "/v1/classify"


@pytest.fixture
def client(make_predictor):
    app = create_app(make_predictor(), limits=Limits(max_body_bytes=100_000, max_pixels=250_000))
    return TestClient(app, raise_server_exceptions=False)


def assert_error(reply, status, code, *parts):
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    content = reply.json()
    assert set(content) == {"error"}
    assert set(content["error"]) == {"code", "message"}
    assert content["error"]["code"] == code
    for part in parts:
        assert part in content["error"]["message"]
    for leak in ("Traceback", "/site-packages", "/src/", ".py", " object at 0x"):
        assert leak not in reply.text


# --- answers ---


@pytest.mark.parametrize("format", HTTP_FORMATS)
def test_classifies(client, make_predictor, encode, format):
    reply = client.post(URL, content=encode("red", format))
    assert reply.status_code == 200
    answer = reply.json()
    assert list(answer) == ["model", "preprocessing", "predictions"]
    assert answer["model"] == "f" * 64
    assert answer["preprocessing"] == make_predictor().preprocess.digest()
    red, *others = answer["predictions"]  # three classes, so the default of 5 gives all
    assert (red["class_name"], red["description"]) == ("red", "mostly red")
    assert red["probability"] > 0.99
    found = {item["class_name"]: item for item in others}
    assert found["green"]["description"] == "mostly green"
    assert set(found["blue"]) == {"class_name", "probability"}  # it has no description


@pytest.mark.parametrize("content_type", ["text/plain", "image/gif", "application/json", None])
def test_the_content_decides_not_the_content_type(client, encode, content_type):
    headers = {"content-type": content_type} if content_type else {}
    assert client.post(URL, content=encode("red", "JPEG"), headers=headers).status_code == 200
    assert_error(
        client.post(URL, content=b"GIF89a", headers={"content-type": "image/png"}),
        422,
        "bad_image",
        "JPEG, PNG, WEBP",
    )


@pytest.mark.parametrize(("query", "expected"), [("?top_k=1", 1), ("?top_k=3", 3), ("", 3)])
def test_top_k(client, encode, query, expected):
    reply = client.post(URL + query, content=encode("blue"))
    assert len(reply.json()["predictions"]) == expected
    assert reply.json()["predictions"][0]["class_name"] == "blue"


def test_default_top_k_is_five(make_predictor, encode):
    ten = make_predictor(lambda pixels: np.zeros((len(pixels), 10), dtype=np.float32))
    ten = type(ten)(ten.predict, ten.preprocess, tuple("abcdefghij"), ("",) * 10, "id")
    reply = TestClient(create_app(ten)).post(URL, content=encode("red"))
    assert [item["class_name"] for item in reply.json()["predictions"]] == list("abcde")


# --- refusals ---


@pytest.mark.parametrize(
    ("query", "part"),
    [
        ("?top_k=0", "top_k"),
        ("?top_k=-1", "top_k"),
        ("?top_k=4", "top_k must be from 1 to 3. Got 4."),
        ("?top_k=many", "'many'"),
        ("?top_k=", "top_k"),
        ("?top_k=" + "9" * 5000, "top_k"),
        ("?top_k=1&top_k=2", "top_k must be given once"),
        ("?topk=1", "'topk'"),
        ("?top_k=1&%C3%A9%0A=1", r"\xe9\n"),
    ],
)
def test_wrong_query(client, encode, query, part):
    reply = client.post(URL + query, content=encode("red"))
    assert_error(reply, 400, "bad_query", part)
    assert len(reply.text) < 400


def test_declared_size_is_refused_before_the_body_is_read(make_predictor):
    app = create_app(make_predictor(), limits=Limits(max_body_bytes=1000))
    was_read, sent = [], []

    async def receive():
        was_read.append(True)
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": URL,
        "raw_path": URL.encode(),
        "query_string": b"",
        "headers": [(b"content-length", b"1001")],
        "http_version": "1.1",
    }
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 413
    assert json.loads(sent[1]["body"])["error"]["code"] == "body_too_large"
    assert not was_read


def test_undeclared_size_is_counted_and_refused_at_the_first_byte_over(client, encode):
    num_sent = 0

    def chunks(total):
        nonlocal num_sent
        for _ in range(total // 1000):
            num_sent += 1
            yield bytes(1000)

    assert_error(client.post(URL, content=chunks(100_000)), 422, "bad_image")
    assert_error(client.post(URL, content=chunks(101_000)), 413, "body_too_large", "100000")


def test_reading_stops_at_the_cap(make_predictor):
    app = create_app(make_predictor(), limits=Limits(max_body_bytes=1000))
    num_read = 0

    async def receive():
        nonlocal num_read
        num_read += 1
        return {"type": "http.request", "body": bytes(300), "more_body": True}

    async def send(message):
        pass

    scope = {
        "type": "http",
        "method": "POST",
        "path": URL,
        "raw_path": URL.encode(),
        "query_string": b"",
        "headers": [],
        "http_version": "1.1",
    }
    asyncio.run(asyncio.wait_for(app(scope, receive, send), 10))
    assert num_read == 4


def test_body_of_exactly_the_cap_is_accepted(make_predictor, encode):
    encoded = encode("red")
    app = create_app(make_predictor(), limits=Limits(max_body_bytes=len(encoded)))
    assert TestClient(app).post(URL, content=encoded).status_code == 200


def chunk(name, content):
    checksum = struct.pack(">I", zlib.crc32(name + content))
    return struct.pack(">I", len(content)) + name + content + checksum


def bomb(side):
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows)


def test_too_many_pixels(client, encode):
    assert_error(client.post(URL, content=bomb(501)), 413, "image_too_large", "250000", "501 x 501")
    assert_error(client.post(URL, content=bomb(2**31 - 1)), 413, "image_too_large")
    strip = encode(Image.new("L", (1, 10_000)))
    assert client.post(URL, content=strip).status_code == 200
    wide = TestClient(create_app(make_wide()), raise_server_exceptions=False)
    assert_error(wide.post(URL, content=strip), 413, "image_too_large")


def make_wide():
    from fieldmark.preprocess import Preprocess
    from fieldmark.serving.predictor import Predictor

    spec = Preprocess(height_px=224, width_px=224, mean=(0, 0, 0), std=(1, 1, 1))
    return Predictor(lambda pixels: np.zeros((len(pixels), 1), np.float32), spec, ("a",), ("",), "")


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_other_formats_are_refused(client, encode, format):
    reply = client.post(URL, content=encode("red", format))
    assert_error(reply, 422, "bad_image", "must be one of JPEG, PNG, WEBP. Got")


def test_animated_gif_is_refused_and_the_first_frame_of_others_is_used(client, encode):
    red, blue = Image.new("RGB", (24, 20), "red"), Image.new("RGB", (24, 20), "blue")
    options = {"save_all": True, "append_images": [blue]}
    assert_error(client.post(URL, content=encode(red, "GIF", **options)), 422, "bad_image")
    for format in ("PNG", "WEBP"):
        answer = client.post(URL, content=encode(red, format, **options)).json()
        assert answer["predictions"][0]["class_name"] == "red"


def hostile():
    """Name -> bytes that are no image, or not a whole one."""
    corpus = {
        "empty": b"",
        "one byte": b"\xff",
        "text": b"hello " * 50,
        "html": b"<!DOCTYPE html><img src=x onerror=alert(1)>",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
        "form": b'--b\r\nContent-Disposition: form-data; name="f"\r\n\r\n\xff\xd8\xff\r\n--b--',
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        "psd": b"8BPS\0\1" + bytes(40),
        "fits": b"SIMPLE  =                    T" + bytes(2880),
        "zip": b"PK\3\4" + bytes(60),
        "gzip": b"\x1f\x8b\x08" + bytes(60),
        "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        "jpeg start": b"\xff\xd8\xff",
        "jpeg with nothing": b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0\xff\xd9",
        "png signature": b"\x89PNG\r\n\x1a\n",
        "png with too few pixels": bomb(100),
        "png text bomb": b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 8, 2, 0, 0, 0))
        + chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(9_000_000))),
        "riff of nothing": b"RIFF\x20\0\0\0WEBPVP8 " + bytes(20),
    }
    draw = random.Random(0)
    return corpus | {f"noise {n}": draw.randbytes(n) for n in (10, 1000, 50_000)}


@pytest.mark.parametrize("name", sorted(hostile()))
def test_hostile_bytes(client, name):
    assert_error(client.post(URL, content=hostile()[name]), 422, "bad_image", "image must")


@pytest.mark.parametrize("format", HTTP_FORMATS)
def test_truncated_image(client, encode, format):
    noise = np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)
    encoded = encode(Image.fromarray(noise), format)
    assert client.post(URL, content=encoded).status_code == 200
    assert_error(client.post(URL, content=encoded[:-200]), 422, "bad_image", "image must")


# --- every other error ---


def test_unknown_path_and_method(client):
    assert_error(client.get("/v1"), 404, "not_found", "'/v1'")
    assert_error(client.get("/v1/classify/"), 404, "not_found")
    long_path = client.get("/" + "x" * 5000)
    assert_error(long_path, 404, "not_found")
    assert len(long_path.text) < 400
    reply = client.get(URL)
    assert_error(reply, 405, "method_not_allowed", "POST", "'GET'")
    assert reply.headers["allow"] == "POST"
    assert_error(client.put("/livez"), 405, "method_not_allowed", "GET")


@pytest.mark.parametrize("place", ["predict", "decode"])
def test_a_failure_inside_says_nothing_of_the_inside(make_predictor, encode, place):
    def fail(*_):
        raise RuntimeError("secret at /home/someone/model.py")

    predictor = make_predictor(fail)
    if place == "decode":
        fail.digest = predictor.preprocess.digest
        object.__setattr__(predictor, "preprocess", fail)
    client = TestClient(create_app(predictor), raise_server_exceptions=False)
    for _ in range(2):
        reply = client.post(URL, content=encode("red"))
        assert_error(reply, 500, "internal")
        assert "secret" not in reply.text


def test_a_failing_model_says_nothing_of_the_inside(make_predictor, encode):
    predictor = make_predictor(lambda pixels: np.full((len(pixels), 3), np.nan, np.float32))
    client = TestClient(create_app(predictor), raise_server_exceptions=False)
    assert_error(client.post(URL, content=encode("red")), 500, "internal")
    whole = {"Inference-Header-Content-Length": "0"}
    reply = client.post("/v2/models/model/infer", content=encode("red"), headers=whole)
    assert reply.status_code == 500
    assert reply.json() == {"error": "the service failed. The cause is in its log."}
    assert reply.headers["x-request-id"]


# --- readiness ---


def test_ready_with_a_predictor(client, make_predictor):
    assert client.get("/livez").json() == {"status": "alive"}
    digest = make_predictor().preprocess.digest()
    ready = {"status": "ready", "model": "f" * 64, "preprocessing": digest}
    assert client.get("/readyz").json() == ready


def test_not_ready_until_the_model_is_checked(make_predictor, encode):
    pending = Future()
    client = TestClient(create_app(pending), raise_server_exceptions=False)
    assert client.get("/livez").status_code == 200
    assert_error(client.get("/readyz"), 503, "not_ready")
    assert_error(client.post(URL, content=encode("red")), 503, "not_ready")
    pending.set_result(make_predictor())
    assert client.get("/readyz").status_code == 200
    assert client.post(URL, content=encode("red")).status_code == 200


def test_never_ready_when_the_check_failed():
    pending = Future()
    pending.set_exception(CheckFailed("secret at /home/someone"))
    client = TestClient(create_app(pending), raise_server_exceptions=False)
    assert_error(client.get("/readyz"), 503, "not_ready")
    assert "secret" not in client.get("/readyz").text


# --- threads ---


class Watched:
    """A model and preprocessing that count how many run at a time, and in which threads."""

    def __init__(self, predictor):
        self._inner = predictor
        self._lock = threading.Lock()
        self._now = {"decode": 0, "predict": 0}
        self.most = {"decode": 0, "predict": 0}
        self.threads = set()
        object.__setattr__(predictor, "predict", self._watch("predict", predictor.predict))
        object.__setattr__(predictor, "preprocess", WatchedSpec(self, predictor.preprocess))

    def _watch(self, name, function):
        def watched(*args, **options):
            with self._lock:
                self._now[name] += 1
                self.most[name] = max(self.most[name], self._now[name])
                self.threads.add(threading.get_ident())
            try:
                time.sleep(0.002)
                return function(*args, **options)
            finally:
                with self._lock:
                    self._now[name] -= 1

        return watched


class WatchedSpec:
    def __init__(self, watched, spec):
        self._call = watched._watch("decode", spec)
        self.digest = spec.digest

    def __call__(self, *args, **options):
        return self._call(*args, **options)


def together(app, bodies):
    """Send all at once; return the replies and the thread of the event loop."""

    async def send_all():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await asyncio.gather(*(client.post(URL, content=body) for body in bodies))

    return asyncio.run(send_all()), threading.get_ident()


def test_concurrent_requests_get_the_answers_they_get_alone(make_predictor, encode):
    draw = np.random.default_rng(1)
    bodies = [
        encode(Image.fromarray(draw.integers(0, 256, (20, 30, 3), dtype=np.uint8)), format)
        for format in HTTP_FORMATS * 8
    ]
    bodies[5] = b"broken"
    alone = [TestClient(create_app(make_predictor())).post(URL, content=b) for b in bodies]
    predictor = make_predictor()
    watched = Watched(predictor)
    replies, loop_thread = together(create_app(predictor), bodies)
    assert [reply.json() for reply in replies] == [reply.json() for reply in alone]
    assert len({reply.text for reply in replies}) == len(bodies)
    assert [reply.status_code for reply in replies].count(422) == 1
    assert watched.most["predict"] == 1
    assert 1 <= watched.most["decode"] <= num_cores()
    assert loop_thread not in watched.threads


def test_as_many_requests_are_in_the_model_as_it_has_workers(make_predictor, encode):
    meet = threading.Barrier(2)

    def pair(pixels):
        meet.wait(10)  # broken, and so status 500, unless two are inside together
        return np.zeros((len(pixels), 3), np.float32)

    predictor = dataclasses.replace(make_predictor(pair), workers=2)
    watched = Watched(predictor)
    app = create_app(predictor, limits=Limits(max_batch_size=1))
    replies, _ = together(app, [encode("red")] * 6)
    assert [reply.status_code for reply in replies] == [200] * 6
    assert watched.most["predict"] == 2


def test_the_event_loop_answers_while_the_model_works(make_predictor, encode):
    release = threading.Event()

    def slow(pixels):
        assert release.wait(10)
        return np.zeros((len(pixels), 3), np.float32)

    async def probe():
        transport = httpx.ASGITransport(create_app(make_predictor(slow)))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            work = asyncio.create_task(client.post(URL, content=encode("red")))
            await asyncio.sleep(0.05)
            alive = await asyncio.wait_for(client.get("/livez"), 5)
            was_working = not work.done()
            release.set()
            return alive.status_code, was_working, (await work).status_code

    assert asyncio.run(probe()) == (200, True, 200)


def test_the_service_is_bounded_and_places_are_given_back(make_predictor, encode):
    release = threading.Event()

    def slow(pixels):
        assert release.wait(10)
        return np.zeros((len(pixels), 3), np.float32)

    async def fill():
        service = Service(make_predictor(slow), Limits(max_inside=3, max_images=3))
        red = encode("red")
        inside = [asyncio.create_task(service.logits([red], math.inf)) for _ in range(3)]
        await asyncio.sleep(0.05)
        with pytest.raises(Busy, match="at most 3"):
            await service.logits([red], math.inf)
        release.set()
        assert len(await asyncio.gather(*inside)) == 3
        for _ in range(5):  # an error gives its place back too
            assert isinstance((await service.logits([b"broken"], math.inf))[0], ImageError)
        assert (await service.logits([red], math.inf))[0].shape == (3,)
        assert service.num_inside == 0

    asyncio.run(fill())


def test_too_many_at_once_are_refused_with_429(make_predictor, encode):
    app = create_app(make_predictor(), limits=Limits(max_inside=2, max_images=2))
    replies, _ = together(app, [encode("red")] * 6)
    statuses = [reply.status_code for reply in replies]
    assert set(statuses) == {200, 429}
    refused = replies[statuses.index(429)]
    assert_error(refused, 429, "busy", "at most 2 images")
    assert int(refused.headers["retry-after"]) >= 1


def test_a_refusal_that_may_pass_says_when_to_try_again(make_predictor):
    client = TestClient(create_app(Future()))
    for path in ("/readyz", "/v2/health/ready"):
        reply = client.get(path)
        assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")


def test_json_of_many_values_and_odd_headers_are_no_failures(client):
    many = b'{"images": [' + b"[]," * 200_000 + b"[]]}"
    reply = client.post(URL, content=many, headers={"content-type": "application/json"})
    assert reply.status_code in (400, 413)
    form = {"content-type": f"multipart/form-data; boundary={'b' * 300}"}
    assert_error(client.post(URL, content=b"--x", headers=form), 400, "bad_body", "form")
    form = {"content-type": 'multipart/form-data; boundary=b; x="' + ";" * 1000}
    assert_error(client.post(URL, content=b"--b--", headers=form), 400, "bad_body", "1024 bytes")
    for accept in ("text/plain;version=x", "application/openmetrics-text;version=", "*/*;q=z"):
        assert client.get("/metrics", headers={"accept": accept}).status_code == 200


def test_the_head_of_a_part_is_short(client, encode):
    """Its parser takes long over many odd marks, and a form has many parts."""
    for length, status in ((1000, 200), (3000, 400)):
        name = 'form-data; name="' + ";" * length + '"'
        body = f"--b\r\nContent-Disposition: {name}\r\n\r\n".encode() + encode("red")
        form = {"content-type": "multipart/form-data; boundary=b"}
        reply = client.post(URL, content=body + b"\r\n--b--\r\n", headers=form)
        assert reply.status_code == status


def test_large_json_is_read_apart(make_predictor, encode):
    app = create_app(make_predictor())
    apart, seen = app.state.service.apart, []

    async def counted(call, deadline):
        seen.append(call)
        return await apart(call, deadline)

    app.state.service.apart = counted
    client = TestClient(app)
    image = encode("red") + bytes(1_000_000)
    asked = {"images": [base64.b64encode(image).decode(), base64.b64encode(b"no").decode()]}
    results = client.post(URL, json=asked).json()["results"]
    assert [one["status"] for one in results] == [200, 422]
    asked["images"][0] = "!" + asked["images"][0]
    assert_error(client.post(URL, json=asked), 400, "bad_body", "images[0] must be base64")
    assert len(seen) == 2
    asked["images"] = [base64.b64encode(encode("red")).decode()]
    assert client.post(URL, json=asked).status_code == 200
    assert len(seen) == 2


def test_a_model_that_hangs_is_not_ready(make_predictor, encode):
    release = threading.Event()

    def hung(pixels):
        assert release.wait(20)
        return np.zeros((len(pixels), 3), np.float32)

    app = create_app(make_predictor(hung), limits=Limits(hung_after_s=0.05))

    async def probe():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            work = asyncio.create_task(client.post(URL, content=encode("red")))
            await asyncio.sleep(0.5)
            paths = ("/livez", "/readyz", "/v2/health/ready", "/v2/models/model/ready")
            replies = [await client.get(path) for path in paths]
            replies.append(await client.post(URL, content=encode("red")))  # and is not waited for
            release.set()
            assert (await work).status_code == 200
            return [(reply.status_code, reply.headers["retry-after"]) for reply in replies]

    assert asyncio.run(probe()) == [(503, "1")] * 5


def test_bytes_that_nobody_waits_for_are_not_kept(make_predictor, encode):
    """Both decoders work for long: what gives up meanwhile must not pile up before them."""
    release, red = threading.Event(), encode("red")

    class Slow(Predictor):
        def decode(self, encoded, **bounds):
            assert release.wait(20)
            return super().decode(encoded, **bounds)

    one = make_predictor()
    slow = Slow(one.predict, one.preprocess, one.class_names, one.class_descriptions, "f" * 64)

    async def flood():
        service = Service(slow, Limits())
        for _ in range(50):
            late = await service.logits([red], time.monotonic() + 0.01)
            assert isinstance(late[0], Late)
        waiting = service._decoders._work_queue.qsize()
        release.set()
        assert (await service.logits([red], math.inf))[0].shape == (3,)
        return waiting, service.num_inside

    assert asyncio.run(flood()) == (0, 0)


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_call_for_each_core_decodes_in_the_threads_of_the_model(
    make_predictor, encode, monkeypatch, is_shared
):
    monkeypatch.setattr("fieldmark.serving.service.num_cores", lambda: 2)
    found = []

    def predict(pixels):
        found.append(threading.current_thread().name)
        return np.zeros((len(pixels), 3), np.float32)

    one = dataclasses.replace(make_predictor(predict), workers=2 if is_shared else 1)

    async def ask():
        await Service(one, Limits()).logits([encode("red")], math.inf)

    asyncio.run(ask())
    assert found[0].startswith("image" if is_shared else "model")


# --- described ---


def test_openapi_describes_the_body_and_every_error(client):
    schema = client.get("/openapi.json").json()
    post = schema["paths"][URL]["post"]
    content = post["requestBody"]["content"]
    assert set(content) == {
        *("image/jpeg", "image/png", "image/webp"),
        *("multipart/form-data", "application/json"),
    }
    raw = [item for name, item in content.items() if name.startswith("image/")]
    assert all(item["schema"]["format"] == "binary" for item in raw)
    assert set(post["responses"]) == {
        *("200", "400", "401", "413", "422", "429", "500", "503", "504")
    }
    for status, response in post["responses"].items():
        names = ("ClassifyBody", "BatchBody") if status == "200" else ("ErrorBody",)
        answer = response["content"]["application/json"]["schema"]
        found = [item["$ref"] for item in answer.get("anyOf", [answer])]
        assert found == [f"#/components/schemas/{name}" for name in names]
    names = {item["name"] for item in post["parameters"]}
    assert names == {"top_k", "explain", "x-request-timeout-seconds"}
    assert "HTTPValidationError" not in schema["components"]["schemas"]
    assert client.get("/docs").status_code == 200


# --- several images, deadlines, identity ---


def test_a_form_is_answered_image_by_image_in_order(client, encode):
    files = [
        ("images", ("a.png", encode("red"))),
        ("images", ("b.gif", encode("red", "GIF"))),
        ("anything", ("c.jpg", encode("blue", "JPEG"))),
    ]
    reply = client.post(URL, files=files, params={"top_k": 1})
    assert reply.status_code == 200
    results = reply.json()["results"]
    assert [(item["index"], item["name"], item["status"]) for item in results] == [
        (0, "a.png", 200),
        (1, "b.gif", 422),
        (2, "c.jpg", 200),
    ]
    assert [item["predictions"][0]["class_name"] for item in results if "predictions" in item] == [
        "red",
        "blue",
    ]
    alone = client.post(URL, content=encode("red"), params={"top_k": 1}).json()
    assert results[0]["predictions"] == alone["predictions"]
    assert results[1]["error"]["code"] == "bad_image"


def test_base64_in_json(client, encode):
    red = base64.b64encode(encode("red")).decode()
    blue = "data:image/png;base64," + base64.b64encode(encode("blue")).decode()
    results = client.post(URL, json={"images": [red, blue]}).json()["results"]
    assert [item["predictions"][0]["class_name"] for item in results] == ["red", "blue"]


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('{"images": []}', "1 to 32"),
        ('{"images": "abc"}', "1 to 32"),
        ('{"image": ["aaaa"]}', "the one key images"),
        ('{"images": [1]}', "images[0] must be a string"),
        ('{"images": ["&&&&"]}', "images[0] must be base64"),
        ('{"images": ["data:text/html;base64,aaaa"]}', "images[0] must be base64"),
        ("[1, 2]", "the one key images"),
        ("[" * 100_000, "far more values"),
        ("[" * 1_000, "must be JSON"),
        ('{"images": [' + ",".join(['"aaaa"'] * 33) + "]}", "1 to 32"),
    ],
)
def test_json_that_is_not_images(client, content, part):
    headers = {"content-type": "application/json"}
    assert_error(client.post(URL, content=content, headers=headers), 400, "bad_body", part)


@pytest.mark.parametrize(
    ("body", "part"),
    [
        (b"", "must end"),
        (b"--b--\r\n", "no part"),
        (b"--c\r\n\r\nabc\r\n--c--\r\n", "cannot be read"),
        (b'--b\r\nContent-Disposition: form-data; name="f"\r\n\r\nabc', "must end"),
        (b"--b\r\nno colon\r\n\r\nabc\r\n--b--\r\n", "cannot be read"),
        (b"--b\r\n" + b"X: y\r\n" * 3000 + b"\r\nabc\r\n--b--\r\n", "cannot be read"),
        (b"--b\r\nX: y\r\n\r\nabc\r\n--bc\r\nX: y\r\n\r\nd\r\n--b--\r\n", "cannot be read"),
        (b"--b\r\n\r\nabc\r\n" * 33 + b"--b--\r\n", "at most 32 images"),
    ],
)
def test_forms_that_cannot_be_read(client, body, part):
    headers = {"content-type": "multipart/form-data; boundary=b"}
    assert_error(client.post(URL, content=body, headers=headers), 400, "bad_body", part)


def test_caps_hold_inside_forms_and_base64(make_predictor, encode):
    limits = Limits(max_body_bytes=1000, max_pixels=1000, max_request_bytes=5000)
    client = TestClient(create_app(make_predictor(), limits=limits))
    noise = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    large, wide = encode(Image.fromarray(noise)), encode(Image.new("L", (40, 40)))
    form = client.post(
        URL, files=[("a", large), ("b", wide), ("c", encode(Image.new("L", (9, 9))))]
    )
    assert [item["status"] for item in form.json()["results"]] == [413, 413, 200]
    text = [base64.b64encode(image).decode() for image in (large, wide)]
    results = client.post(URL, json={"images": text}).json()["results"]
    assert [item["error"]["code"] for item in results] == ["body_too_large", "image_too_large"]
    assert_error(client.post(URL, json={"images": text * 3}), 413, "body_too_large", "5000")
    assert_error(client.post(URL, files=[("a", bytes(6000))]), 413, "body_too_large", "5000")


@pytest.mark.parametrize("given", ["0", "-1", "soon", "nan", "inf", ""])
def test_a_deadline_must_be_seconds(client, encode, given):
    reply = client.post(URL, content=encode("red"), headers={"x-request-timeout-seconds": given})
    assert_error(reply, 400, "bad_query", "number of seconds above 0")


def test_an_answer_that_comes_too_late_is_504(make_predictor, encode):
    release = threading.Event()

    def slow(pixels):
        release.wait(10)
        return np.zeros((len(pixels), 3), np.float32)

    client = TestClient(create_app(make_predictor(slow)), raise_server_exceptions=False)
    headers = {"x-request-timeout-seconds": "0.1"}
    try:
        assert_error(client.post(URL, content=encode("red"), headers=headers), 504, "late")
    finally:
        release.set()


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [("abc-1.2:3_4", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), ("\t", False)],
)
def test_every_answer_says_whose_it_is(client, make_predictor, encode, given, is_kept):
    for reply in (
        client.post(URL, content=encode("red"), headers={"x-request-id": given}),
        client.post(URL, content=b"broken", headers={"x-request-id": given}),
        client.get("/nowhere", headers={"x-request-id": given}),
    ):
        assert (reply.headers["x-request-id"] == given) is is_kept
        assert reply.headers["x-request-id"].isascii()
        assert reply.headers["x-model-id"] == "f" * 64
        assert reply.headers["x-preprocessing"] == make_predictor().preprocess.digest()


def test_a_failure_inside_has_its_request_id(make_predictor, encode):
    def fail(_):
        raise RuntimeError("secret")

    client = TestClient(create_app(make_predictor(fail)))
    reply = client.post(URL, content=encode("red"), headers={"x-request-id": "one"})
    assert_error(reply, 500, "internal")
    assert reply.headers["x-request-id"] == "one"


def test_a_client_that_goes_takes_its_image_along(make_predictor, encode):
    release, seen = threading.Event(), []

    def slow(pixels):
        seen.append(len(pixels))
        assert release.wait(10)
        return np.zeros((len(pixels), 3), np.float32)

    app = create_app(make_predictor(slow), limits=Limits(max_batch_size=1))

    async def go():
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            first = asyncio.create_task(client.post(URL, content=encode("red")))
            await asyncio.sleep(0.05)
            leaves = asyncio.create_task(leave(app, encode("red")))
            last = asyncio.create_task(client.post(URL, content=encode("red")))
            await asyncio.wait_for(leaves, 10)  # which ends with the client and not with the image
            release.set()
            return (await first).status_code, (await last).status_code

    assert asyncio.run(go()) == (200, 200)
    assert seen == [1, 1]


async def leave(app, body):
    """Send a request whole, and hang up while it waits."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        if messages:
            return messages.pop()
        await asyncio.sleep(0.05)
        return {"type": "http.disconnect"}

    async def send(message):
        pass

    scope = {
        "type": "http",
        "method": "POST",
        "path": URL,
        "raw_path": URL.encode(),
        "query_string": b"",
        "headers": [],
        "http_version": "1.1",
    }
    await app(scope, receive, send)


def test_live_ends_when_the_model_hangs(make_predictor, encode):
    release = threading.Event()

    def hang(pixels):
        assert release.wait(10)
        return np.zeros((len(pixels), 3), np.float32)

    async def go():
        transport = httpx.ASGITransport(
            create_app(make_predictor(hang), limits=Limits(hung_after_s=0.05))
        )
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            work = asyncio.create_task(client.post(URL, content=encode("red")))
            async with asyncio.timeout(5):
                while (hung := await client.get("/livez")).status_code == 200:
                    await asyncio.sleep(0.02)
            release.set()
            await work
            return hung, await client.get("/livez")

    hung, after = asyncio.run(go())
    assert_error(hung, 503, "not_alive", "busy with one batch")
    assert after.status_code == 200


@pytest.mark.parametrize(
    ("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)]
)
def test_a_compressed_body_is_read_as_its_header_says(client, encode, encoding, pack):
    headers = {"Content-Encoding": encoding}
    reply = client.post(URL, content=pack(encode("red")), headers=headers)
    assert reply.json()["predictions"][0]["class_name"] == "red"
    reply = client.post(URL, content=encode("red"), headers=headers)
    assert_error(reply, 400, "bad_body", f"must be {encoding}, as its header says")
    reply = client.post(URL, content=encode("red"), headers={"Content-Encoding": "br"})
    assert_error(reply, 400, "bad_body", "gzip or deflate. Got 'br'")
    reply = client.post(URL, content=pack(bytes(10_000_001)), headers=headers)
    assert reply.status_code == 413


def test_a_picture_that_hangs_turns_live_off(make_predictor, monkeypatch):
    app = create_app(make_predictor(), limits=Limits(hung_after_s=0.05))
    service, entered, leave = app.state.service, threading.Event(), threading.Event()

    class Hung:
        def run(self, images):
            entered.set()
            assert leave.wait(10)
            return images, images

        def maps(self, features, classes):
            return np.ones((1, 1, 2, 2), np.float32)

    service._predictor = dataclasses.replace(service.predictor, maps=Hung())
    thread = threading.Thread(
        target=service._draw, args=(np.zeros((4, 4, 3), np.uint8), 0, math.inf)
    )
    thread.start()
    assert entered.wait(10)
    client = TestClient(app)
    time.sleep(0.1)
    assert_error(client.get("/livez"), 503, "not_alive", "explained for more than 0.05 s")
    leave.set()
    thread.join(10)
    assert client.get("/livez").status_code == 200

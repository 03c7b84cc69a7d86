"""protocol.py and tensors.py: the Open Inference Protocol, and what does not follow it."""

import base64
import gzip
import json
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from fastapi.testclient import TestClient

from fieldmark.errors import BodyTooLarge
from fieldmark.serving.app import create_app
from fieldmark.serving.compression import inflate
from fieldmark.serving.limits import Limits
from fieldmark.serving.replies import BadBody
from fieldmark.serving.tensors import parse_inference

INFER = "/v2/models/model/infer"
LENGTH = "inference-header-content-length"
PACKED = {"content-encoding": "gzip"}
PIXELS = {"name": "images", "datatype": "UINT8", "shape": [1, 16, 16, 3]}


@pytest.fixture
def client(make_predictor):
    limits = Limits(max_request_bytes=100_000, max_images=4)
    return TestClient(create_app(make_predictor(), limits=limits), raise_server_exceptions=False)


def assert_error(reply, status, part):
    assert reply.status_code == status, reply.text
    assert set(reply.json()) == {"error"}
    assert part in reply.json()["error"]
    assert len(reply.text) < 500


def test_metadata_and_health(client, make_predictor):
    assert client.get("/v2/health/live").status_code == 200
    assert client.get("/v2/health/ready").status_code == 200
    for path in ("/v2", "/v2/"):
        assert client.get(path).json()["name"] == "fieldmark"
    about = client.get("/v2/models/model").json()
    assert about["versions"] == ["f" * 12]
    assert about["outputs"][0] == {"name": "logits", "datatype": "FP32", "shape": [-1, 3]}
    assert client.get(f"/v2/models/model/versions/{'f' * 12}").json() == about
    assert client.get("/v2/models/model/ready").json() == {"name": "model", "ready": True}
    assert_error(client.get("/v2/models/nobody"), 404, "'nobody'")
    assert_error(client.get("/v2/models/model/versions/1/ready"), 404, "version 1")
    assert_error(client.get("/v2/nothing"), 404, "does not exist")
    assert_error(client.get(INFER), 405, "POST")


def test_json_in_and_out(client, make_predictor, encode):
    predictor = make_predictor()
    decoded = predictor.decode(encode("red"))
    text = base64.b64encode(encode("red")).decode()
    asked = {"id": "a", "inputs": [{"name": "encoded", "datatype": "BYTES", "shape": [1]}]}
    asked["inputs"][0]["data"] = [text]
    reply = client.post(INFER, json=asked).json()
    assert (reply["model_name"], reply["model_version"], reply["id"]) == ("model", "f" * 12, "a")
    outputs = {output["name"]: output for output in reply["outputs"]}
    assert outputs["logits"]["shape"] == [1, 3]
    expected = predictor.predict(decoded[None])
    assert np.array_equal(np.float32(outputs["logits"]["data"]), expected[0])
    assert sum(outputs["probabilities"]["data"]) == pytest.approx(1, abs=1e-6)
    nested = {
        "inputs": [PIXELS | {"data": decoded[None].tolist()}],
        "outputs": [{"name": "logits"}],
    }
    flat = {
        "inputs": [PIXELS | {"data": decoded.ravel().tolist()}],
        "outputs": [{"name": "logits"}],
    }
    for content in (nested, flat):
        [logits] = client.post(INFER, json=content).json()["outputs"]
        assert np.array_equal(np.float32(logits["data"]), expected[0])


def test_a_raw_image_is_the_single_input(client, make_predictor, encode):
    reply = client.post(INFER, content=encode("blue"), headers={LENGTH: "0"})
    size = int(reply.headers[LENGTH])
    head = json.loads(reply.content[:size])
    assert [o["parameters"]["binary_data_size"] for o in head["outputs"]] == [12, 12]
    predictor = make_predictor()
    expected = predictor.predict(predictor.decode(encode("blue"))[None])
    found = np.frombuffer(reply.content[size:], "<f4").reshape(2, 3)
    assert np.array_equal(found[0], expected[0])


def test_binary_tensors_and_classification(client, encode):
    elements = b"".join(struct.pack("<I", len(x)) + x for x in (encode("red"), encode("green")))
    asked = {
        "inputs": [
            {
                "name": "encoded",
                "datatype": "BYTES",
                "shape": [2],
                "parameters": {"binary_data_size": len(elements)},
            }
        ],
        "outputs": [
            {"name": "probabilities", "parameters": {"classification": 1, "binary_data": True}},
            {"name": "logits", "parameters": {"classification": 2}},
        ],
    }
    head = json.dumps(asked).encode()
    reply = client.post(INFER, content=head + elements, headers={LENGTH: str(len(head))})
    size = int(reply.headers[LENGTH])
    first, second = json.loads(reply.content[:size])["outputs"]
    assert (first["datatype"], first["shape"], second["shape"]) == ("BYTES", [2, 1], [2, 2])
    assert [text.split(":")[1:] for text in second["data"]][::2] == [["0", "red"], ["1", "green"]]
    raw = reply.content[size:]
    (length,) = struct.unpack_from("<I", raw)
    assert raw[4 : 4 + length].decode().endswith(":0:red")


@pytest.mark.parametrize(
    ("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)]
)
def test_compressed_bodies(client, encode, encoding, pack):
    headers = {LENGTH: "0", "content-encoding": encoding}
    assert client.post(INFER, content=pack(encode("red")), headers=headers).status_code == 200
    assert_error(client.post(INFER, content=b"plain", headers=headers), 400, encoding)
    bomb = pack(bytes(50_000_000))
    assert_error(client.post(INFER, content=bomb, headers=headers), 413, "100000")
    cut = pack(encode("red"))[:-6]
    assert_error(client.post(INFER, content=cut, headers=headers), 400, "one whole")


@pytest.mark.parametrize(
    ("accepted", "used"),
    [
        ("gzip", "gzip"),
        ("deflate, gzip;q=0.5", "gzip"),
        ("deflate", "deflate"),
        ("gzip;q=0, deflate", "deflate"),
        ("br, gzip; q=0.0", None),
        ("", None),
    ],
)
def test_replies_are_compressed_as_the_client_asks(client, encode, accepted, used):
    plain = infer(client, encode("red"), {"accept-encoding": "identity"})
    packed = infer(client, encode("red"), {"accept-encoding": accepted})
    assert packed.headers.get("content-encoding") == used
    assert packed.headers[LENGTH] == plain.headers[LENGTH]
    assert packed.content == plain.content  # httpx has unpacked it


def infer(client, image, headers):
    return client.post(INFER, content=image, headers={LENGTH: "0", **headers})


HUGE = [2**40 - 1] * 5_000
MANY = [[]] * 20_000


@pytest.mark.parametrize(
    ("asked", "part"),
    [
        ({"inputs": [PIXELS | {"shape": HUGE, "data": []}]}, "few sides. Got 5000"),
        ({"inputs": [PIXELS | {"shape": [2**39] * 8, "data": []}]}, "values from 0 to 255"),
        ({"inputs": [PIXELS | {"data": MANY}]}, "at most 5096 values"),
        ({"inputs": [PIXELS | {"data": ["x" * 1000] + [1] * 767}]}, "values from 0 to 255"),
        ({"inputs": [PIXELS | {"data": [1.5] * 768}]}, "values from 0 to 255"),
        ({"inputs": [PIXELS | {"data": [True] * 768}]}, "values from 0 to 255"),
        ({"inputs": [PIXELS | {"data": [0] * 768}], "outputs": [{"name": "logits"}] * 2}, "twice"),
    ],
)
def test_what_is_small_as_text_and_large_as_objects_is_refused_at_once(client, asked, part):
    started = time.process_time()
    reply = client.post(INFER, content=gzip.compress(json.dumps(asked).encode()), headers=PACKED)
    assert_error(reply, 400, part)
    assert time.process_time() - started < 5


def test_a_length_of_many_digits_is_a_bad_request(client):
    for length in ("9" * 5000, "0" * 20 + "9" * 10, "-1", "1e3"):
        reply = client.post(INFER, content=b"{}", headers={LENGTH: length})
        assert_error(reply, 400, "must be a number of bytes")
    reply = client.post(INFER, content=b"no image", headers={LENGTH: "0" * 5000})
    assert_error(reply, 422, "must be one of JPEG")


@pytest.mark.parametrize(
    "tensor",
    [
        {"datatype": 1, "shape": []},
        {"datatype": "UINT8", "shape": 1},
        {"datatype": "UINT8", "shape": ["a"]},
        {"datatype": "UINT8", "shape": [1], "parameters": 1},
        {"datatype": "BYTES", "shape": [1], "data": 1},
        {"datatype": "BYTES", "shape": [1], "data": [1]},
        {"datatype": "FP32", "shape": [1], "data": [1]},
    ],
)
def test_names_that_are_no_text_are_shown_and_not_repeated(client, tensor):
    body = json.dumps({"inputs": [{"name": "\ud800<b>", **tensor}]})
    assert_error(client.post(INFER, content=body), 400, "must be")


def test_what_the_protocol_does_not_know_is_refused(client):
    asked = {"inputs": [PIXELS | {"data": [0] * 768}]}
    reply = client.post(INFER, params={"top_k": 1}, json=asked)
    assert_error(reply, 400, "no parameters in its URL. Got 'top_k=1'")
    for more in (
        {"parameters": {"binary_data_output": "false"}},
        {"outputs": [{"name": "logits", "parameters": {"binary_data": "false"}}]},
    ):
        assert_error(client.post(INFER, json=asked | more), 400, "must be true or false")


def test_inflating_never_holds_more_than_its_cap():
    with pytest.raises(BodyTooLarge):
        inflate(gzip.compress(bytes(1001)), "gzip", 1000)
    assert inflate(gzip.compress(bytes(1000)), "gzip", 1000) == bytes(1000)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("", "must begin with JSON"),
        ("[]", "must be an object"),
        ("[" * 50_000, "at most 5096 values"),
        ("[" * 4_000, "must begin with JSON"),
        ('{"inputs": 3}', "inputs must be a list"),
        ('{"inputs": [3]}', "an input must be an object"),
        ('{"inputs": []}', "inputs must be one of"),
        ({"inputs": [PIXELS]}, "either data or binary_data_size"),
        ({"inputs": [PIXELS | {"data": [1, 2]}]}, "768 values"),
        ({"inputs": [PIXELS | {"data": [256] * 768}]}, "768 values"),
        ({"inputs": [PIXELS | {"data": [0.5] * 768}]}, "768 values"),
        ({"inputs": [PIXELS | {"data": ["a"] * 768}]}, "768 values"),
        ({"inputs": [PIXELS | {"data": [[1], [2, 3]]}]}, "768 values"),
        ({"inputs": [PIXELS | {"shape": [0, 16, 16, 3], "data": []}]}, "1 to 4 images"),
        ({"inputs": [PIXELS | {"shape": [256, 3], "data": [0] * 768}]}, "must have the shape"),
        ({"inputs": [PIXELS | {"shape": [2**39, 2**39], "data": [0]}]}, "values from 0"),
        ({"inputs": [PIXELS | {"shape": [-1], "data": [0]}]}, "whole number"),
        ({"inputs": [PIXELS | {"datatype": "FP32", "data": [0] * 768}]}, "UINT8 or BYTES"),
        ({"inputs": [PIXELS | {"name": "encoded", "data": [0] * 768}]}, "other way round"),
        ({"inputs": [PIXELS | {"data": [0] * 768}] * 2}, "different names"),
        ({"inputs": [PIXELS | {"parameters": {"binary_data_size": 5}}]}, "within the body"),
        ({"inputs": [PIXELS | {"data": [0] * 768}], "outputs": [{"name": "x"}]}, "among logits"),
        (
            {
                "inputs": [PIXELS | {"data": [0] * 768}],
                "outputs": [{"name": "logits", "parameters": {"classification": 4}}],
            },
            "at most 3",
        ),
        ({"inputs": [PIXELS | {"data": [0] * 768}], "id": 3}, "id must be a string"),
        (
            {"inputs": [{"name": "encoded", "datatype": "BYTES", "shape": [1], "data": ["&"]}]},
            "base64",
        ),
        (
            {"inputs": [{"name": "encoded", "datatype": "BYTES", "shape": [2], "data": ["aaaa"]}]},
            "2 elements",
        ),
    ],
)
def test_what_does_not_follow_the_protocol(client, content, part):
    text = content if isinstance(content, str) else json.dumps(content)
    assert_error(client.post(INFER, content=text), 400, part)


@pytest.mark.parametrize("length", ["-1", "x", "1e3", "999999"])
def test_a_wrong_header_length(client, length):
    assert_error(client.post(INFER, content=b"{}", headers={LENGTH: length}), 400, LENGTH)


@pytest.mark.parametrize("raw", [b"\1", b"\5\0\0\0ab", b"\xff\xff\xff\xffab"])
def test_binary_elements_that_are_cut_off(client, raw):
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": "encoded",
                    "datatype": "BYTES",
                    "shape": [1],
                    "parameters": {"binary_data_size": len(raw)},
                }
            ]
        }
    ).encode()
    reply = client.post(INFER, content=head + raw, headers={LENGTH: str(len(head))})
    assert_error(reply, 400, "cut off")
    more = client.post(INFER, content=head + raw + b"x", headers={LENGTH: str(len(head))})
    assert more.status_code == 400


@pytest.mark.parametrize(("shape", "words"), [(1_000_000, "1 to 32 images"), (1, "are left")])
def test_elements_that_are_too_many_are_not_made(shape, words):
    """They would be, one by one, while nothing else is answered."""
    raw = b"\1\0\0\0x" * 1_000_000
    size = {"binary_data_size": len(raw)}
    tensor = {"name": "encoded", "datatype": "BYTES", "shape": [shape], "parameters": size}
    head = json.dumps({"inputs": [tensor]}).encode()
    tracemalloc.start()
    try:
        with pytest.raises(BadBody, match=words):
            parse_inference(head + raw, str(len(head)), 1000, 32)
        assert tracemalloc.get_traced_memory()[1] < 4 * len(raw)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("what", ["inputs", "outputs"])
def test_tensors_that_are_too_many_are_refused(client, what):
    tensors = [{"name": f"t{k}", "datatype": "BYTES", "shape": [0], "data": []} for k in range(17)]
    asked = {"inputs": tensors[:1], what: tensors}
    assert_error(client.post(INFER, json=asked), 400, f"{what} must be at most 16. Got 17")


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready", "/livez", "/readyz"])
def test_health_is_told_to_who_asks_with_head(client, path):
    assert client.head(path).status_code == 200


def test_a_bad_image_is_named(client, encode):
    texts = [base64.b64encode(x).decode() for x in (encode("red"), b"no image")]
    tensor = {"name": "encoded", "datatype": "BYTES", "shape": [2], "data": texts}
    assert_error(client.post(INFER, json={"inputs": [tensor]}), 422, "image 1: image must")


def test_a_client_s_timeout_in_microseconds(client, encode):
    tensor = {"name": "encoded", "datatype": "BYTES", "shape": [1]}
    tensor["data"] = [base64.b64encode(encode("red")).decode()]
    asked = {"inputs": [tensor], "parameters": {"timeout": 1}}
    assert_error(client.post(INFER, json=asked), 504, "deadline")

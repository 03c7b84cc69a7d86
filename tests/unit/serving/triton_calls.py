"""Each call of tritonclient's HTTP clients that a user makes: HOST:PORT, model, image files.

Prints one JSON object: the logits that each way of asking gave, and the errors.
"""

import asyncio
import base64
import json
import sys
from pathlib import Path

import numpy as np
import tritonclient.http as sync
import tritonclient.http.aio as aio
from tritonclient.utils import InferenceServerException

URL, MODEL, *FILES = sys.argv[1:]
ENCODED = np.array([Path(name).read_bytes() for name in FILES], dtype=object)
SIDE = 16


def encoded(module, binary=True):
    """In JSON, BYTES are base64: tritonclient takes text alone there."""
    values = ENCODED
    if not binary:
        values = np.array([base64.b64encode(one).decode() for one in ENCODED], dtype=object)
    tensor = module.InferInput("encoded", [len(ENCODED)], "BYTES")
    return [tensor.set_data_from_numpy(values, binary_data=binary)]


def pixels(module, binary):
    images = np.stack([np.full((SIDE, SIDE, 3), 40 * k, np.uint8) for k in range(3)])
    tensor = module.InferInput("images", list(images.shape), "UINT8")
    return [tensor.set_data_from_numpy(images, binary_data=binary)]


def error_of(call):
    try:
        call()
    except InferenceServerException as error:
        return [error.status(), error.message()]
    return None


def readable(texts):
    return [[text.decode() if isinstance(text, bytes) else text for text in row] for row in texts]


def synchronous():
    client = sync.InferenceServerClient(URL)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL)
    about = client.get_model_metadata(MODEL)
    version = about["versions"][0]
    assert client.is_model_ready(MODEL, version)
    assert set(client.get_server_metadata()["extensions"]) == {
        "binary_tensor_data",
        "classification",
    }
    found = {}
    wanted = [sync.InferRequestedOutput("logits", binary_data=False)]
    for name, options in {
        "binary": {"inputs": encoded(sync)},
        "json output": {"inputs": encoded(sync), "outputs": wanted},
        "gzip": {"inputs": encoded(sync), "request_compression_algorithm": "gzip"},
        "deflate": {"inputs": encoded(sync), "request_compression_algorithm": "deflate"},
        "gzip reply": {"inputs": encoded(sync), "response_compression_algorithm": "gzip"},
        "deflate reply": {"inputs": encoded(sync), "response_compression_algorithm": "deflate"},
        "version": {"inputs": encoded(sync), "model_version": version},
        "json input": {"inputs": encoded(sync, binary=False)},
    }.items():
        found[name] = client.infer(MODEL, **options).as_numpy("logits").tolist()
    for name, binary in (("pixels", True), ("pixels in json", False)):
        found[name] = client.infer(MODEL, pixels(sync, binary)).as_numpy("logits").tolist()
        packed = client.infer(MODEL, pixels(sync, binary), request_compression_algorithm="gzip")
        found[f"{name}, gzip"] = packed.as_numpy("logits").tolist()
    for binary in (True, False):
        output = sync.InferRequestedOutput("probabilities", binary_data=binary, class_count=2)
        reply = client.infer(MODEL, encoded(sync), outputs=[output], request_id="seven")
        assert reply.get_response()["id"] == "seven"
        texts = reply.as_numpy("probabilities")
        found[f"classes {binary}"] = readable(texts)
    waiting = [client.async_infer(MODEL, encoded(sync)) for _ in range(4)]
    found["async"] = [item.get_result().as_numpy("logits").tolist() for item in waiting][-1]
    bad = sync.InferInput("encoded", [1], "BYTES")
    bad.set_data_from_numpy(np.array([b"no image"], dtype=object))
    large = sync.InferInput("encoded", [1], "BYTES")
    large.set_data_from_numpy(np.array([bytes(10_000_001)], dtype=object))
    wrong = sync.InferInput("images", [1, 3, 3, 3], "UINT8")
    wrong.set_data_from_numpy(np.zeros((1, 3, 3, 3), np.uint8))
    unknown = [sync.InferRequestedOutput("nothing")]
    errors = {
        "model": error_of(lambda: client.infer("nobody", encoded(sync))),
        "version": error_of(lambda: client.infer(MODEL, encoded(sync), model_version="9")),
        "image": error_of(lambda: client.infer(MODEL, [bad])),
        "large": error_of(lambda: client.infer(MODEL, [large])),
        "shape": error_of(lambda: client.infer(MODEL, [wrong])),
        "output": error_of(lambda: client.infer(MODEL, encoded(sync), outputs=unknown)),
        "metadata": error_of(lambda: client.get_model_metadata("nobody")),
        "timeout": error_of(lambda: client.infer(MODEL, encoded(sync), timeout=1)),
    }
    client.close()
    return about, found, errors


async def asynchronous():
    async with aio.InferenceServerClient(URL) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready(MODEL)
        assert (await client.get_server_metadata())["name"] == "fieldmark"
        assert (await client.get_model_metadata(MODEL))["name"] == MODEL
        found = {}
        for name, options in {
            "aio": {},
            "aio gzip": {"request_compression_algorithm": "gzip"},
            "aio deflate": {"request_compression_algorithm": "deflate"},
            "aio gzip reply": {"response_compression_algorithm": "gzip"},
            "aio deflate reply": {"response_compression_algorithm": "deflate"},
        }.items():
            reply = await client.infer(MODEL, encoded(aio), **options)
            found[name] = reply.as_numpy("logits").tolist()
        reply = await client.infer(MODEL, encoded(aio, binary=False))
        found["aio json input"] = reply.as_numpy("logits").tolist()
        for name, binary in (("aio pixels", True), ("aio pixels in json", False)):
            reply = await client.infer(MODEL, pixels(aio, binary))
            found[name] = reply.as_numpy("logits").tolist()
        for binary in (True, False):
            output = aio.InferRequestedOutput("probabilities", binary_data=binary, class_count=2)
            reply = await client.infer(MODEL, encoded(aio), outputs=[output])
            found[f"aio classes {binary}"] = readable(reply.as_numpy("probabilities"))
        bad = aio.InferInput("encoded", [1], "BYTES")
        bad.set_data_from_numpy(np.array([b"no image"], dtype=object))
        wrong = aio.InferInput("images", [1, 3, 3, 3], "UINT8")
        wrong.set_data_from_numpy(np.zeros((1, 3, 3, 3), np.uint8))
        errors = {}
        for name, call in {
            "aio model": client.infer("nobody", encoded(aio)),
            "aio image": client.infer(MODEL, [bad]),
            "aio shape": client.infer(MODEL, [wrong]),
            "aio timeout": client.infer(MODEL, encoded(aio), timeout=1),
        }.items():
            try:
                await call
            except InferenceServerException as error:
                errors[name] = [error.status(), error.message()]
        return found, errors


about, found, errors = synchronous()
more, more_errors = asyncio.run(asynchronous())
print(json.dumps({"about": about, "found": found | more, "errors": errors | more_errors}))

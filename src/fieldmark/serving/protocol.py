"""The Open Inference Protocol, V2, over HTTP: what tritonclient speaks.

Inputs, one of the two: `images`, UINT8 (N, H, W, 3), as the preprocessing makes them; or `encoded`,
BYTES (N): JPEG, PNG or WebP files. Outputs: `logits` and `probabilities`, FP32 (N, num_classes), or
with the classification extension their best classes as text. Errors are {"error": text}.
"""

import time
from typing import Any

import numpy as np
from fastapi import APIRouter, Request, Response

import fieldmark
from fieldmark.errors import FieldmarkError
from fieldmark.measure import largest, softmax
from fieldmark.preprocess import Pixels
from fieldmark.serving.compression import compress
from fieldmark.serving.door import count_images
from fieldmark.serving.intake import SPARE_PARTS, deadline_of, read_body
from fieldmark.serving.predictor import Predictor
from fieldmark.serving.presence import unless_gone
from fieldmark.serving.replies import BadBody, BadQuery, NoSuchModel, ProtocolError, shown, to_error
from fieldmark.serving.service import Service
from fieldmark.serving.tensors import (
    LENGTH_HEADER,
    Asked,
    Inference,
    parse_inference,
    to_body,
    too_many_images,
)

_BYTES: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_NAME: dict[str, Any] = {"type": "string"}
_SHAPE: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_TENSOR: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"enum": ["images", "encoded"]},
        "datatype": {"enum": ["UINT8", "BYTES"]},
        "shape": _SHAPE,
        "data": {"type": "array"},
        "parameters": {"type": "object"},
    },
    "required": ["name", "datatype", "shape"],
}
_OUTPUT: dict[str, Any] = {
    "type": "object",
    "properties": {"name": {"enum": ["logits", "probabilities"]}, "parameters": {"type": "object"}},
    "required": ["name"],
}
_ASKED: dict[str, Any] = {
    "type": "object",
    "properties": {
        "id": _NAME,
        "inputs": {"type": "array", "items": _TENSOR, "minItems": 1, "maxItems": 1},
        "outputs": {"type": "array", "items": _OUTPUT},
        "parameters": {"type": "object"},
    },
    "required": ["inputs"],
}
_INFERENCE = {
    "requestBody": {
        "description": "JSON; or JSON and the bytes of its tensors, with the length of the JSON in "
        "Inference-Header-Content-Length, where 0 stands for the bytes of one image.",
        "required": True,
        "content": {"application/json": {"schema": _ASKED}, "application/octet-stream": _BYTES},
    }
}
_INFERRED: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The outputs, in the form that was asked for.",
        "content": {"application/json": {}, "application/octet-stream": _BYTES},
    }
}

MAX_JSON_VALUES = 1_000_000  # of a request with more than one image; about 0.1 s
EXTENSIONS = ("binary_tensor_data", "classification")
OUTPUTS = ("logits", "probabilities")


def make_router(service: Service) -> APIRouter:
    """Return the routes of the protocol."""
    # "default" takes the place of the framework's own description of errors, too.
    errors: dict[int | str, dict[str, Any]] = {"default": {"model": ProtocolError}}
    router = APIRouter(prefix="/v2", responses=errors)

    @router.head("/health/live", include_in_schema=False)
    @router.get("/health/live")
    async def live() -> dict[str, bool]:
        """Say that the process answers."""
        service.must_live()
        return {"live": True}

    @router.head("/health/ready", include_in_schema=False)
    @router.get("/health/ready")
    async def ready() -> dict[str, bool]:
        """Say that the model is loaded and checked."""
        service.must_be_ready()
        return {"ready": True}

    @router.get("")
    @router.get("/", include_in_schema=False)
    async def server() -> dict[str, Any]:
        """Describe the service."""
        return {
            "name": "fieldmark",
            "version": fieldmark.__version__,
            "extensions": list(EXTENSIONS),
        }

    for path in ("/models/{name}", "/models/{name}/versions/{version}"):
        _add_model_routes(router, path, service)
    return router


def _add_model_routes(router: APIRouter, path: str, service: Service) -> None:
    @router.get(path)
    async def model(name: str, version: str | None = None) -> dict[str, Any]:
        """Describe the model."""
        predictor = _found(service, name, version)
        spec, classes = predictor.preprocess, predictor.num_classes
        shape = [-1, spec.height_px, spec.width_px, 3]
        return {
            "name": predictor.name,
            "versions": [predictor.version],
            "platform": predictor.platform,
            "inputs": [
                {"name": "images", "datatype": "UINT8", "shape": shape},
                {"name": "encoded", "datatype": "BYTES", "shape": [-1]},
            ],
            "outputs": [{"name": o, "datatype": "FP32", "shape": [-1, classes]} for o in OUTPUTS],
        }

    @router.get(path + "/ready")
    async def model_ready(name: str, version: str | None = None) -> dict[str, Any]:
        """Say that the model is loaded and checked."""
        service.must_be_ready()
        return {"name": _found(service, name, version).name, "ready": True}

    @router.post(path + "/infer", openapi_extra=_INFERENCE, responses=_INFERRED)
    async def infer(request: Request, name: str, version: str | None = None) -> Response:
        """Infer: JSON, or JSON and binary tensors, or (with length 0) one encoded image."""
        predictor = _found(service, name, version)
        if request.url.query:
            raise BadQuery(f"infer takes no parameters in its URL. Got {shown(request.url.query)}.")
        deadline = deadline_of(request.headers, service.limits)
        body = await read_body(request, service, service.limits.max_request_bytes)
        spec = predictor.preprocess
        # Pixels as lists of lists of lists in JSON have a number and a list of three for each.
        # While JSON is read nothing else is answered, so that more than one image must be small.
        of_one = 4 * spec.height_px * spec.width_px
        most = min(service.limits.max_images * of_one, max(of_one, MAX_JSON_VALUES)) + SPARE_PARTS
        length, max_images = request.headers.get(LENGTH_HEADER), service.limits.max_images
        asked = parse_inference(body, length, most, max_images)
        if asked.timeout_us is not None:
            deadline = min(deadline, time.monotonic() + asked.timeout_us / 1e6)
        images = _images(asked, predictor, max_images)
        outputs = _outputs(asked, predictor)
        count_images(request, service, len(images), len(images), deadline)
        found = await unless_gone(request, service.logits(images, deadline))
        for index, row in enumerate(found):
            if isinstance(row, Exception):
                raise _of_image(index, row) if len(found) > 1 else row
        logits = np.stack([row for row in found if not isinstance(row, Exception)])
        accepted = request.headers.get("accept-encoding", "")
        return _reply(asked, outputs, predictor, logits, accepted)


def _found(service: Service, name: str, version: str | None) -> Predictor:
    predictor = service.predictor
    if name != predictor.name or version not in (None, predictor.version):
        wanted = name if version is None else f"{name}, version {version}"
        raise NoSuchModel(
            f"the model must be {predictor.name}, version {predictor.version}. Got {shown(wanted)}."
        )
    return predictor


def _images(asked: Inference, predictor: Predictor, max_images: int) -> list[bytes | Pixels]:
    if len(asked.inputs) != 1 or not set(asked.inputs) <= {"images", "encoded"}:
        raise BadBody(
            "inputs must be one of images (UINT8) and encoded (BYTES). "
            f"Got {shown(', '.join(asked.inputs))}."
        )
    [(name, value)] = asked.inputs.items()
    spec = predictor.preprocess
    is_pixels = isinstance(value, np.ndarray)
    if is_pixels != (name == "images"):
        raise BadBody("images must be UINT8, and encoded BYTES. It is the other way round.")
    if isinstance(value, np.ndarray) and value.shape[1:] != (spec.height_px, spec.width_px, 3):
        raise BadBody(
            f"images must have the shape (N, {spec.height_px}, {spec.width_px}, 3). "
            f"Got {value.shape}."
        )
    if not 1 <= len(value) <= max_images:
        raise too_many_images(len(value), max_images)
    return list(value)


def _outputs(asked: Inference, predictor: Predictor) -> list[Asked]:
    outputs = asked.outputs or [Asked(name, is_binary=asked.is_binary) for name in OUTPUTS]
    for output in outputs:
        if output.name not in OUTPUTS:
            raise BadBody(f"outputs must be among {', '.join(OUTPUTS)}. Got {shown(output.name)}.")
        if output.classification > predictor.num_classes:
            raise BadBody(
                f"classification must be at most {predictor.num_classes}. "
                f"Got {output.classification}."
            )
    return outputs


def _of_image(index: int, error: Exception) -> Exception:
    """Return the error of one of several images, which says whose it is."""
    if to_error(error)[0] == 500 or not isinstance(error, FieldmarkError):
        return error
    return type(error)(f"image {index}: {error}")


def _reply(
    asked: Inference,
    outputs: list[Asked],
    predictor: Predictor,
    logits: np.ndarray[Any, Any],
    accepted: str,
) -> Response:
    """Return the outputs asked for, compressed if the client takes that."""
    tensors = {
        "logits": logits,
        "probabilities": softmax(logits, predictor.temperature).astype(np.float32),
    }
    found: list[tuple[Asked, np.ndarray[Any, Any] | list[list[str]]]] = []
    for output in outputs:
        values = tensors[output.name]
        if output.classification:
            found.append((output, _classes(values, logits, output.classification, predictor)))
        else:
            found.append((output, values))
    head: dict[str, Any] = {"model_name": predictor.name, "model_version": predictor.version}
    if asked.id is not None:
        head["id"] = asked.id
    body, length = to_body(head, found)
    body, encoding = compress(body, accepted)
    headers = {} if encoding is None else {"Content-Encoding": encoding}
    if length is None:
        return Response(body, media_type="application/json", headers=headers)
    headers[LENGTH_HEADER] = str(length)  # of the JSON before it was compressed
    return Response(body, media_type="application/octet-stream", headers=headers)


def _classes(
    values: np.ndarray[Any, Any], logits: np.ndarray[Any, Any], count: int, predictor: Predictor
) -> list[list[str]]:
    """Return for each image its best classes as "value:index:label"."""
    order = largest(logits, count)
    return [
        [f"{row[k]:f}:{k}:{predictor.class_names[k]}" for k in ranked]
        for row, ranked in zip(values.tolist(), order.tolist(), strict=True)
    ]

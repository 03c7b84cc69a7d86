"""The HTTP service: one image in, ranked classes out.

A request: its query and declared size are checked -> the body is read and counted -> it takes a
place among those inside, or is refused -> the image is decoded and validated in a thread -> the
model runs in a thread, as many requests at a time as it has workers -> the answer.
"""

import asyncio
from collections import Counter
from concurrent.futures import Future
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import QueryParams

from fieldmark.errors import BodyTooLarge
from fieldmark.preprocess import MAX_PIXELS
from fieldmark.runtime.cpu import num_cores
from fieldmark.serving.predictor import Prediction, Predictor
from fieldmark.serving.replies import (
    AliveBody,
    BadQuery,
    Busy,
    ClassifyBody,
    ErrorBody,
    NotReady,
    ReadyBody,
    add_error_handlers,
    shown,
    to_body,
)

MAX_BODY_BYTES = 10_000_000
MAX_INSIDE = 64  # requests decoding, in the model or waiting for either; each holds its body
DEFAULT_TOP_K = 5
HTTP_FORMATS = ("JPEG", "PNG", "WEBP")

_ERRORS: dict[int, str] = {
    400: "A query parameter is wrong.",
    413: "The body has too many bytes, or the image too many pixels.",
    422: "The body is not a JPEG, PNG or WebP image, or a damaged one.",
    429: "Too many requests are waiting.",
    500: "The service failed.",
    503: "The model is not ready.",
}
_BODY = {"schema": {"type": "string", "format": "binary"}}
_REQUEST_BODY = {
    "requestBody": {
        "description": "The bytes of the file. Its content decides the format, not this header.",
        "required": True,
        "content": {f"image/{name.lower()}": _BODY for name in HTTP_FORMATS},
    }
}


class Line:
    """Requests wait in line: a few decode at once, one for each worker is in the model, a bounded
    rest waits.
    """

    def __init__(self, num_decoders: int, max_inside: int = MAX_INSIDE) -> None:
        self._decoding = asyncio.Semaphore(num_decoders)
        self._predicting: asyncio.Semaphore | None = None  # until the model is known
        self._max_inside = max_inside
        self._num_inside = 0

    async def classify(
        self, predictor: Predictor, encoded: bytes, *, top_k: int, max_bytes: int, max_pixels: int
    ) -> list[Prediction]:
        """Return the predictions for an encoded image, or raise ImageError or Busy."""
        if self._num_inside >= self._max_inside:
            raise Busy(
                f"at most {self._max_inside} requests may wait. Got one more. Retry in a moment."
            )
        if self._predicting is None:
            self._predicting = asyncio.Semaphore(predictor.workers)
        self._num_inside += 1
        try:
            async with self._decoding:
                pixels = await run_in_threadpool(
                    predictor.decode,
                    encoded,
                    max_bytes=max_bytes,
                    max_pixels=max_pixels,
                    formats=HTTP_FORMATS,
                )
            async with self._predicting:
                [ranked] = await run_in_threadpool(predictor.classify_pixels, pixels[None], top_k)
            return ranked
        finally:
            self._num_inside -= 1


def create_app(
    predictor: Predictor | Future[Predictor],
    *,
    max_body_bytes: int = MAX_BODY_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> FastAPI:
    """Return the service around a predictor; until a Future of one is done, it is not ready."""
    app = FastAPI(
        title="fieldmark",
        summary="Image classification.",
        version="1",
        redoc_url=None,
        redirect_slashes=False,
    )
    add_error_handlers(app)
    line = Line(num_cores())

    @app.post(
        "/v1/classify",
        response_model_exclude_none=True,
        responses=_error_responses(400, 413, 422, 429, 500, 503),
        openapi_extra=_REQUEST_BODY,
    )
    async def classify(
        request: Request,
        top_k: Annotated[
            int | None,
            Query(ge=1, description="How many classes; by default 5, or all if there are fewer."),
        ] = None,
    ) -> ClassifyBody:
        """Classify the JPEG, PNG or WebP image that is the body of the request."""
        check_query(request.query_params, "top_k")
        ready = _ready(predictor)
        count = min(DEFAULT_TOP_K, ready.num_classes) if top_k is None else top_k
        if count > ready.num_classes:
            raise BadQuery(f"top_k must be from 1 to {ready.num_classes}. Got {count}.")
        encoded = await read_body(request, max_body_bytes)
        ranked = await line.classify(
            ready, encoded, top_k=count, max_bytes=max_body_bytes, max_pixels=max_pixels
        )
        return ClassifyBody(
            model=ready.model_id,
            preprocessing=ready.preprocess.digest(),
            predictions=[to_body(prediction) for prediction in ranked],
        )

    @app.get("/livez")
    async def livez() -> AliveBody:
        """Say that the process answers: if it does not, restart it."""
        return AliveBody()

    @app.get("/readyz", responses=_error_responses(503))
    async def readyz() -> ReadyBody:
        """Say that the model is loaded and checked: until then, send it nothing."""
        ready = _ready(predictor)
        return ReadyBody(model=ready.model_id, preprocessing=ready.preprocess.digest())

    return app


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Return the body, or raise BodyTooLarge: before reading if its declared size is too large."""
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise BodyTooLarge(
            f"body must have at most {max_bytes} bytes. Got {int(declared)}. Resize and retry."
        )
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise BodyTooLarge(
                f"body must have at most {max_bytes} bytes. Got more. Resize and retry."
            )
    return bytes(body)


def check_query(given: QueryParams, *known: str) -> None:
    """Raise BadQuery for a parameter that does not exist, or is given twice."""
    for name, count in Counter(name for name, _ in given.multi_items()).items():
        if name not in known:
            raise BadQuery(
                f"query parameter must be one of {', '.join(known)}. Got {shown(name)}. Remove it."
            )
        if count > 1:
            raise BadQuery(f"{name} must be given once. Got {count} of it.")


def _ready(predictor: Predictor | Future[Predictor]) -> Predictor:
    if isinstance(predictor, Predictor):
        return predictor
    if not predictor.done() or predictor.exception() is not None:
        raise NotReady("the model must be loaded and checked first. Retry in a moment.")
    return predictor.result()


def _error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody, "description": _ERRORS[status]} for status in statuses}

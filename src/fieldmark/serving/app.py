"""The HTTP service: images in, ranked classes out.

A request: its query and declared size are checked -> the body is read and counted -> it is
admitted, or refused with the time to wait -> each image is decoded and validated alone -> the model
runs on what came together -> the answer. A client that goes takes its images out of the queue.
"""

from collections import Counter
from concurrent.futures import Future
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from starlette.datastructures import QueryParams

from fieldmark.serving.batcher import Logits
from fieldmark.serving.identity import Identified
from fieldmark.serving.intake import TIMEOUT_HEADER, deadline_of, read_images
from fieldmark.serving.predictor import Predictor
from fieldmark.serving.presence import unless_gone
from fieldmark.serving.protocol import make_router
from fieldmark.serving.replies import (
    AliveBody,
    BadQuery,
    BatchBody,
    ClassifyBody,
    ErrorBody,
    ItemBody,
    ReadyBody,
    add_error_handlers,
    shown,
    to_body,
    to_error,
)
from fieldmark.serving.service import HTTP_FORMATS, Limits, Service

DEFAULT_TOP_K = 5

_ERRORS: dict[int, str] = {
    400: "A query parameter, a header or the form is wrong.",
    413: "The body has too many bytes, or the image too many pixels.",
    422: "The body is not a JPEG, PNG or WebP image, or a damaged one.",
    429: "There is no room, or the answer would be late: Retry-After says when to try again.",
    500: "The service failed.",
    503: "The model is not ready.",
    504: "There was no answer before the deadline.",
}
_IMAGE = {"schema": {"type": "string", "format": "binary"}}
_LIST = {"type": "array", "items": {"type": "string", "format": "binary"}}
_BASE64 = {"type": "array", "items": {"type": "string", "format": "byte"}, "minItems": 1}
_DESCRIBED = {
    "requestBody": {
        "description": "The bytes of one image, whose content decides the format, not this header; "
        "or several, as the parts of a form or as base64. Several get a status each.",
        "required": True,
        "content": {
            **{f"image/{name.lower()}": _IMAGE for name in HTTP_FORMATS},
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {"images": _LIST}},
            },
            "application/json": {
                "schema": {
                    "type": "object",
                    "properties": {"images": _BASE64},
                    "required": ["images"],
                    "additionalProperties": False,
                },
            },
        },
    },
    "parameters": [
        {
            "name": TIMEOUT_HEADER,
            "in": "header",
            "required": False,
            "schema": {"type": "number", "exclusiveMinimum": 0},
            "description": "An answer later than this is of no use: the work is refused at once, "
            "or given up.",
        }
    ],
}


def create_app(
    predictor: Predictor | Future[Predictor], *, limits: Limits | None = None
) -> FastAPI:
    """Return the service around a predictor; until a Future of one is done, it is not ready."""
    service = Service(predictor, limits or Limits())
    app = FastAPI(
        title="fieldmark",
        summary="Image classification.",
        version="1",
        redoc_url=None,
        redirect_slashes=False,
    )
    add_error_handlers(app)
    app.add_middleware(Identified, service=service)
    app.include_router(make_router(service))
    app.state.service = service

    @app.post(
        "/v1/classify",
        response_model_exclude_none=True,
        responses=_error_responses(400, 413, 422, 429, 500, 503, 504),
        openapi_extra=_DESCRIBED,
    )
    async def classify(
        request: Request,
        top_k: Annotated[
            int | None,
            Query(ge=1, description="How many classes; by default 5, or all if there are fewer."),
        ] = None,
    ) -> ClassifyBody | BatchBody:
        """Classify one JPEG, PNG or WebP image, or several of them in one request."""
        check_query(request.query_params, "top_k")
        ready = service.predictor
        count = min(DEFAULT_TOP_K, ready.num_classes) if top_k is None else top_k
        if count > ready.num_classes:
            raise BadQuery(f"top_k must be from 1 to {ready.num_classes}. Got {count}.")
        deadline = deadline_of(request, service.limits)
        images = await read_images(request, service.limits)
        found = await unless_gone(request, service.logits(images.encoded, deadline))
        about = {"model": ready.model_id, "preprocessing": ready.preprocessing}
        if images.is_list:
            items = [
                _item(index, name, ready, logits, count)
                for index, (name, logits) in enumerate(zip(images.names, found, strict=True))
            ]
            return BatchBody(**about, results=items)
        [logits] = found
        if isinstance(logits, Exception):
            raise logits
        [ranked] = ready.rank(logits[None], count)
        return ClassifyBody(**about, predictions=[to_body(prediction) for prediction in ranked])

    @app.get("/livez", responses=_error_responses(503))
    async def livez() -> AliveBody:
        """Say that the process answers: if it does not, restart it."""
        service.must_live()
        return AliveBody()

    @app.get("/readyz", responses=_error_responses(503))
    async def readyz() -> ReadyBody:
        """Say that the model is loaded and checked: until then, send it nothing."""
        ready = service.predictor
        return ReadyBody(model=ready.model_id, preprocessing=ready.preprocessing)

    return app


def _item(
    index: int, name: str | None, predictor: Predictor, logits: Logits | Exception, top_k: int
) -> ItemBody:
    if isinstance(logits, Exception):
        status, detail = to_error(logits)
        return ItemBody(index=index, name=name, status=status, error=detail)
    [ranked] = predictor.rank(logits[None], top_k)
    predictions = [to_body(prediction) for prediction in ranked]
    return ItemBody(index=index, name=name, status=200, predictions=predictions)


def check_query(given: QueryParams, *known: str) -> None:
    """Raise BadQuery for a parameter that does not exist, or is given twice."""
    for name, count in Counter(name for name, _ in given.multi_items()).items():
        if name not in known:
            raise BadQuery(
                f"query parameter must be one of {', '.join(known)}. Got {shown(name)}. Remove it."
            )
        if count > 1:
            raise BadQuery(f"{name} must be given once. Got {count} of it.")


def _error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody, "description": _ERRORS[status]} for status in statuses}

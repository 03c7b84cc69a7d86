"""The HTTP service: images in, ranked classes out.

A request: its query and declared size are checked -> the body is read and counted -> it is
admitted, or refused with the time to wait (`shedding` does that sooner) -> each image is decoded
and validated alone -> the model runs on what came together -> the answer. A client that goes takes
its images out of the queue.
"""

from concurrent.futures import Future
from typing import Any, cast

from fastapi import FastAPI, Request, Response, Security
from fastapi.responses import HTMLResponse, PlainTextResponse
from fastapi.security import HTTPBearer
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.types import ASGIApp

from fieldmark.serving.classify import PARAMETERS, PATH, Direct, classify
from fieldmark.serving.cost import BatchCost
from fieldmark.serving.door import Door
from fieldmark.serving.identity import Identified
from fieldmark.serving.intake import TIMEOUT_HEADER
from fieldmark.serving.keys import Keys
from fieldmark.serving.limits import HTTP_FORMATS, Limits
from fieldmark.serving.page import HEADERS, PAGE
from fieldmark.serving.predictor import Predictor
from fieldmark.serving.protocol import make_router
from fieldmark.serving.replies import (
    AliveBody,
    BatchBody,
    ClassifyBody,
    ErrorBody,
    ReadyBody,
    add_error_handlers,
)
from fieldmark.serving.service import Service

_ERRORS: dict[int, str] = {
    401: "The request carries no key that is taken, where the service asks for one.",
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
        *PARAMETERS,
        {
            "name": TIMEOUT_HEADER,
            "in": "header",
            "required": False,
            "schema": {"type": "number", "exclusiveMinimum": 0},
            "description": "An answer later than this is of no use: the work is refused at once, "
            "or given up.",
        },
    ],
}


def create_app(
    predictor: Predictor | Future[Predictor],
    *,
    limits: Limits | None = None,
    keys: Keys | None = None,
    cost: BatchCost | None = None,
) -> FastAPI:
    """Return the service around a predictor; until a Future of one is done, it is not ready.

    Args:
        keys: of which each request must carry one; None: no key is asked for.
        cost: what is known of the cost of a batch by the time that the predictor is there.
    """
    service = Service(predictor, limits or Limits(), cost)
    app = FastAPI(
        title="fieldmark",
        summary="Image classification.",
        version="1",
        redoc_url=None,
        redirect_slashes=False,
        # For the description alone: the door looks before any route is found.
        dependencies=[] if keys is None else [Security(HTTPBearer(auto_error=False))],
    )
    add_error_handlers(app)
    app.state.service = service
    _add_classify(app, service)  # first: routes are looked at in this order
    app.include_router(make_router(service))
    _add_health(app, service)
    # Around what FastAPI puts around its routes: within, each request would pay for all of that.
    # Its outermost part answers what fails unexpectedly, which Identified does.
    inner = cast(ServerErrorMiddleware, app.build_middleware_stack()).app
    stack: ASGIApp = Direct(inner, service)
    if keys is not None:
        stack = Door(stack, service, keys)
    app.middleware_stack = Identified(stack, service)
    return app


def _add_classify(app: FastAPI, service: Service) -> None:
    @app.post(
        PATH,
        response_model=None,
        responses=_error_responses(400, 401, 413, 422, 429, 500, 503, 504)
        | {200: {"model": ClassifyBody | BatchBody, "description": "The classes."}},
        openapi_extra=_DESCRIBED,
    )
    async def classify_images(request: Request) -> Response:
        """Classify one JPEG, PNG or WebP image, or several of them in one request."""
        return await classify(request, service)


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        """Show a page on which an image can be tried."""
        return HTMLResponse(PAGE, headers=HEADERS)

    # Some load balancers ask with HEAD.
    @app.head("/livez", include_in_schema=False)
    @app.get("/livez", responses=_error_responses(503))
    async def livez() -> AliveBody:
        """Say that the process answers: if it does not, restart it."""
        service.must_live()
        return AliveBody()

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", responses=_error_responses(503))
    async def readyz() -> ReadyBody:
        """Say that the model is loaded and checked, and the service not ending."""
        ready = service.must_be_ready()
        return ReadyBody(model=ready.model_id, preprocessing=ready.preprocessing)

    @app.get("/metrics", response_class=PlainTextResponse, responses=_error_responses(401))
    async def metrics(request: Request) -> Response:
        """Counters and times, for Prometheus."""
        page, content_type = service.metrics.page(request.headers.get("accept", ""))
        return Response(page, headers={"Content-Type": content_type})


def _error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorBody, "description": _ERRORS[status]} for status in statuses}

"""/v1/classify: what a request asks, its images' answers, and the JSON that says them.

The query is read and the answer written here and not by FastAPI, nor does its router find the way
here: that took half of what a request costs beside decoding and the model.
"""

import base64
from collections import Counter
from typing import Any
from urllib.parse import parse_qsl

from fastapi import Request
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from fieldmark.errors import ImageError
from fieldmark.serving.door import count_images
from fieldmark.serving.intake import deadline_of, read_images
from fieldmark.serving.predictor import Predictor
from fieldmark.serving.presence import unless_gone
from fieldmark.serving.replies import (
    BadQuery,
    RequestError,
    error_reply,
    incomplete_reply,
    shown,
    to_error,
)
from fieldmark.serving.service import Answer, Service

PATH = "/v1/classify"
DEFAULT_TOP_K = 5
_KNOWN = ("top_k", "explain")
_TRUTH = {"true": True, "1": True, "false": False, "0": False}
PARAMETERS: list[dict[str, Any]] = [
    {
        "name": "top_k",
        "in": "query",
        "required": False,
        "schema": {"type": "integer", "minimum": 1},
        "description": f"How many classes; by default {DEFAULT_TOP_K}, or all if there are fewer.",
    },
    {
        "name": "explain",
        "in": "query",
        "required": False,
        "schema": {"type": "boolean", "default": False},
        "description": "Whether to draw what spoke for the likeliest class of each image.",
    },
]


class Direct:
    """ASGI middleware: POST /v1/classify is answered without a router on its way.

    Its route is there for the description, and for what is not a POST.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or pass it on."""
        if scope["type"] != "http" or scope["path"] != PATH or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})["route"] = PATH
        request = Request(scope, receive)
        try:
            reply = await classify(request, self._service)
        except (ImageError, RequestError) as error:
            reply = error_reply(request, error)
        except ClientDisconnect:
            reply = incomplete_reply(request)
        await reply(scope, receive, send)


async def classify(request: Request, service: Service) -> JSONResponse:
    """Return the answer to a request: a ClassifyBody, or a BatchBody where several may come.

    Raises:
        RequestError, ImageError: what `replies` makes an ErrorBody of.
    """
    query = read_query(request.scope["query_string"])
    predictor = service.predictor
    top_k = _top_k(query, predictor)
    explain = _explain(query, predictor)
    deadline = deadline_of(request.headers, service.limits)
    images = await read_images(request, service)
    if explain and 2 * len(images.encoded) > service.limits.max_inside:
        raise BadQuery(
            f"at most {service.limits.max_inside // 2} images may be explained in a request. "
            f"Got {len(images.encoded)}."
        )
    num_images = len(images.encoded)
    count_images(request, service, num_images, num_images * (2 if explain else 1), deadline)
    found = await unless_gone(request, service.answers(images.encoded, deadline, explain))
    about = {"model": predictor.model_id, "preprocessing": predictor.preprocessing}
    if not images.is_list:
        [one] = found
        if isinstance(one, Exception):
            raise one
        return JSONResponse(about | _answer(predictor, one, top_k))
    items = []
    for index, (name, outcome) in enumerate(zip(images.names, found, strict=True)):
        item: dict[str, Any] = {"index": index} | ({} if name is None else {"name": name})
        if isinstance(outcome, Exception):
            status, detail = to_error(outcome)
            items.append(item | {"status": status, "error": detail.model_dump()})
        else:
            items.append(item | {"status": 200} | _answer(predictor, outcome, top_k))
    return JSONResponse(about | {"results": items})


def _top_k(query: dict[str, str], predictor: Predictor) -> int:
    text, most = query.get("top_k"), predictor.num_classes
    if text is None:
        return min(DEFAULT_TOP_K, most)
    # Longer numbers are above any number of classes, and Python refuses to read the longest.
    count = int(text) if text.isascii() and text.isdecimal() and len(text) < 20 else 0
    if not 1 <= count <= most:
        got = text if text.isascii() and text.isdecimal() and len(text) < 20 else shown(text)
        raise BadQuery(f"top_k must be from 1 to {most}. Got {got}.")
    return count


def _explain(query: dict[str, str], predictor: Predictor) -> bool:
    text = query.get("explain", "false")
    explain = _TRUTH.get(text.lower())
    if explain is None:
        raise BadQuery(f"explain must be true or false. Got {shown(text)}.")
    if explain and predictor.maps is None:
        raise BadQuery(
            f"explain must be false: variant {predictor.variant} of this model gives no features."
        )
    return explain


def _answer(predictor: Predictor, found: Answer, top_k: int) -> dict[str, Any]:
    """Return the parts of a body that say what one image shows."""
    [ranked] = predictor.rank(found.logits[None], top_k)
    predictions = [
        {"class_name": one.class_name}
        | ({"description": one.description} if one.description else {})
        | {"probability": one.probability}
        for one in ranked
    ]
    if found.png is None:
        return {"predictions": predictions}
    picture = base64.b64encode(found.png).decode()
    about = {"class_name": ranked[0].class_name, "png": picture}
    return {"predictions": predictions, "explanation": about}


def read_query(query_string: bytes) -> dict[str, str]:
    """Return the parameters, or raise BadQuery for one that does not exist or is given twice."""
    if not query_string:
        return {}
    given = parse_qsl(query_string.decode("latin-1"), keep_blank_values=True)
    for name, count in Counter(name for name, _ in given).items():
        if name not in _KNOWN:
            raise BadQuery(
                f"query parameter must be one of {', '.join(_KNOWN)}. Got {shown(name)}. Remove it."
            )
        if count > 1:
            raise BadQuery(f"{name} must be given once. Got {count} of it.")
    return dict(given)

"""Every answer says to which request it belongs and which model and preprocessing it comes from."""

import time
import traceback

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fieldmark.runtime import log
from fieldmark.serving.intake import request_id
from fieldmark.serving.replies import NotReady, unexpected_reply
from fieldmark.serving.service import Service


def marks(service: Service, identity: str) -> list[tuple[bytes, bytes]]:
    """Return the headers that say to which request an answer belongs, and whose it is."""
    found = [(b"x-request-id", identity.encode())]
    if service.is_draining:
        found.append((b"connection", b"close"))
    try:
        predictor = service.predictor
    except NotReady:
        return found
    return [
        *found,
        (b"x-model-id", predictor.model_id.encode()),
        (b"x-model-version", predictor.version.encode()),
        (b"x-preprocessing", predictor.preprocessing.encode()),
    ]


def count(service: Service, scope: Scope, status: int, seconds: float) -> None:
    """Count an answer, and log it where the log is for machines."""
    # The template that matched: a path is the client's choice and would be a label without end.
    state = scope["state"]
    status = state.get("answered", status)  # by the connection, before the app could
    route = state.get("route") or getattr(scope.get("route"), "path", "other")
    service.metrics.request(route, status, seconds, state.get("reason", ""))
    log.event(
        "request",
        request_id=state["request_id"],
        method=scope["method"],
        route=route,
        status=status,
        seconds=round(seconds, 6),
        images=state.get("images"),
        key=state.get("key"),
    )


class Identified:
    """ASGI middleware: X-Request-Id, X-Preprocessing and the model's id and version on all answers.

    The request's id is the caller's if it is sane, and is in scope["state"]["request_id"]. What
    fails unexpectedly is answered here, so that such an answer has them too; its traceback is for
    the log. Every answer is counted, and logged where the log is for machines.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and mark its answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        state = scope.setdefault("state", {})
        identity = state.setdefault("request_id", request_id(Headers(scope=scope)))
        status = 0

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *marks(self._service, identity)]
            await send(message)

        try:
            await self._app(scope, receive, send_marked)
        except Exception:
            log.warn(f"request {identity} failed:\n{traceback.format_exc()}")
            if status:
                raise
            await unexpected_reply(Request(scope))(scope, receive, send_marked)
        finally:
            count(self._service, scope, status, time.monotonic() - started)

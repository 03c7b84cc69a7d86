"""Every answer says to which request it belongs and which model and preprocessing it comes from."""

import traceback

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fieldmark.runtime import log
from fieldmark.serving.intake import request_id
from fieldmark.serving.replies import NotReady, unexpected_reply
from fieldmark.serving.service import Service


class Identified:
    """ASGI middleware: X-Request-Id, X-Model-Id and X-Preprocessing on all that is sent.

    The request's id is the caller's if it is sane, and is in scope["state"]["request_id"]. What
    fails unexpectedly is answered here, so that such an answer has them too; its traceback is for
    the log.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, and mark its answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        identity = request_id(Headers(scope=scope))
        scope.setdefault("state", {})["request_id"] = identity
        has_begun = False

        async def send_marked(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = identity
                try:
                    predictor = self._service.predictor
                except NotReady:
                    pass
                else:
                    headers["X-Model-Id"] = predictor.model_id
                    headers["X-Preprocessing"] = predictor.preprocessing
            await send(message)

        try:
            await self._app(scope, receive, send_marked)
        except Exception:
            if has_begun:
                raise
            log.warn(f"request {identity} failed:\n{traceback.format_exc()}")
            await unexpected_reply(Request(scope))(scope, receive, send_marked)

"""What would be refused anyway is refused before its body is read and its route is looked for.

Under overload most requests are refusals, and what each of them costs is taken from the answers.
"""

import re

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from fieldmark.serving.classify import PATH
from fieldmark.serving.intake import deadline_of
from fieldmark.serving.replies import BadQuery, Busy, NotReady, error_reply
from fieldmark.serving.service import Service

# Paths beside PATH that want the model, each with the route that the metrics name.
_ROUTES = (
    (re.compile(r"/v2/models/[^/]+/infer"), "/v2/models/{name}/infer"),
    (
        re.compile(r"/v2/models/[^/]+/versions/[^/]+/infer"),
        "/v2/models/{name}/versions/{version}/infer",
    ),
)


class Shedding:
    """ASGI middleware: a request for which there is no room even with one image ends here."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http" and scope["method"] == "POST" and self._service.num_inside:
            route = _route(scope["path"])
            if route is not None:
                request = Request(scope)
                try:
                    deadline = deadline_of(request, self._service.limits)
                    self._service.must_have_room(1, 0, deadline)
                except Busy as error:
                    scope.setdefault("state", {})["route"] = route
                    await error_reply(request, error)(scope, receive, send)
                    return
                except (BadQuery, NotReady):
                    pass  # the route says so in its turn
        await self._app(scope, receive, send)


def _route(path: str) -> str | None:
    if path == PATH:
        return PATH
    return next((route for pattern, route in _ROUTES if pattern.fullmatch(path)), None)

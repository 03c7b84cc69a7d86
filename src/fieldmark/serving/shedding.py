"""What would be refused anyway is refused when its headers are there, before anything else is done.

Under overload most requests are refusals, and what each of them costs is taken from the answers.
"""

import json
import re
import time

from starlette.datastructures import Headers
from starlette.types import Scope

from fieldmark.serving.classify import PATH
from fieldmark.serving.identity import count, marks
from fieldmark.serving.intake import deadline_of, request_id
from fieldmark.serving.keys import BadKey, Keys
from fieldmark.serving.replies import BadQuery, Busy, NotAlive, NotReady, error_content, raw_reply
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
    """Refuses requests for which there is no room even with one image, as the routes would."""

    def __init__(self, service: Service, keys: Keys | None = None) -> None:
        self._service = service
        self._keys = keys

    def refusal(self, scope: Scope) -> bytes | None:
        """Return the whole answer to a request that is refused, counted and logged; else None.

        A service that is ending closes the connection with its answer, which a client that is still
        sending a body would not see: then the route answers, once it is read.
        """
        service = self._service
        if scope["method"] != "POST" or not service.num_inside or service.is_draining:
            return None
        route = _route(scope["path"])
        if route is None:
            return None
        started = time.monotonic()
        headers = Headers(scope=scope)
        try:
            if self._keys is not None:
                scope["state"]["key"] = self._keys.name_of(headers)
            service.must_have_room(1, 0, deadline_of(headers, service.limits))
        except Busy as error:
            identity = request_id(headers)
            scope["state"].update(route=route, request_id=identity, reason=error.reason)
            count(service, scope, error.http_status, time.monotonic() - started)
            fields = [
                (b"retry-after", b"%d" % error.retry_after_s),
                (b"content-type", b"application/json"),
                *marks(service, identity),
            ]
            content = error_content(scope["path"], error.code, str(error))
            return raw_reply(error.http_status, fields, json.dumps(content).encode())
        except (BadKey, BadQuery, NotReady, NotAlive):
            pass  # the app says so in its turn
        return None


def _route(path: str) -> str | None:
    if path == PATH:
        return PATH
    return next((route for pattern, route in _ROUTES if pattern.fullmatch(path)), None)

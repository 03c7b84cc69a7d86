"""Who may ask: with a file of keys, every path wants one but health, page and description."""

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from fieldmark.serving.keys import BadKey, Keys
from fieldmark.serving.replies import error_reply
from fieldmark.serving.service import Service

OPEN = frozenset(
    {"/", "/livez", "/readyz", "/v2/health/live", "/v2/health/ready", "/docs", "/openapi.json"}
)


class Door:
    """ASGI middleware: a request without a key ends here; its name is in the request's state."""

    def __init__(self, app: ASGIApp, service: Service, keys: Keys) -> None:
        self._app = app
        self._service = service
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request in, or answer it."""
        if scope["type"] == "http" and scope["path"] not in OPEN:
            try:
                name = self._keys.name_of(Headers(scope=scope))
            except BadKey as error:
                self._service.metrics.refused("key")
                reply = error_reply(Request(scope), error, {"WWW-Authenticate": "Bearer"})
                await reply(scope, receive, send)
                return
            scope.setdefault("state", {}).update(key=name, keys=self._keys)
        await self._app(scope, receive, send)


def count_images(
    request: Request, service: Service, num_images: int, num_places: int, deadline: float
) -> None:
    """Note how many images a request has, and raise Busy where its key may not send them now.

    What there is no room for is refused first: a key pays for no refusal.
    """
    state = request.scope.setdefault("state", {})
    state["images"] = num_images
    keys: Keys | None = state.get("keys")
    if keys is None:
        return
    service.must_have_room(num_places, 0, deadline)
    wait_s = keys.wait_s(state["key"], num_images)
    if wait_s > 0:
        raise service.busy(
            f"key {state['key']} must send fewer images a minute. Retry later.", "key_rate", wait_s
        )

"""Work for a request, as long as its client is there."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar, cast

from starlette.requests import ClientDisconnect, Request

T = TypeVar("T")


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns; cancel it when the client hangs up.

    Args:
        request: whose body has been read.

    Raises:
        ClientDisconnect: the client has gone.
    """
    me = cast("asyncio.Task[T]", asyncio.current_task())
    gone = asyncio.ensure_future(_has_gone(request))
    gone.add_done_callback(lambda one: None if one.cancelled() else me.cancel())
    try:
        return await work
    except asyncio.CancelledError:
        if gone.done() and not gone.cancelled() and me.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        gone.cancel()


async def _has_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

"""Work for a request, as long as its client is there."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar, cast

from starlette.requests import ClientDisconnect, Request

T = TypeVar("T")
_LOOK_AFTER_S = 0.05  # most work is done by then, and the task that looks costs a part of it


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns; cancel it when the client hangs up.

    Args:
        request: whose body has been read.

    Raises:
        ClientDisconnect: the client has gone.
    """
    loop = asyncio.get_running_loop()
    me = cast("asyncio.Task[T]", asyncio.current_task())
    watch: asyncio.Task[None] | None = None
    is_over = False

    def look() -> None:
        nonlocal watch
        watch = loop.create_task(_has_gone(request))
        watch.add_done_callback(end)

    def end(one: asyncio.Task[None]) -> None:
        if not one.cancelled() and not is_over:
            me.cancel()

    timer = loop.call_later(_LOOK_AFTER_S, look)
    try:
        return await work
    except asyncio.CancelledError:
        has_gone = watch is not None and watch.done() and not watch.cancelled()
        if has_gone and me.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        is_over = True
        timer.cancel()
        if watch is not None:
            watch.cancel()


async def _has_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass

"""The bytes of bodies that are being read, of all requests together, and who makes room."""

import asyncio
from collections.abc import Callable

from starlette.requests import ClientDisconnect

from fieldmark.serving.limits import SLOW_S
from fieldmark.serving.replies import Busy

_PASSES = 10  # of the event loop, in which a request that was ended lets go of its bytes


class Arrivals:
    """A count with a bound. Belongs to one event loop."""

    def __init__(self, max_bytes: int, busy: Callable[[str, str, float], Busy]) -> None:
        """Begin with none.

        Args:
            busy: a message, a reason in one word and the seconds to wait -> the refusal, counted.
        """
        self._max_bytes, self._busy = max_bytes, busy
        self.num_bytes = 0
        # Ends the request that has been arriving longest, if that is not just now: whether it did.
        self.end_slowest: Callable[[], bool] = lambda: False

    async def add(self, num_bytes: int, is_over: Callable[[], bool]) -> None:
        """Count bytes of a body, at the cost of slower ones if there are many.

        Args:
            is_over: whether this very request has been ended, as the slowest of all.

        Raises:
            Busy: too many are arriving at once, none of them for long.
            ClientDisconnect: it has been ended.
        """
        most = self._max_bytes - num_bytes
        while self.num_bytes > most:
            for _ in range(_PASSES):  # of one that has just been ended they are about to go
                await asyncio.sleep(0)
            if is_over():
                raise ClientDisconnect
            if self.num_bytes > most and not self.end_slowest():
                raise self._busy(
                    "too many bodies arrive at the same time. Retry later.",
                    "arriving_full",
                    SLOW_S,  # from then on the slowest makes room
                )
        self.num_bytes += num_bytes

    def remove(self, num_bytes: int) -> None:
        """Count bytes no more, which `add` had counted."""
        self.num_bytes -= num_bytes

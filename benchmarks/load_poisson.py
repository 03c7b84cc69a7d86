"""Open loop: requests at random times of a stated rate, whether or not the service keeps up.

The times between requests are exponential, so that the requests are a Poisson process, as those of
many users who know nothing of each other. Latency counts from when a request was meant to be sent:
a service that makes the sender wait is not let off (coordinated omission).
"""

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast
from urllib.parse import urlsplit

GIVE_UP_S = 30.0  # after the last request was sent


@dataclass(slots=True)
class Sent:
    """A request and what became of it."""

    body: int  # its index
    meant_at: float  # time.monotonic()
    is_taken: bool = False  # whether there was a connection to send it on
    latency_s: float = float("inf")  # from then on; infinity: no answer
    status: int = 0  # 0: no answer
    headers: bytes = b""
    answer: bytes = b""


@dataclass
class Poisson:
    """Requests at random times.

    Args:
        bodies: sent in turn.
        rate: a second, on average.
        on_answer: called with each request as its answer comes.
    """

    url: str
    bodies: Sequence[bytes]
    content_type: str
    rate: float
    seed: int = 0
    on_answer: Callable[[Sent], None] = lambda _: None
    sent: list[Sent] = field(default_factory=list)
    is_over: bool = False  # set it to send no more
    _idle: deque["_Connection"] = field(default_factory=deque)

    def run(self, seconds: float) -> list[Sent]:
        """Send for so long, wait for the answers, and return all requests."""
        return asyncio.run(self.send(seconds))

    async def send(self, seconds: float) -> list[Sent]:
        """Do what `run` does, in an event loop."""
        pending: set[asyncio.Task[None]] = set()
        requests = [self._request(body) for body in self.bodies]
        for number, meant_at in enumerate(self._times(seconds)):
            await asyncio.sleep(max(0.0, meant_at - time.monotonic()))
            if self.is_over:
                break
            one = Sent(number % len(requests), meant_at)
            self.sent.append(one)
            task = asyncio.create_task(self._one(one, requests[one.body]))
            pending.add(task)
            task.add_done_callback(pending.discard)
        if pending:
            await asyncio.wait(pending, timeout=GIVE_UP_S)
        for task in list(pending):
            task.cancel()
        for connection in self._idle:
            connection.close()
        return self.sent

    def _times(self, seconds: float) -> Iterator[float]:
        draw = random.Random(self.seed)
        now = end = time.monotonic()
        end += seconds
        while (now := now + draw.expovariate(self.rate)) < end:
            yield now

    def _request(self, body: bytes) -> bytes:
        parts = urlsplit(self.url)
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        head = (
            f"POST {target} HTTP/1.1\r\nHost: {parts.netloc}\r\n"
            f"Content-Type: {self.content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    async def _one(self, one: Sent, request: bytes) -> None:
        with contextlib.suppress(OSError, EOFError):
            connection = await self._connection()
            one.is_taken = True
            one.status, one.headers, one.answer = await connection.ask(request)
            one.latency_s = time.monotonic() - one.meant_at
            if b"connection: close" in one.headers.lower():
                connection.close()
            else:
                self._idle.append(connection)
            self.on_answer(one)

    async def _connection(self) -> "_Connection":
        while self._idle:
            found = self._idle.pop()  # the one used last, so that the others may go
            if not found.is_lost:
                return found
        host, _, port = urlsplit(self.url).netloc.partition(":")
        loop = asyncio.get_running_loop()
        _, made = await loop.create_connection(_Connection, host, int(port))
        return made


class _Connection(asyncio.Protocol):
    """One HTTP/1.1 connection; answers must state their length."""

    def __init__(self) -> None:
        self.is_lost = False
        self._data = b""
        self._answer: asyncio.Future[tuple[int, bytes, bytes]] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(EOFError("the connection was lost"))

    def close(self) -> None:
        """End the connection."""
        self.is_lost = True
        self._transport.close()

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, ended, rest = self._data.partition(b"\r\n\r\n")
        if not ended or self._answer is None or self._answer.done():
            return
        length = next(
            int(line.split(b":")[1])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length:")
        )
        if len(rest) >= length:
            self._data = b""
            self._answer.set_result((int(head.split(b" ", 2)[1]), head, rest))

    def ask(self, request: bytes) -> "asyncio.Future[tuple[int, bytes, bytes]]":
        """Return status, headers and body of the answer."""
        self._answer = asyncio.get_running_loop().create_future()
        if self.is_lost:
            self._answer.set_exception(EOFError("the connection was lost"))
        else:
            self._transport.write(request)
        return self._answer

"""HTTP/1.1 as uvicorn speaks it with llhttp's parser, and bounds that neither of the two has.

The parser keeps a header until it has ended, however long it grows, and tells of each as one more
of the request, also of those behind a chunked body. So what a request has beside its body is
counted here, and so are bytes of which the parser tells nothing.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, Literal, cast

import httptools
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MAX_HEAD_BYTES = 65_536  # of the first line, headers and trailers of a request
MAX_PIPELINED = 8  # requests of a connection that are read before the first is answered
_HEADER_BYTES = 32  # that a header takes besides its own, at least
_ENOUGH_BYTES = 65_536  # of a body that is there, before the request is told of it
_FULL_BYTES = 4 * _ENOUGH_BYTES  # no more is read until the request has taken what is there


class _HeadWithBody:
    """A transport that sends the head of an answer together with the beginning of its body.

    Each call of the system lets go of Python's lock, and has to wait for it again.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._held = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send, or hold the head of an answer until more is written or `flush` is called."""
        data = self._held + data
        self._held = b""
        if data.startswith(b"HTTP/1.1 ") and data.endswith(b"\r\n\r\n") and data[9:10] != b"1":
            self._held = data
        elif data:
            self._transport.write(data)

    def flush(self) -> None:
        """Send what is held."""
        if self._held:
            self._transport.write(self._held)
            self._held = b""

    def close(self) -> None:
        """Send what is held, and close."""
        self.flush()
        self._transport.close()


class BoundedHttp(HttpToolsProtocol):
    """A connection that knows what it is reading, and reads no head without end."""

    def __init__(self, refusal: Callable[[Scope], bytes | None], **options: Any) -> None:
        """Begin without a request.

        Args:
            refusal: what is known of a request once its headers are there -> its whole answer, if
                that is known by then.
        """
        super().__init__(**options)
        self._refusal, self._refused = refusal, b""
        self.reading: Literal["header", "body"] | None = None
        self.unanswered: deque[RequestResponseCycle] = deque()  # whose headers have been read
        self._head_bytes = 0
        self._silent_bytes = 0  # since the parser last told of anything
        self._has_told = False
        self._is_broken = False  # what came is no HTTP, so that nothing after it is, either

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, _HeadWithBody(transport)))

    def connection_lost(self, exc: Exception | None) -> None:
        for cycle in self.unanswered:  # uvicorn tells the last alone
            cycle.disconnected = True
            cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._is_broken:
            return
        self._has_told, num_bytes = False, len(data)
        while data:
            try:
                self.parser.feed_data(data)
                break
            except httptools.HttpParserUpgrade as upgrade:
                data = self._head_again() + data[upgrade.args[0] :]
            except httptools.HttpParserError:
                self._is_broken = True
                self.send_400_response("not HTTP")
                return
        self._silent_bytes = 0 if self._has_told else self._silent_bytes + num_bytes
        if self._silent_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._is_broken = True
            self.send_400_response("head too long")

    def _head_again(self) -> bytes:
        """Return the head of a request that asks for another protocol as if it had not asked.

        The parser, which is left behind, would take what follows for the other protocol, though a
        server need not change to it (RFC 9110, section 7.8), and Java's client asks with each
        first POST.
        """
        version = b" HTTP/" + self.parser.get_http_version().encode()
        headers = [(name, value) for name, value in self.headers if name != b"upgrade"]
        lines = [self.parser.get_method() + b" " + self.url + version]
        lines += [b": ".join(one) for one in headers]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        return b"\r\n".join([*lines, b"", b""])

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._has_told = True
        self.reading, self._head_bytes = "header", 0

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + _HEADER_BYTES)
        if self.reading == "header":  # and not a trailer, which nobody asks for
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise ValueError("nothing is reached through this server")
            return  # it is read again without that
        if len(self.unanswered) >= MAX_PIPELINED:
            raise ValueError("too many requests before the first is answered")
        super().on_headers_complete()
        self.reading = "body"
        self.unanswered.append(self.cycle)
        if self._refused:
            self.transport.write(self._refused)
            self._refused = b""
            self.cycle.response_started = self.cycle.response_complete = True
            self.on_response_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Start a request, where it is not refused at once: that needs no task.

        One that waited for another, or whose answer closes the connection, has its body read first.
        """
        if not self.unanswered and cycle.keep_alive and not self.flow.write_paused:
            self._refused = self._refusal(cast(Scope, cycle.scope)) or b""
        if not self._refused:
            super()._start_asgi_task(cycle, app)

    def on_chunk_header(self) -> None:
        """Take note that a chunk of the body begins."""
        self._has_told = True

    def on_body(self, body: bytes) -> None:
        """Collect a body, and wake its request for as much as is worth it."""
        self._has_told = True
        cycle = self.cycle
        if cycle.response_complete:
            return
        cycle.body += body
        if len(cycle.body) > _ENOUGH_BYTES:
            cycle.message_event.set()
        if len(cycle.body) > _FULL_BYTES:
            self.flow.pause_reading()

    def on_message_complete(self) -> None:
        self._has_told = True
        if self.reading == "body":  # and not one to begin again
            self.reading = None
            super().on_message_complete()

    def on_response_complete(self) -> None:
        self.unanswered.popleft()
        cast(_HeadWithBody, self.transport).flush()
        super().on_response_complete()

    def _count(self, num_bytes: int) -> None:
        self._has_told = True
        self._head_bytes += num_bytes
        if self._head_bytes > MAX_HEAD_BYTES:
            raise ValueError("the head of a request is too long")  # which the parser passes on

"""Connections that nobody can hold for ever: deadlines for reading and writing, and a cap.

uvicorn has a timer for a connection between two requests and none for one within: a client that
sends a byte now and then would keep it. Here each phase of a connection has its own deadline, and
when there are too many connections the one that has been reading longest makes room, so that slow
clients are in the way of each other and not of a fast one.

    header -> body -> answer -> idle -> header ...
"""

import asyncio
import ipaddress
import json
import math
import resource
from collections.abc import Callable, Collection
from typing import Any, Literal

from starlette.datastructures import Headers
from starlette.types import Scope

from fieldmark.runtime import log
from fieldmark.serving.bounded import BoundedHttp
from fieldmark.serving.intake import request_id
from fieldmark.serving.limits import SLOW_S, Limits
from fieldmark.serving.replies import error_content, raw_reply

Phase = Literal["header", "body", "answer", "idle"]
LAST_CALL_S = 0.5  # for a request that is already on its way when the service ends
_SPARE_FILES = 128  # beside the connections: the model, the log, what libraries open


class Connections:
    """All connections of the service. Everything belongs to one event loop."""

    def __init__(
        self,
        limits: Limits,
        refused: Callable[[str], None] = lambda reason: None,
        marks: Callable[[str], list[tuple[bytes, bytes]]] = lambda identity: [],
        refusal: Callable[[Scope], bytes | None] = lambda scope: None,
        count: Callable[[Scope, int], None] = lambda scope, status: None,
    ) -> None:
        """Begin without a connection.

        Args:
            refused: is told why a connection was ended or turned away, in one of few words:
                slow_header, slow_body, slow_reader, crowded, bad_http.
            marks: the id of a request -> the headers that its answer has beside others.
            refusal: what is known of a request once its headers are there -> its answer, if that is
                known by then.
            count: is told of each answer that the app knows nothing of.
        """
        self.limits = limits
        self.refused = refused
        self.marks = marks
        self.refusal = refusal
        self.count = count
        self.max_open = room_for_connections(limits.max_connections)
        # In the order in which they began to: dicts keep it, and forget one of many at once.
        self._reading: dict[_Guarded, float] = {}  # when: the event loop's time
        self._idle: dict[_Guarded, None] = {}
        self._open: set[_Guarded] = set()
        self._of_address: dict[str, set[_Guarded]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def protocol(self, **options: Any) -> "_Guarded":
        """Return the protocol of a new connection, for uvicorn."""
        return _Guarded(self, **options)

    def add(self, one: "_Guarded") -> bool:
        """Take a connection, at the cost of a slower one; False: there is no room.

        One of an address that has its full number replaces one of the same address.
        """
        neighbours = self._of_address.get(one.address, set())
        most = self.limits.max_per_address or self.max_open
        for among, room in ((neighbours, most), (self._open, self.max_open)):
            if len(among) >= room:
                slowest = self._slowest(among, one.loop.time())
                if slowest is None:
                    return False
                slowest.end("crowded")
        self._open.add(one)
        self._of_address.setdefault(one.address, set()).add(one)
        return True

    def _slowest(self, among: "Collection[_Guarded]", now: float) -> "_Guarded | None":
        """Return who makes room: a slow reader, then who sends nothing, then any reader."""
        reading = next((found for found in self._reading if found in among), None)
        is_slow = reading is not None and now - self._reading[reading] > SLOW_S
        return reading if is_slow else next((i for i in self._idle if i in among), reading)

    def end_slowest_body(self) -> bool:
        """End the request whose body has been arriving longest, and for more than a second."""
        now = asyncio.get_running_loop().time()
        for one, since in self._reading.items():
            if one.reading == "body" and now - since > SLOW_S:
                one.end("slow_body")
                return True
        return False

    def enter(self, one: "_Guarded", phase: Phase) -> None:
        """Note that a connection is in another phase now."""
        self._reading.pop(one, None)
        self._idle.pop(one, None)
        if phase == "idle":
            self._idle[one] = None
        elif phase != "answer":
            self._reading[one] = one.loop.time()

    def discard(self, one: "_Guarded") -> None:
        """Forget a connection that was closed."""
        self._open.discard(one)
        self._reading.pop(one, None)
        self._idle.pop(one, None)
        neighbours = self._of_address.get(one.address)
        if neighbours is not None:
            neighbours.discard(one)
            if not neighbours:
                del self._of_address[one.address]


class _Guarded(BoundedHttp):
    """A connection with a deadline for each phase."""

    def __init__(self, connections: Connections, **options: Any) -> None:
        super().__init__(refusal=connections.refusal, **options)
        self._all = connections
        self.address = ""
        self._phase: tuple[Phase, object] | None = None
        self._due, self._overdue = math.inf, ""  # when the phase must be over, else why it ends
        self._timer: asyncio.TimerHandle | None = None  # rings then, or sooner
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = network_of(self.client[0]) if self.client else ""
        if not self._all.add(self):
            self._all.refused("crowded")
            self._say(503, "crowded", "the service has too many connections. Retry later.")
            return
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel()
        self._all.discard(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def send_400_response(self, msg: str) -> None:
        self._all.refused("bad_http")
        if self.reading == "body" and self.cycle.response_started:
            self.transport.close()  # it has its answer
        elif self._found_phase() == "answer":  # of what came before; it must not get this one
            if self.reading == "body":  # of one that waits, and will never be whole
                self.pipeline.remove((self.cycle, self.app))
                self.unanswered.pop()
            self.unanswered[-1].keep_alive = False
            self.flow.pause_reading()
        else:
            self._say(400, "bad_http", "the request must be HTTP/1.1. It cannot be read.")

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            seconds = self._all.limits.write_timeout_s
            self._write_timer = self.loop.call_later(seconds, self.end, "slow_reader")

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def shutdown(self) -> None:
        """Answer what is being asked, and what is on its way; then close."""
        if self.cycle is not None and not self.cycle.response_complete:
            super().shutdown()
            return
        self._cancel()
        # A request that begins before then has a deadline of its own, and is answered.
        self._must_end_within(LAST_CALL_S, "")

    def end(self, reason: str) -> None:
        """Close the connection; a client that was sending a request is told why."""
        self._all.refused(reason)
        self._all.discard(self)
        phase = self._found_phase()
        is_untold = phase == "body" and not self.cycle.response_started
        if phase == "body":  # what it has sent is given up now, and not when the client reads on
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if is_untold or (phase == "header" and self.reading is not None):
            if reason == "crowded":
                self._say(503, reason, "the service has too many connections. Retry later.")
            else:
                slow = "the request must arrive sooner. It did not. Send it again."
                self._say(408, reason, slow)
        else:
            self._cancel()
            self.transport.abort()

    def _look(self) -> None:
        """Set the deadline of the phase that the connection has come to."""
        if self.transport.is_closing():
            return
        phase = self._found_phase()
        # By the request, too: the body of the next one has a deadline of its own.
        if self._phase == (phase, self.cycle):
            return
        self._phase = (phase, self.cycle)
        self._all.enter(self, phase)
        limits = self._all.limits
        if phase == "header":
            self._must_end_within(limits.header_timeout_s, "slow_header")
        elif phase == "body":
            self._must_end_within(limits.body_timeout_s, "slow_body")
        elif phase == "idle":
            # uvicorn's is lost where a body goes on arriving after its answer.
            self._must_end_within(limits.idle_timeout_s, "")
        else:
            self._due = math.inf

    def _must_end_within(self, seconds: float, reason: str) -> None:
        """Set the deadline; without a reason the connection is closed then, and nobody told.

        A timer that rings sooner is kept: phases are many, and most are over long before.
        """
        self._due, self._overdue = self.loop.time() + seconds, reason
        if self._timer is None or self._timer.when() > self._due:
            self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self.loop.call_at(self._due, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self.loop.time() >= self._due:
            if self._overdue:
                self.end(self._overdue)
            else:
                self.transport.close()
        elif self._due < math.inf:
            self._set_timer()

    def _found_phase(self) -> Phase:
        being_read = 1 if self.reading == "body" else 0
        if len(self.unanswered) > being_read:
            return "answer"
        if self.reading is not None:
            return self.reading
        return "header" if self.cycle is None else "idle"

    def _cancel(self) -> None:
        for timer in (self._timer, self._write_timer):
            if timer is not None:
                timer.cancel()
        self._timer = self._write_timer = None
        self._unset_keepalive_if_required()

    def _say(self, status: int, code: str, message: str) -> None:
        """Answer outside of the app, and close."""
        self._cancel()
        is_known = self.reading == "body"  # to the app, which counts and logs it
        headers = self.headers if self.reading == "header" else []
        read: Any = {"path": "", "method": "", "headers": headers, "state": {}}
        scope: Any = self.cycle.scope if is_known else read
        state = scope["state"]
        state["answered"], state["reason"] = status, code  # for who counts and logs the request
        identity = state.setdefault("request_id", request_id(Headers(scope=scope)))
        body = json.dumps(error_content(scope["path"], code, message)).encode()
        fields = [(b"content-type", b"application/json"), (b"connection", b"close")]
        fields += [one for one in self._all.marks(identity) if one[0] != b"connection"]
        if status == 503:
            fields.append((b"retry-after", b"1"))
        self.transport.write(raw_reply(status, fields, body))
        self.transport.close()
        if not is_known:
            self._all.count(scope, status)
        # A client that takes nothing would keep what was written, and so the connection.
        self.loop.call_later(self._all.limits.write_timeout_s, self.transport.abort)


def network_of(address: str) -> str:
    """Return what one client has: its IPv4 address, or the /64 network of its IPv6 address."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:  # of a socket that is a file
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return address
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.IPv6Network((found.packed[:8] + bytes(8), 64)))


def room_for_connections(wanted: int) -> int:
    """Return how many connections the limit on open files leaves room for, after raising it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    needed = wanted + _SPARE_FILES
    if soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        except (OSError, ValueError):
            soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    room = max(1, min(wanted, soft - _SPARE_FILES))
    if room < wanted:
        log.warn(
            f"at most {room} connections instead of {wanted}: this process may open {soft} files. "
            "Raise it with ulimit -n."
        )
    return room

"""What systemd wants to hear of a service of Type=notify: sd_notify(3)."""

import contextlib
import math
import os
import socket
import time
from collections.abc import Mapping


class Supervisor:
    """Whoever started the process, and restarts it when it does not say that it lives."""

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        """Read who that is, and how often it wants to hear of us."""
        self._address = environment.get("NOTIFY_SOCKET", "")
        wanted_us = environment.get("WATCHDOG_USEC", "")
        is_mine = environment.get("WATCHDOG_PID", "") in ("", str(os.getpid()))
        # Twice in that time, as sd_watchdog_enabled(3) advises.
        self._every_s = int(wanted_us) / 2e6 if wanted_us.isdecimal() and is_mine else math.inf
        self._next_s = 0.0 if self._address and math.isfinite(self._every_s) else math.inf

    def is_waiting(self) -> bool:
        """Say whether it is time for a sign of life."""
        return time.monotonic() >= self._next_s

    def lives(self) -> None:
        """Give the sign."""
        self._next_s = time.monotonic() + self._every_s
        self.tell("WATCHDOG=1")

    def tell(self, state: str) -> None:
        """Send READY=1, STOPPING=1 or another state."""
        if not self._address:
            return
        is_abstract = self._address.startswith("@")
        name = f"\0{self._address[1:]}" if is_abstract else self._address
        # It is no reason to end that nobody reads it.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as one:
            one.sendto(state.encode(), name)

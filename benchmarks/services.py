"""A service as a process group of its own: started, measured from outside, and ended."""

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

START_WITHIN_S = 120
END_WITHIN_S = 40
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


class Service:
    """A running service; leaving the context ends it and all its processes."""

    def __init__(self, command: Sequence[str], port: int, env: Mapping[str, str] = {}) -> None:
        """Start it.

        Args:
            command: runs in the foreground, and listens on `port` of 127.0.0.1.
            env: on top of this process's.
        """
        self.port, self.command = port, " ".join(command)
        self.started_at = time.monotonic()
        self.process = subprocess.Popen(
            command, env=os.environ | env, stdout=sys.stderr, start_new_session=True
        )

    def url(self, path: str) -> str:
        """Return the URL of a path."""
        return f"http://127.0.0.1:{self.port}{path}"

    def ask(self, path: str, body: bytes, content_type: str) -> tuple[int, bytes]:
        """Return status and body of one answer to a POST, on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request("POST", path, body, {"Content-Type": content_type})
            answer = connection.getresponse()
            return answer.status, answer.read()

    def wait_until_it_answers(self, path: str, body: bytes, content_type: str) -> float:
        """Return the seconds from its start to its first answer with status 200."""
        ends = time.monotonic() + START_WITHIN_S
        while time.monotonic() < ends and self.process.poll() is None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.ask(path, body, content_type)[0] == 200:
                    return round(time.monotonic() - self.started_at, 2)
            time.sleep(0.02)
        raise SystemExit(f"error: {self.command} did not answer within {START_WITHIN_S} s")

    def wait_until_it_is_ready(self, path: str) -> None:
        """Wait for status 200 of a GET."""
        ends = time.monotonic() + START_WITHIN_S
        while time.monotonic() < ends and self.process.poll() is None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
            with contextlib.closing(connection), contextlib.suppress(OSError):
                connection.request("GET", path)
                if connection.getresponse().status == 200:
                    return
            time.sleep(0.02)
        raise SystemExit(f"error: {self.command} was not ready within {START_WITHIN_S} s")

    def idle_cpu(self, seconds: float) -> float:
        """Return the share of one core that it uses in so many seconds without a request."""
        before = self._cpu_s()
        time.sleep(seconds)
        return round((self._cpu_s() - before) / seconds, 4)

    def memory_mb(self) -> float:
        """Return the resident memory of all its processes; what they share counts once."""
        return round(sum(_pss_bytes(pid) for pid in self._pids()) / 1e6, 1)

    def _cpu_s(self) -> float:
        ticks = 0
        for pid in self._pids():
            fields = _stat(pid)
            ticks += int(fields[11]) + int(fields[12])  # utime, stime
        return ticks / _TICKS_PER_S

    def _pids(self) -> list[int]:
        """Return the processes of its session."""
        pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        return [pid for pid in pids if (found := _stat(pid)) and int(found[3]) == self.process.pid]

    def end(self) -> int:
        """Send SIGTERM, and SIGKILL to all that is left later; return its status."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(END_WITHIN_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait()

    def __enter__(self) -> "Service":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.end()


def _stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the command's name; none if it has gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _pss_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)

"""Signals that ask a run to stop: Ctrl-C, and what clusters send before they take the machine.

SIGTERM comes before a kill everywhere: Slurm's preemption (after SIGCONT, which a running process
need not handle), Kubernetes, systemd, spot machines. SIGUSR1 is the usual choice for
`sbatch --signal`, SIGUSR2 what Grid Engine's -notify sends. SIGHUP means that the terminal is gone;
under nohup, which ignores it, it stays ignored.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fieldmark.errors import Interrupted, Preempted, RunError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class StopNow(KeyboardInterrupt):
    """A signal came where nothing has to be finished first."""

    def __init__(self, received: signal.Signals) -> None:
        super().__init__(received.name)
        self.received = received


class StopRequest:
    """Whether a signal asked the run to stop, and which one."""

    def __init__(self, *, at_once: bool = False) -> None:
        self.received: signal.Signals | None = None
        self._at_once = at_once
        self._process = os.getpid()
        self._terminals = [number for number in (1, 2) if os.isatty(number)]

    def is_set(self) -> bool:
        """Whether to save a checkpoint and stop."""
        return self.received is not None

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Take a signal, as a handler of Python's."""
        if os.getpid() != self._process:  # a forked worker, before it has its own handlers
            return
        received = signal.Signals(number)
        if received == signal.SIGHUP:
            _silence(self._terminals)
        if self.is_set():
            if received == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.received = received
        if self._at_once:
            raise StopNow(received)
        # Not through a stream: this may have come in the middle of a write to it.
        with contextlib.suppress(OSError):
            os.write(2, f"\nnote: {received.name}: stopping after this update\n".encode())


def stop_error(cause: signal.Signals | BaseException | None, message: str) -> RunError:
    """Return the error of a stopped run: Interrupted after Ctrl-C, Preempted after other signals.

    Args:
        cause: the signal, or the KeyboardInterrupt that came of one.
    """
    if isinstance(cause, StopNow):
        cause = cause.received
    by_cluster = isinstance(cause, signal.Signals) and cause != signal.SIGINT
    return Preempted(message) if by_cluster else Interrupted(message)


@contextmanager
def stop_requests(*, at_once: bool = False) -> Iterator[StopRequest]:
    """Note the first signal that asks to stop; a second Ctrl-C raises KeyboardInterrupt.

    Blocks may be nested: the inner one rules until it ends, and what it noted but did not act on
    is then the outer one's. In threads other than the main one, which no signal reaches, nothing
    happens.

    Args:
        at_once: raise StopNow at the first signal, where there is no update to finish.
    """
    request = StopRequest(at_once=at_once)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {
        number: signal.signal(number, request.handle)
        for number in _SIGNALS
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if request.received is not None:
        signal.raise_signal(request.received)


def _silence(terminals: list[int]) -> None:
    """Lead what would go to a terminal that is gone nowhere: writing to it is an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in terminals:
        os.dup2(nowhere, number)
    os.close(nowhere)

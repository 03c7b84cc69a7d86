"""The process that serves: a socket, a model loaded beside it, and an end on SIGTERM or Ctrl-C."""

import asyncio
import contextlib
import errno
import logging
import math
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI

from fieldmark.errors import ConfigError, PackageError
from fieldmark.packaging.load import choose_device
from fieldmark.packaging.manifest import open_package
from fieldmark.runtime import log
from fieldmark.runtime.cpu import num_cores
from fieldmark.runtime.memory import share_one_heap
from fieldmark.serving.app import create_app
from fieldmark.serving.connections import Connections
from fieldmark.serving.cost import BatchCost
from fieldmark.serving.identity import count, marks
from fieldmark.serving.keys import Keys
from fieldmark.serving.limits import Limits
from fieldmark.serving.predictor import Predictor, open_predictor, unless_slower
from fieldmark.serving.preference import DEFAULT_VARIANT, choose_served
from fieldmark.serving.service import THREAD_NAMES, Service
from fieldmark.serving.shedding import Shedding
from fieldmark.serving.supervisor import Supervisor
from fieldmark.serving.workers import Setting, parse_setting

END_WITHIN_S = 30  # requests still running then are cut off
_LAST_WORK_S = 5  # for what runs in threads and nobody waits for any more
_WARM_ROUNDS = 3  # the first is slower, as buffers are made


def serve(
    package_path: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    variant: str = "auto",
    threads: int | str = 0,
    device: str = "auto",
    check: bool = True,
    limits: Limits | None = None,
    keys: Path | None = None,
    announce: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Serve a package over HTTP until SIGTERM or SIGINT, then finish what runs and return.

    /livez answers at once; /readyz, and the line with the URL, when the model is checked and warm.
    SIGTERM turns /readyz off and keeps on serving for `limits.drain_s`, so that whoever sends
    requests has time to notice; then, or at once on SIGINT or a second SIGTERM, no connection is
    taken any more and what was asked is answered. Where the model hangs then, the process ends with
    status 1.

    Args:
        port: 0 takes a free one.
        variant: auto takes what this machine prefers (see `preference`), else onnx.
        threads: of the model, or as "2x1" calls at once and the threads of each; 0: those that the
            preferred variant was fastest with, else all cores, as `default_setting` has it.
        device: auto, cpu or cuda; auto takes cuda where onnxruntime can start there.
        check: as in `open_predictor`.
        limits: what the service takes; None: as by default.
        keys: a file of API keys, of which each request must carry one; None: none is asked for.
        announce: called with {"url", "model", "variant", "device"} once the service is ready.

    Raises:
        ConfigError: the address cannot be served on, there is no such device or file of keys, or
            there are far more threads than cores.
        PackageError, CheckFailed: the package cannot be opened, or fails its golden samples.
    """
    # What Pillow says of a client's file is the client's, who is told, and would fill the log.
    warnings.filterwarnings("ignore", module=r"PIL(\.|$)")
    limits = limits or Limits()
    share_one_heap()
    choose_device(device)
    setting = None if threads in (0, "0", "") else parse_setting(str(threads), num_cores())
    known = None if keys is None else Keys(keys)
    with listen(host, port) as listener:
        loaded: Future[Predictor] = Future()
        cost = BatchCost()
        app = create_app(loaded, limits=limits, keys=known, cost=cost)
        server = _Server(app, app.state.service, known)

        def load() -> None:
            try:
                predictor, why = _open(package_path, variant, setting, device, check)
                predictor = unless_slower(predictor)
                warm_up(predictor, limits.largest_batch, cost)
            except BaseException as error:  # noqa: BLE001  # raised again by the main thread
                loaded.set_exception(error)
                server.should_exit = True
            else:
                loaded.set_result(predictor)
                if not server.should_exit:
                    _say_ready(package_path, url_of(listener), predictor, why, announce)
                    server.supervisor.tell("READY=1")

        with _signals_end(server):
            # A daemon: an end that is asked for while it loads does not wait for it.
            threading.Thread(target=load, name="load", daemon=True).start()
            server.run(sockets=[listener])
        app.state.service.close()
        if loaded.done():
            loaded.result()  # raises what loading raised
    if not _threads_have_ended(_LAST_WORK_S):
        log.warn("the model did not come to an end: the process ends without it")
        log.event("hung")
        os._exit(1)  # Python would wait for its threads


def _threads_have_ended(within_s: float) -> bool:
    ends = time.monotonic() + within_s
    mine = [one for one in threading.enumerate() if one.name.startswith(THREAD_NAMES)]
    for one in mine:
        one.join(max(0.0, ends - time.monotonic()))
    return not any(one.is_alive() for one in mine)


def warm_up(predictor: Predictor, max_batch_size: int, cost: BatchCost) -> None:
    """Run batches of several sizes, so that no request meets a cold model, and learn their cost.

    Last, as many of the largest run at once as ever will: what that takes of memory is taken now,
    and not in the first hour that is busy.
    """
    spec, draw = predictor.preprocess, np.random.default_rng(0)
    for size in sorted({1, -(-max_batch_size // 2), max_batch_size}):
        shape = (size, spec.height_px, spec.width_px, 3)
        images = draw.integers(0, 256, shape, dtype=np.uint8)
        for round_ in range(_WARM_ROUNDS):
            started = time.monotonic()
            predictor.logits(images)
            if round_:
                cost.add(size, time.monotonic() - started)
    _at_once(partial(predictor.logits, images), predictor.workers)
    if predictor.maps is not None:
        predictor.maps.run(images[:1])


def _at_once(call: Callable[[], object], count: int) -> None:
    """Make so many calls at the same time, in threads that the process may end without."""
    errors: list[Exception] = []

    def run() -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001  # raised again below
            errors.append(error)

    threads = [threading.Thread(target=run, name="warm", daemon=True) for _ in range(count)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    if errors:
        raise errors[0]


def _open(
    package_path: str | Path, variant: str, asked: Setting | None, device: str, check: bool
) -> tuple[Predictor, str]:
    """Return the predictor to serve with, and why it is that one."""
    if choose_device(device) == "cuda":
        name = DEFAULT_VARIANT if variant == "auto" else variant
        if asked is not None and asked.workers > 1:
            raise ConfigError(
                f"threads must be a number on cuda, where one call runs at a time. Got {asked}. "
                f"Write {asked.threads}."
            )
        try:
            threads = 1 if asked is None else asked.threads  # they only feed it
            found = open_predictor(package_path, name, threads, check, 1, "cuda", True)
            return found, "the device asked for" if device == "cuda" else "it is there"
        except PackageError as error:
            if device == "cuda":
                raise
            log.warn(f"serving on the cpu instead of cuda. {error}")
    chosen = choose_served(open_package(package_path), variant, asked)
    setting = chosen.setting
    found = open_predictor(
        package_path, chosen.variant, setting.threads, check, setting.workers, "cpu", True
    )
    return found, f"{setting.words()}: {chosen.why}"


def _say_ready(
    package_path: str | Path,
    url: str,
    predictor: Predictor,
    why: str,
    announce: Callable[[dict[str, Any]], None] | None,
) -> None:
    facts = {
        "url": url,
        "model": predictor.model_id,
        "variant": predictor.variant,
        "device": predictor.device,
    }
    if announce is not None:
        announce(facts)
    log.event("ready", package=str(package_path), why=why, **facts)
    log.say(
        f"Serving {package_path} at {url} (try it at {url}/docs) with variant "
        f"{predictor.variant} on {predictor.device} ({why}). Ask it: "
        f"curl --data-binary @image.jpg '{url}/v1/classify?top_k=1'"
    )


def listen(host: str, port: int) -> socket.socket:
    """Return a listening TCP socket, or raise ConfigError in one sentence."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"port must be from 0 to 65535. Got {port}.")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
        # asyncio sets this only where a socket names its protocol, which those of a listener do
        # not. Without it the second part of an answer waits 40 ms for a delayed acknowledgement.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except (socket.gaierror, UnicodeError) as error:  # the latter of a label that is too long
        raise ConfigError(
            f"host must be an address of this machine. Got {host!r}. "
            "Use 127.0.0.1, or 0.0.0.0 to be reached from outside."
        ) from error
    except OSError as error:
        reasons = {
            errno.EADDRINUSE: "It is in use. Choose another, or 0 for a free one",
            errno.EACCES: "That needs administrator rights. Choose one above 1023",
            errno.EADDRNOTAVAIL: "The host is not an address of this machine. Use 127.0.0.1",
        }
        reason = reasons.get(error.errno or 0, error.strerror or "It cannot be opened")
        raise ConfigError(f"port {port} of {host} must be free to listen on. {reason}.") from error


def url_of(listener: socket.socket) -> str:
    """Return the URL at which this machine reaches the socket."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn's server, which drains before it ends and loses no request that reached it."""

    def __init__(self, app: FastAPI, service: Service, keys: Keys | None) -> None:
        self._service = service
        self.supervisor = Supervisor()
        self._ends_at = math.inf  # time.monotonic()
        connections = Connections(
            service.limits,
            service.metrics.refused,
            partial(marks, service),
            Shedding(service, keys).refusal,
            partial(count, service, seconds=0.0),
        )
        service.arrivals.end_slowest = connections.end_slowest_body
        service.metrics.gauge("connections", "Open connections.", lambda: len(connections))
        config = uvicorn.Config(
            app,
            loop="asyncio",
            http=connections.protocol,  # type: ignore[arg-type]  # called like the class
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=service.limits.idle_timeout_s,  # type: ignore[arg-type]
            timeout_graceful_shutdown=END_WITHIN_S,
        )
        for name in ("uvicorn.error", "asyncio", "python_multipart"):
            _log_as_ours(logging.getLogger(name))
        super().__init__(config)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain on the first SIGTERM to a service that is ready; else end."""
        service = self._service
        self.supervisor.tell("STOPPING=1")
        is_first = not service.is_draining and not self.should_exit
        if sig == signal.SIGTERM and is_first and service.is_ready and service.limits.drain_s:
            service.is_draining = True
            self._ends_at = time.monotonic() + service.limits.drain_s
            log.event("draining", seconds=service.limits.drain_s)
            # uvicorn raises it again after the end, as it does with those that it handles itself.
            self._captured_signals.append(sig)
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Say whether to end now, and to who supervises that the service lives."""
        if self.supervisor.is_waiting() and self._service.is_alive:
            self.supervisor.lives()
        if time.monotonic() >= self._ends_at:
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take the connections that the system has accepted already, then end as uvicorn does."""
        self._service.is_draining = True
        waiting = [one for listener in sockets or [] for one in _accept_rest(listener)]
        for server in self.servers:
            server.close()
        for listener in sockets or []:
            listener.close()
        for one in waiting:
            await asyncio.get_running_loop().connect_accepted_socket(self._protocol, one)
        await super().shutdown(sockets)

    def _protocol(self) -> asyncio.Protocol:
        return self.config.http_protocol_class(  # type: ignore[call-arg]
            config=self.config,
            server_state=self.server_state,
            app_state=self.lifespan.state,
        )


def _accept_rest(listener: socket.socket) -> list[socket.socket]:
    """Return the connections that wait to be accepted: closing the listener would reset them."""
    found = []
    listener.setblocking(False)
    with contextlib.suppress(OSError):  # none is left, or there are too many open files
        while True:
            found.append(listener.accept()[0])
    for one in found:
        one.setblocking(False)
    return found


class _ToLog(logging.Handler):
    """What a library logs, as a note of ours."""

    def emit(self, record: logging.LogRecord) -> None:
        log.warn(self.format(record))


def _log_as_ours(logger: logging.Logger) -> None:
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    logger.handlers = [_ToLog()]


@contextmanager
def _signals_end(server: uvicorn.Server) -> Iterator[None]:
    """Let SIGTERM and SIGINT end the server and nothing else.

    uvicorn takes both while it runs, and afterwards raises them again for whoever had them before:
    without these handlers an orderly end would be reported as a death by signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        server.should_exit = True

    previous = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

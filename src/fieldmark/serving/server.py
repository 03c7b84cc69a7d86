"""The process that serves: a socket, a model loaded beside it, and an end on SIGTERM or Ctrl-C."""

import errno
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from fieldmark.errors import ConfigError
from fieldmark.packaging.manifest import open_package
from fieldmark.runtime import log
from fieldmark.serving.app import create_app
from fieldmark.serving.predictor import Predictor, open_predictor
from fieldmark.serving.preference import choose_served
from fieldmark.serving.service import Limits

END_WITHIN_S = 30  # requests still running then are cut off


def serve(
    package_path: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    variant: str = "auto",
    threads: int = 0,
    check: bool = True,
    limits: Limits | None = None,
    announce: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Serve a package over HTTP until SIGTERM or SIGINT, then finish what runs and return.

    /livez answers at once; /readyz, and the line with the URL, when the model is checked.

    Args:
        port: 0 takes a free one.
        variant: auto takes what this machine prefers (see `preference`), else onnx.
        threads: of the model; 0: those that the preferred variant was fastest with, or all cores.
        check: as in `open_predictor`.
        limits: what the service takes; None: as by default.
        announce: called with {"url", "model"} once the service is ready.

    Raises:
        ConfigError: the address cannot be served on.
        PackageError, CheckFailed: the package cannot be opened, or fails its golden samples.
    """
    with listen(host, port) as listener:
        loaded: Future[Predictor] = Future()
        app = create_app(loaded, limits=limits)
        server = _server(app)

        def load() -> None:
            try:
                chosen = choose_served(open_package(package_path), variant, threads)
                setting = chosen.setting
                predictor = open_predictor(
                    package_path, chosen.variant, setting.threads, check, setting.workers
                )
            except BaseException as error:  # noqa: BLE001  # raised again by the main thread
                loaded.set_exception(error)
                server.should_exit = True
            else:
                loaded.set_result(predictor)
                url = url_of(listener)
                if announce is not None:
                    announce({"url": url, "model": predictor.model_id})
                log.say(
                    f"Serving {package_path} at {url} (try it at {url}/docs) with variant "
                    f"{chosen.variant}, {setting.words()} ({chosen.why}). Ask it: "
                    f"curl --data-binary @image.jpg '{url}/v1/classify?top_k=1'"
                )

        with _signals_end(server):
            threading.Thread(target=load, name="load").start()
            server.run(sockets=[listener])
        app.state.service.close()
        loaded.result()  # raises what loading raised


def listen(host: str, port: int) -> socket.socket:
    """Return a listening TCP socket, or raise ConfigError in one sentence."""
    if not 0 <= port <= 65535:
        raise ConfigError(f"port must be from 0 to 65535. Got {port}.")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048)
    except socket.gaierror as error:
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


def _server(app: FastAPI) -> uvicorn.Server:
    config = uvicorn.Config(
        app,
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="off",
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=END_WITHIN_S,
    )
    return uvicorn.Server(config)


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

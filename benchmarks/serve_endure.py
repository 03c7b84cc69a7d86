"""The service under what a service meets: overload, bad images, slow clients, an end in full work.

    .venv/bin/python benchmarks/serve_endure.py JOB --model PACKAGE --images FOLDER

overload  a minute at 3 times the throughput of 16 clients: what comes in time, what the others are
          told, and memory from 10 s on to the end. Requests must be answered within the SLO of
          benchmarks/serve_race.py; the service is told 0.8 of it.
corrupt   a minute at full load, 1 image in 100 a broken one: who gets 422, and whether the others
          get the class that the model gives without a service.
slow      throughput of 4 clients with and without 1,000 connections that send a byte a second of
          headers or of a body, in alternating turns.
sigterm   SIGTERM under full load, 20 times: what was accepted and not answered, whether /readyz
          said so before the port closed, the exit status.

Each appends a row to benchmarks/results/serve_endure.json.
"""

import argparse
import asyncio
import contextlib
import http.client
import json
import resource
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import results_file
from load_poisson import Poisson, Sent
from load_wrk import Bodies, closed_loop, write_images
from results_file import Row
from serve_race import MIN_SLO_S, PROGRAM, jpegs
from services import Service, free_port

from fieldmark.packaging.load import open_onnx
from fieldmark.packaging.manifest import open_package

NAME = "serve_endure"
COMMAND = "benchmarks/serve_endure.py JOB --model PACKAGE --images FOLDER"
PATH = "/v1/classify?top_k=1"
SLO_S = MIN_SLO_S
NUM_SLOW = 1000
TURNS = 6
ENDS = 20


def main() -> None:
    """Run one job and append its row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", choices=list(JOBS))
    parser.add_argument("--model", type=Path, required=True, help="a package with an onnx variant")
    parser.add_argument("--images", type=Path, required=True, help="folder with JPEGs anywhere in")
    parser.add_argument("--variant", default="onnx")
    parser.add_argument("--seconds", type=float, default=60.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(options, write_images(jpegs(options.images), Path(folder)))
        row = JOBS[options.job](bench)
    row = {"job": options.job, "variant": options.variant, "model": options.model.name, **row}
    print(json.dumps(row), file=sys.stderr)
    results_file.append_row(NAME, COMMAND, row)


class Bench:
    """The package, the requests, and how long."""

    def __init__(self, options: argparse.Namespace, bodies: Bodies) -> None:
        """Read the bodies."""
        self.model, self.variant, self.seconds = options.model, options.variant, options.seconds
        self.bodies = bodies
        self.encoded = bodies.read()

    @contextmanager
    def service(self, *more: str) -> Iterator[Service]:
        """Start the service; it answers."""
        port = free_port()
        serve = [PROGRAM, "serve", str(self.model), "--variant", self.variant]
        with Service([*serve, "--port", str(port), *more], port) as found:
            found.wait_until_it_answers(PATH, self.encoded[0], self.bodies.content_type)
            yield found

    def capacity(self, service: Service) -> float:
        """Return the images a second of 16 clients."""
        closed_loop(service.url(PATH), self.bodies, 4, 2)
        return float(closed_loop(service.url(PATH), self.bodies, 16, 10)["images_per_s"])

    def poisson(self, service: Service, rate: float, images: list[bytes] | None = None) -> Poisson:
        """Return requests at random times."""
        kind = self.bodies.content_type
        return Poisson(service.url(PATH), images or self.encoded, kind, rate)


def overload(bench: Bench) -> Row:
    """Send 3 times what it can answer."""
    with bench.service() as service:
        capacity = bench.capacity(service)
    memory: list[float] = []
    with bench.service("--timeout-s", f"{0.8 * SLO_S:g}") as service:
        closed_loop(service.url(PATH), bench.bodies, 16, 2)
        is_over = threading.Event()

        def watch() -> None:
            while not is_over.wait(1.0):
                memory.append(service.memory_mb())

        watching = threading.Thread(target=watch)
        watching.start()
        sent = bench.poisson(service, 3 * capacity).run(bench.seconds)
        is_over.set()
        watching.join()
    with bench.service() as service:
        after = bench.capacity(service)
    refusals = [one for one in sent if one.status in (429, 503)]
    in_time = sum(one.status == 200 and one.latency_s <= SLO_S for one in sent) / bench.seconds
    return {
        "capacity_per_s": {"before": capacity, "after": after},
        "slo_s": SLO_S,
        "seconds": bench.seconds,
        "sent": len(sent),
        "statuses": statuses(sent),
        "in_time_per_s": round(in_time, 2),
        "in_time_over_capacity": round(in_time / statistics.mean([capacity, after]), 3),
        "refusals_with_retry_after": sum(b"retry-after:" in x.headers.lower() for x in refusals),
        "refusals": len(refusals),
        "dropped": sum(one.status == 0 for one in sent),
        "memory_mb": {"after_10_s": memory[9], "at_end": memory[-1], "max": max(memory)},
        "memory_growth": round(memory[-1] / memory[9] - 1, 4),
    }


def corrupt(bench: Bench) -> Row:
    """Mix broken images with good ones."""
    images = bench.encoded[:300]
    expected = right_classes(bench, images)
    broken = {99: images[99][: len(images[99]) // 2], 199: b"not an image", 299: images[0][900:]}
    for number, data in broken.items():
        images[number] = data
    with bench.service() as service:
        capacity = bench.capacity(service)
        sent = bench.poisson(service, capacity, images).run(bench.seconds)
    good = [one for one in sent if one.body not in broken]
    answered = [one for one in good if one.status == 200]
    right = sum(class_of(one.answer) == expected[one.body] for one in answered)
    return {
        "capacity_per_s": capacity,
        "seconds": bench.seconds,
        "broken": statuses(one for one in sent if one.body in broken),
        "good": statuses(good),
        "good_with_the_right_class": right,
    }


def right_classes(bench: Bench, images: list[bytes]) -> list[str]:
    """Return the class of each image as the variant gives it without a service."""
    package = open_package(bench.model)
    predict = open_onnx(package, bench.variant)
    found = [predict(np.asarray(package.preprocess(image))[None])[0].argmax() for image in images]
    return [package.class_names[int(index)] for index in found]


def slow(bench: Bench) -> Row:
    """Let a thousand connections dawdle beside four that do not."""
    allow_files(2 * NUM_SLOW + 200)
    turns: dict[str, list[Row]] = {"without": [], "with": []}
    with bench.service() as service:
        bench.capacity(service)
        for turn in range(TURNS):
            for name in ("without", "with") if turn % 2 else ("with", "without"):
                dawdlers = Dawdlers(service.port) if name == "with" else contextlib.nullcontext()
                with dawdlers:
                    found = closed_loop(service.url(PATH), bench.bodies, 4, 8, first=50 * turn)
                turns[name].append(found)
    ratios = [
        a["images_per_s"] / b["images_per_s"]
        for a, b in zip(turns["with"], turns["without"], strict=True)
    ]
    return {
        "slow_connections": NUM_SLOW,
        "throughput_with_over_without": results_file.spread([round(x, 3) for x in ratios]),
        "p99_ms": {k: results_file.spread([x["p99_ms"] for x in v]) for k, v in turns.items()},
        "refused_or_broken": sum(x["refused"] + x["broken"] for v in turns.values() for x in v),
        "turns": turns,
    }


class Dawdlers:
    """Connections that send a byte a second: half of them of their headers, half of a body."""

    def __init__(self, port: int) -> None:
        """Connect all, and go on sending until the context ends."""
        self.port = port
        self.is_over = threading.Event()
        self.thread = threading.Thread(target=self._dawdle)

    def _dawdle(self) -> None:
        head = b"POST /v1/classify HTTP/1.1\r\nHost: slow\r\n"
        whole = head + b"Content-Type: image/jpeg\r\nContent-Length: 90000\r\n\r\n"
        sockets = [socket.create_connection(("127.0.0.1", self.port)) for _ in range(NUM_SLOW)]
        for number, one in enumerate(sockets):
            one.sendall(whole if number % 2 else head + b"X-Slow: ")
        while not self.is_over.wait(1.0):
            for one in sockets:
                with contextlib.suppress(OSError):  # the service has had enough of it
                    one.send(b"a")
        for one in sockets:
            one.close()

    def __enter__(self) -> None:
        self.thread.start()
        time.sleep(1.0)

    def __exit__(self, *_: object) -> None:
        self.is_over.set()
        self.thread.join()


def sigterm(bench: Bench) -> Row:
    """End the service again and again while requests come."""
    ends = [end_once(bench, number) for number in range(ENDS)]
    return {
        "ends": len(ends),
        "requests_on_a_connection": sum(x["taken"] for x in ends),
        "lost": sum(x["lost"] for x in ends),
        "statuses": dict(sum((Counter(x["statuses"]) for x in ends), Counter())),
        "readiness_off_first": sum(x["readiness_off_first"] for x in ends),
        "exit_status_0": sum(x["exit_status"] == 0 for x in ends),
        "seconds_to_end": results_file.spread([x["seconds_to_end"] for x in ends]),
        "each": ends,
    }


def end_once(bench: Bench, number: int) -> Row:
    """Send SIGTERM in full work; go on sending until nobody listens."""
    with bench.service("--drain-s", "1.5") as service:
        rate = closed_loop(service.url(PATH), bench.bodies, 16, 3)["images_per_s"]
        load = bench.poisson(service, rate)
        load.seed = number
        states: list[tuple[float, int]] = []

        async def run() -> tuple[float, float]:
            sending = asyncio.create_task(load.send(60))
            await asyncio.sleep(2 + number / 10)
            service.process.send_signal(signal.SIGTERM)
            told_at = time.monotonic()
            while service.process.poll() is None:
                state = await asyncio.to_thread(readiness, service.port)
                states.append((time.monotonic() - told_at, state))
                load.is_over = state == 0
                await asyncio.sleep(0.05)
            load.is_over = True
            ended_at = time.monotonic()
            await sending
            return told_at, ended_at

        told_at, ended_at = asyncio.run(run())
        status = service.process.wait()
    taken = [one for one in load.sent if one.is_taken]
    codes = [state for _, state in states]
    return {
        "rate_per_s": rate,
        "taken": len(taken),
        "lost": sum(one.status == 0 for one in taken),
        "after_sigterm": sum(one.meant_at > told_at for one in taken),
        "statuses": statuses(taken),
        "readiness_off_first": 503 in codes
        and (0 not in codes or codes.index(503) < codes.index(0)),
        "exit_status": status,
        "seconds_to_end": round(ended_at - told_at, 2),
    }


def readiness(port: int) -> int:
    """Return the status of /readyz; 0 where nobody listens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status
        except (OSError, http.client.HTTPException):
            return 0


def statuses(sent: Iterable[Sent]) -> dict[str, int]:
    """Return how many requests got each status; "none": no answer."""
    return dict(Counter(str(one.status) if one.status else "none" for one in sent))


def class_of(answer: bytes) -> str:
    """Return the likeliest class of an answer."""
    return str(json.loads(answer)["predictions"][0]["class_name"])


def allow_files(count: int) -> None:
    """Let this process and its children open so many files."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(count, most), most))


JOBS = {"overload": overload, "corrupt": corrupt, "slow": slow, "sigterm": sigterm}


if __name__ == "__main__":
    main()

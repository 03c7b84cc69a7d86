"""The service beside FastAPI and LitServe: throughput, latency, and what comes in time.

    sh benchmarks/rivals/install.sh; apt-get install wrk
    .venv/bin/python benchmarks/serve_race.py same --weights local-dir:LITE0 --images FOLDER
    .venv/bin/python benchmarks/serve_race.py user --weights local-dir:LITE0 --images FOLDER

same  all run the same ONNX model, float32 at 224 px, behind the same preprocessing. In-process is
      the better of two loops over the same images without any service: one session of all cores,
      and one thread a core with a session of one thread. It is measured before and after each
      closed loop, too, beside the service that waits then: what slows both does not count.
user  as a user gets each: torch in eager mode with timm's transforms as LitServe's and FastAPI's
      pages show them, and `fieldmark serve` after `quantize` and `bench`, which choose the variant.

A round starts each service in turn, in an order that rotates, and lets wrk ask it with 1, 4, 16 and
64 clients (closed loop). Then, each started anew, requests at random times come at 50, 80, 100 and
150 % of the highest throughput that any service had in that round (open loop). In time is an
answer with status 200 within the SLO from when it was meant to be sent. The SLO is the larger of
250 ms and 10 times the in-process median of one image, fixed before the first request. In the open
loop `fieldmark serve` is told to answer within 0.8 of it (--timeout-s); the others have no such
setting.

Every request is a form with one of the JPEGs, in turn; nothing is cached. Each round appends a row
for each service to benchmarks/results/serve_race.json, and a run goes on where it stopped.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import distributions
from pathlib import Path

import numpy as np
import results_file
from in_process import in_process
from load_poisson import Poisson
from load_wrk import Bodies, closed_loop, write_forms
from results_file import Row
from services import Service, free_port

import fieldmark
from fieldmark.errors import FieldmarkError
from fieldmark.measure.timing import median_ratio

NAME = "serve_race"
COMMAND = "benchmarks/serve_race.py JOB --weights MODEL --images FOLDER"
HERE = Path(__file__).parent
PROGRAM = str(Path(sys.executable).with_name("fieldmark"))
CLIENTS = (1, 4, 16, 64)
LOADS = (0.5, 0.8, 1.0, 1.5)
MIN_SLO_S = 0.250
WARM_S, IDLE_S, BESIDE_S = 2.0, 3.0, 2.0
BESIDE = "in-process before and after"


@dataclass(frozen=True)
class Contestant:
    """A service, and how it is asked."""

    name: str
    command: Callable[[int, Path], list[str]]  # port, package -> what to run
    path: str = "/predict"
    is_answer: Callable[[bytes], bool] = lambda body: True  # of an answer with status 200
    open_loop: Callable[[float], list[str]] = lambda slo_s: []  # what else to run it with then
    env: dict[str, str] = field(default_factory=dict)


def rival(file: str, *more: str) -> Callable[[int, Path], list[str]]:
    """Return the command of one of rivals/."""
    program = str(HERE / "rivals" / file)
    return lambda port, package: [sys.executable, program, str(port), str(package), *more]


def ours(*options: str) -> Contestant:
    """Return our service."""
    return Contestant(
        "fieldmark",
        lambda port, package: [PROGRAM, "serve", str(package), "--port", str(port), *options],
        "/v1/classify?top_k=1",
        lambda body: json.loads(body)["results"][0]["status"] == 200,
        lambda slo_s: ["--timeout-s", f"{0.8 * slo_s:g}"],
    )


def contestants(job: str, weights: str) -> list[Contestant]:
    """Return who races in a job."""
    clients = HERE.parent / ".clients"
    litserve = {"PYTHONPATH": str(clients / "litserve")}
    # Its workers import the program by name, and run with uvloop, as those of fastapi[standard].
    fastapi = {"PYTHONPATH": os.pathsep.join([str(HERE / "rivals"), str(clients / "fastapi")])}
    if job == "same":
        return [
            ours("--variant", "onnx"),
            Contestant("fastapi", rival("fastapi_onnx.py"), env=fastapi),
            Contestant("litserve", rival("litserve_onnx.py"), env=litserve),
        ]
    where = str(Path(weights.removeprefix("local-dir:")).resolve())
    return [
        ours(),
        Contestant("fastapi", rival("fastapi_torch.py", f"local-dir:{where}"), env=fastapi),
        Contestant("litserve", rival("litserve_torch.py", f"local-dir:{where}"), env=litserve),
    ]


def main() -> None:
    """Run the rounds that are missing."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("job", choices=["same", "user"])
    parser.add_argument("--weights", required=True, help="tf_efficientnet_lite0, as local-dir:PATH")
    parser.add_argument("--images", type=Path, required=True, help="folder with JPEGs anywhere in")
    parser.add_argument("--calib", type=Path, help="folder of images to calibrate int8 on")
    parser.add_argument("--package", type=Path, help="keep the package here [a temporary folder]")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=4.0, help="of one closed loop")
    parser.add_argument("--open-seconds", type=float, default=10.0, help="of one open loop")
    options = parser.parse_args()
    images = jpegs(options.images)
    with tempfile.TemporaryDirectory() as folder:
        package = options.package or Path(folder, "package")
        # What this machine prefers is kept for the weights: the two jobs must not share it.
        os.environ["XDG_CACHE_HOME"] = str(package.parent / f"cache-{options.job}")
        try:
            prepare(package, options)
        except FieldmarkError as error:
            sys.exit(f"error: {error}")
        race = Race(
            options.job,
            contestants(options.job, options.weights),
            package,
            write_forms(images, Path(folder, "bodies")),
            options.seconds,
            options.open_seconds,
        )
        for number in range(options.rounds):
            race.round(number)


def jpegs(folder: Path) -> list[bytes]:
    """Return all JPEGs below a folder, mixed, at least 300."""
    paths = sorted(folder.rglob("*.JPEG")) + sorted(folder.rglob("*.jpg"))
    if len(paths) < 300:
        sys.exit(f"error: --images must have at least 300 JPEGs. Got {len(paths)} in {folder}.")
    order = np.random.default_rng(0).permutation(len(paths))
    return [paths[n].read_bytes() for n in order]


def prepare(package: Path, options: argparse.Namespace) -> None:
    """Make the package and let `bench` choose how it is served."""
    data = f"folder:{options.images}"
    if not (package / "manifest.json").is_file():
        fieldmark.package(options.weights, package, data=data)
        fieldmark.export(package, data=data)
        if options.job == "user":
            calib = f"folder:{options.calib}" if options.calib else ""
            fieldmark.quantize(package, data=data, calib=calib)
    fieldmark.bench(package)


class Race:
    """The services, the requests, and the rows that are there."""

    def __init__(
        self,
        job: str,
        services: Sequence[Contestant],
        package: Path,
        bodies: Bodies,
        seconds: float,
        open_seconds: float,
    ) -> None:
        """Fix the SLO, before anything is asked."""
        self.job, self.services, self.package, self.bodies = job, services, package, bodies
        self.seconds, self.open_seconds = seconds, open_seconds
        self.loops = in_process(package, bodies)
        found = {name: run(self.seconds) for name, run in self.loops.items()}
        self.fastest = self.loops[max(found, key=lambda name: found[name][0])]
        one = statistics.median(found["one session"][1])
        self.slo_s = round(max(MIN_SLO_S, 10 * one), 3)
        print(
            f"one image in-process: {1e3 * one:.1f} ms; the SLO is {self.slo_s} s", file=sys.stderr
        )

    def round(self, number: int) -> None:
        """Measure each service once, in both ways, unless that is there already."""
        key = {"job": self.job, "round": number}
        turn = [*self.services[number % 3 :], *self.services[: number % 3]]
        if not self._has(key | {"loop": "in-process"}):
            rates = {name: round(loop(self.seconds)[0], 2) for name, loop in self.loops.items()}
            self._add(
                key | {"loop": "in-process", "images_per_s": max(rates.values()), "of": rates}
            )
        for service in turn:
            where = key | {"loop": "closed", "service": service.name}
            if not self._has(where):
                self._add(where | self.closed(service, number))
        capacity = self._capacity(key)
        for service in turn:
            where = key | {"loop": "open", "service": service.name}
            if not self._has(where):
                self._add(
                    where | {"capacity_per_s": capacity} | self.open(service, capacity, number)
                )

    def closed(self, service: Contestant, number: int) -> Row:
        """Return cold start, idle CPU, memory and the closed loops of a service."""
        with self._started(service, []) as (process, cold_start_s):
            url = process.url(service.path)
            closed_loop(url, self.bodies, 4, WARM_S)
            time.sleep(1)
            idle = process.idle_cpu(IDLE_S)
            first = 97 * number
            ask = partial(closed_loop, url, self.bodies, seconds=self.seconds, first=first)
            loops, before = [], self.fastest(BESIDE_S)[0]
            for clients in CLIENTS:
                loop, after = ask(clients=clients), self.fastest(BESIDE_S)[0]
                loops.append(loop | {"in_process_per_s": round((before + after) / 2, 2)})
                before = after
            memory_mb = process.memory_mb()
        where = {"cold_start_s": cold_start_s, "idle_cores": idle, "memory_mb": memory_mb}
        return where | {"closed": loops}

    def open(self, service: Contestant, capacity: float, number: int) -> Row:
        """Return what came in time at each load."""
        with self._started(service, service.open_loop(self.slo_s)) as (process, _):
            url = process.url(service.path)
            closed_loop(url, self.bodies, 4, WARM_S)
            loads = [
                {"load": load} | self.open_once(service, url, load * capacity, number)
                for load in LOADS
            ]
        return {"slo_s": self.slo_s, "open": loads}

    def open_once(self, service: Contestant, url: str, rate: float, seed: int) -> Row:
        """Return what came in time at a rate, once all is answered."""
        bodies, kind = self.bodies.read(), self.bodies.content_type
        sent = Poisson(url, bodies, kind, rate, seed).run(self.open_seconds)
        good = [one for one in sent if one.status == 200 and service.is_answer(one.answer)]
        latencies = np.sort([one.latency_s for one in good])
        in_time = int((latencies <= self.slo_s).sum())
        return {
            "sent_per_s": round(len(sent) / self.open_seconds, 2),
            "in_time_per_s": round(in_time / self.open_seconds, 2),
            "answered": len(good),
            "refused": sum(one.status in (429, 503) for one in sent),
            "unanswered": sum(one.status == 0 for one in sent),
            "p50_ms": _ms(latencies, 0.5),
            "p99_ms": _ms(latencies, 0.99),
        }

    def _started(self, service: Contestant, more: list[str]) -> "_Started":
        return _Started(service, self.package, self.bodies, more)

    def _capacity(self, key: Row) -> float:
        return max(
            loop["images_per_s"]
            for row in results_file.rows(NAME)
            if row["loop"] == "closed" and key.items() <= row.items()
            for loop in row["closed"]
        )

    def _has(self, key: Row) -> bool:
        return results_file.has_row(results_file.rows(NAME), key)

    def _add(self, row: Row) -> None:
        print(json.dumps(row), file=sys.stderr)
        row["litserve"] = _litserve_version()
        results_file.append_row(NAME, COMMAND, row, summary)


class _Started:
    """A service that answers, as a context: (process, seconds until its first answer)."""

    def __init__(self, service: Contestant, package: Path, bodies: Bodies, more: list[str]) -> None:
        self.port, self.service, self.bodies = free_port(), service, bodies
        self.command = service.command(self.port, package) + more

    def __enter__(self) -> tuple[Service, float]:
        self.process = Service(self.command, self.port, self.service.env)
        body = (self.bodies.folder / "1.body").read_bytes()
        try:
            return self.process, self.process.wait_until_it_answers(
                self.service.path, body, self.bodies.content_type
            )
        except BaseException:
            self.process.end()
            raise

    def __exit__(self, *_: object) -> None:
        self.process.end()


def summary(rows: list[Row]) -> Row:
    """Return medians over rounds, and ours over each other's, round by round."""
    found: Row = {}
    for job in sorted({row["job"] for row in rows}):
        mine = [row for row in rows if row["job"] == job]
        found[job] = {"medians": _medians(mine), "fieldmark_over": _ratios(mine)}
    return {"summary": found}


def _figures(rows: list[Row]) -> dict[str, dict[int, dict[str, float]]]:
    """Return the figures by name, round and service."""
    found: dict[str, dict[int, dict[str, float]]] = {}

    for row in rows:
        for name, value in _values(row):
            if value is not None:
                service = row.get("service", "in-process")
                found.setdefault(name, {}).setdefault(row["round"], {})[service] = value
        for loop in row.get("closed", []) if row.get("service") == "fieldmark" else []:
            if "in_process_per_s" in loop:
                of = found[f"images_per_s of {loop['clients']} clients"][row["round"]]
                of[BESIDE] = loop["in_process_per_s"]
    return found


def _values(row: Row) -> Iterator[tuple[str, float | None]]:
    """Yield the figures of a row by name."""
    if row["loop"] == "in-process":
        yield from ((f"images_per_s of {n} clients", row["images_per_s"]) for n in CLIENTS)
    yield from ((name, row.get(name)) for name in ("cold_start_s", "idle_cores", "memory_mb"))
    for loop in row.get("closed", []):
        names = ("images_per_s", "p50_ms", "p99_ms")
        yield from ((f"{name} of {loop['clients']} clients", loop[name]) for name in names)
    for loop in row.get("open", []):
        names = ("in_time_per_s", "p50_ms", "p99_ms")
        yield from ((f"{name} at {100 * loop['load']:.0f} %", loop[name]) for name in names)


def _medians(rows: list[Row]) -> Row:
    found: Row = {}
    for name, rounds in _figures(rows).items():
        services = sorted({service for values in rounds.values() for service in values})
        for service in services:
            values = [of[service] for of in rounds.values() if service in of]
            found.setdefault(service, {})[name] = results_file.spread(values)
    return found


def _ratios(rows: list[Row]) -> Row:
    """Return the medians of ratios of rates, with 95 % intervals."""
    found: Row = {}
    for name, rounds in _figures(rows).items():
        if "per_s" not in name:
            continue
        for other in sorted({service for of in rounds.values() for service in of} - {"fieldmark"}):
            pairs = [
                (of["fieldmark"], of[other])
                for of in rounds.values()
                if {"fieldmark", other} <= set(of)
            ]
            if pairs:
                a, b = np.array(pairs, np.float64).T
                ratio = median_ratio(a, np.maximum(b, 0.01)).to_json()
                found.setdefault(other, {})[name] = ratio
    return found


def _ms(latencies: np.ndarray, q: float) -> float | None:
    return round(1e3 * float(np.quantile(latencies, q)), 1) if len(latencies) else None


def _litserve_version() -> str | None:
    found = distributions(path=[str(HERE.parent / ".clients" / "litserve")])
    return next((x.version for x in found if x.metadata["Name"] == "litserve"), None)


if __name__ == "__main__":
    main()

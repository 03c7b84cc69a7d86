"""What services are compared with: the same images through the same model without any service."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from load_wrk import Bodies

from fieldmark.packaging.load import open_onnx
from fieldmark.packaging.manifest import open_package
from fieldmark.runtime.cpu import num_cores

Loop = Callable[[float], tuple[float, list[float]]]


def in_process(package: Path, bodies: Bodies) -> dict[str, Loop]:
    """Return loops over the images: seconds -> images a second, and the seconds of each image."""
    opened = open_package(package)
    images = [body.split(b"\r\n\r\n", 1)[1].rsplit(b"\r\n--", 1)[0] for body in bodies.read()]
    cores = num_cores()

    def loop(predict: Callable, seconds: float, first: int) -> list[float]:
        times: list[float] = []
        ends = time.monotonic() + seconds
        while (started := time.monotonic()) < ends:
            image = images[(first + len(times)) % len(images)]
            predict(np.asarray(opened.preprocess(image))[None])
            times.append(time.monotonic() - started)
        return times

    def run(sessions: list[Callable], seconds: float) -> tuple[float, list[float]]:
        with ThreadPoolExecutor(len(sessions)) as pool:
            ran = [pool.submit(loop, one, seconds, 97 * n) for n, one in enumerate(sessions)]
            times = [seconds for one in ran for seconds in one.result()]
        return len(times) / seconds, times

    return {
        "one session": partial(run, [open_onnx(opened, "onnx", threads=cores)]),
        "a thread a core": partial(
            run, [open_onnx(opened, "onnx", threads=1) for _ in range(cores)]
        ),
    }

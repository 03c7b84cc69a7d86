"""Whether the service, `predict` and `evaluate` say the same of 1,000 images, bit for bit.

    .venv/bin/python benchmarks/serve_same.py --model PACKAGE --data SOURCE

The same variant, one image at a time: `evaluate --batch-size 1` writes logits, the service gives
them over the Open Inference Protocol (V2), and both must be equal in every bit. `predict
--batch-size 1` and /v1/classify give probabilities, which must be equal as printed. Then 16 clients
at a time make the service run batches of up to 8, in which logits may differ by TOLERANCE at most.

Appends a row to benchmarks/results/serve_same.json.
"""

import argparse
import http.client
import json
import re
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import results_file
from serve_race import PROGRAM
from services import Service, free_port

from fieldmark.data.source import open_source
from fieldmark.packaging.manifest import open_package

NAME = "serve_same"
COMMAND = "benchmarks/serve_same.py --model PACKAGE --data SOURCE [--variant NAME]"
TOLERANCE = 1e-3  # of a float32 logit: sums in another order
LENGTH_HEADER = "Inference-Header-Content-Length"
Logits = npt.NDArray[np.float32]


def main() -> None:
    """Ask all of them, and append a row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", required=True, help="a data source with a test split")
    parser.add_argument("--variant", default="onnx")
    parser.add_argument("--images", type=int, default=1000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        same = Same(options.model, options.variant, Path(folder))
        files = same.write_images(options.data, options.images)
        row = same.compare(files)
    where = {"model": same.name, "variant": options.variant, "images": len(files)}
    print(json.dumps(where | row), file=sys.stderr)
    results_file.append_row(NAME, COMMAND, where | row)


class Same:
    """A package, and the three ways to ask it."""

    def __init__(self, model: Path, variant: str, folder: Path) -> None:
        """Know where to work."""
        self.model, self.variant, self.folder = model, variant, folder
        package = open_package(model)
        self.num_classes, self.name = len(package.class_names), package.manifest.name

    def write_images(self, data: str, count: int) -> list[Path]:
        """Write test images as files in a folder for each class; return them in order."""
        source = open_source(data)
        split = source.splits["test"]
        files = []
        for n in np.linspace(0, len(split) - 1, count).astype(int):
            file = self.folder / "images" / source.class_names[split.labels[n]] / f"{n:05d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(split.images.encoded(int(n)))
            files.append(file)
        return sorted(files)

    def compare(self, files: list[Path]) -> dict[str, Any]:
        """Return what is equal."""
        evaluated, predicted = self.evaluated(files), self.predicted(files)
        with self.service("--max-batch-size", "1") as port:
            alone = np.stack(ask_all(port, files, self.logits_of, clients=1))
            classified = ask_all(port, files, self.probabilities_of, clients=1)
        with self.service() as port:
            together = np.stack(ask_all(port, files, self.logits_of, clients=16))
            images_a_batch = mean_batch(port)
        return {
            "logits_equal_evaluate": int((alone == evaluated).all(axis=1).sum()),
            "probabilities_equal_predict": sum(
                a == b for a, b in zip(classified, predicted, strict=True)
            ),
            "in_batches": {
                "mean_images": images_a_batch,
                "logits_equal_evaluate": int((together == evaluated).all(axis=1).sum()),
                "tolerance": TOLERANCE,
                "within_tolerance": bool(np.abs(together - evaluated).max() <= TOLERANCE),
                "max_abs_delta_logit": float(np.abs(together - evaluated).max()),
                "same_class": int((together.argmax(1) == evaluated.argmax(1)).sum()),
            },
        }

    def evaluated(self, files: list[Path]) -> Logits:
        """Return the logits that `evaluate` writes."""
        out = self.folder / "evaluation"
        data = ["--data", f"folder:{self.folder / 'images'}", "--split", "all"]
        how = ["--variant", self.variant, "--batch-size", "1"]
        run("evaluate", str(self.model), *data, *how, "--out", str(out))
        with np.load(out / "predictions.npz") as found:
            by_name = dict(
                zip((Path(x).name for x in found["names"]), found["logits"], strict=True)
            )
        return np.stack([by_name[file.name] for file in files])

    def predicted(self, files: list[Path]) -> list[dict[str, float]]:
        """Return the probabilities that `predict` prints."""
        how = ["--variant", self.variant, "--batch-size", "1", "--top-k", str(self.num_classes)]
        told = run("predict", str(self.model), str(self.folder / "images"), *how, "--json")
        by_name = {Path(one["file"]).name: one for one in json.loads(told)["results"]}
        return [by_class(by_name[file.name]) for file in files]

    def logits_of(self, connection: http.client.HTTPConnection, image: bytes) -> Logits:
        """Return the logits that the service gives over V2, as a binary tensor."""
        path = f"/v2/models/{self.name}/infer"
        answer, body = ask(connection, path, image, **{LENGTH_HEADER: "0"})
        size = int(answer.headers[LENGTH_HEADER])
        first = json.loads(body[:size])["outputs"][0]
        raw = body[size : size + first["parameters"]["binary_data_size"]]
        return np.frombuffer(raw, np.float32)

    def probabilities_of(self, connection: http.client.HTTPConnection, image: bytes) -> Any:
        """Return the probabilities that the service gives."""
        path = f"/v1/classify?top_k={self.num_classes}"
        return by_class(json.loads(ask(connection, path, image)[1]))

    def service(self, *more: str) -> "Serving":
        """Return the service as a context."""
        return Serving(["serve", str(self.model), "--variant", self.variant, *more])


class Serving:
    """The service; as a context, its port."""

    def __init__(self, arguments: list[str]) -> None:
        self.port = free_port()
        self.command = [PROGRAM, *arguments, "--port", str(self.port)]

    def __enter__(self) -> int:
        self.process = Service(self.command, self.port)
        self.process.wait_until_it_is_ready("/readyz")
        return self.port

    def __exit__(self, *_: object) -> None:
        self.process.end()


def mean_batch(port: int) -> float:
    """Return how many images a batch of the service had so far, those of the warm-up apart."""
    page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    total, count = (
        float(re.search(rf"(?m)^fieldmark_batch_images_{part} (\S+)$", page)[1])  # type: ignore[index]
        for part in ("sum", "count")
    )
    return round(total / count, 2)


def run(*arguments: str) -> str:
    """Return what one of the program's verbs prints."""
    return subprocess.run(
        [PROGRAM, *arguments], stdout=subprocess.PIPE, check=True, text=True
    ).stdout


def ask_all(
    port: int,
    files: list[Path],
    how: Callable[[http.client.HTTPConnection, bytes], Any],
    clients: int,
) -> list[Any]:
    """Return an answer for each file, asked for on so many connections at once."""

    def some(mine: list[Path]) -> list[Any]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        return [how(connection, file.read_bytes()) for file in mine]

    with ThreadPoolExecutor(clients) as pool:
        parts = list(pool.map(some, [files[n::clients] for n in range(clients)]))
    return [parts[n % clients][n // clients] for n in range(len(files))]


def ask(
    connection: http.client.HTTPConnection, path: str, image: bytes, **headers: str
) -> tuple[http.client.HTTPResponse, bytes]:
    """Return the answer to an image."""
    connection.request("POST", path, image, headers)
    answer = connection.getresponse()
    body = answer.read()
    if answer.status != 200:
        sys.exit(f"error: {path} answered {answer.status}: {body[:300]!r}")
    return answer, body


def by_class(found: dict[str, Any]) -> dict[str, float]:
    """Return the probability of each class."""
    return {one["class_name"]: one["probability"] for one in found["predictions"]}


if __name__ == "__main__":
    main()

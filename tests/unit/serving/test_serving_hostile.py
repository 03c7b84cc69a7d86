"""The service under files and requests made to break it, while others are answered right."""

import json
import os
import re
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hostile
import httpx
import pytest
from served import Served

from fieldmark.serving.predictor import open_predictor

CLASSIFY = "/v1/classify"
SCHEMATHESIS = Path(__file__).parents[3] / ".clients" / "python" / "bin" / "schemathesis"
# A deadline that cannot be kept is a 504, as described, but no failure of the service.
TIMEOUT = "x-request-timeout-seconds: 60"
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
)


class Neighbours:
    """Clients with good images, all the time: each answer must be the one that it gives alone."""

    def __init__(self, url, package):
        self._url, self._ends = url, threading.Event()
        predictor = open_predictor(package)
        self._images = []
        for seed in range(12):
            data = hostile.encoded(hostile.FORMATS[seed % 3], hostile.photo(seed=seed))
            [ranked] = predictor.classify_pixels(predictor.decode(data)[None])
            self._images.append((data, [(item.class_name, item.probability) for item in ranked]))
        self.num_answers, self.wrong = 0, []

    def __enter__(self):
        self._threads = [threading.Thread(target=self._ask) for _ in range(4)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._ends.set()
        for thread in self._threads:
            thread.join()

    def _ask(self):
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not self._ends.is_set():
                for data, expected in self._images:
                    reply = client.post(CLASSIFY, content=data)
                    got = [
                        (item["class_name"], item["probability"])
                        for item in reply.json().get("predictions", [])
                    ]
                    if got != expected:
                        self.wrong.append((reply.status_code, reply.text[:200]))
                    self.num_answers += 1


@pytest.fixture
def served(tiny_package):
    # Batches wait to fill, so that what is hostile meets what is good.
    with Served(tiny_package, max_pixels=20_000_000, timeout_s=60, max_wait_s=0.02) as one:
        yield one


def assert_unharmed(served, url, neighbours):
    assert neighbours.num_answers > 20
    assert neighbours.wrong == []
    assert httpx.get(f"{url}/livez").status_code == 200
    page = httpx.get(f"{url}/metrics").text
    assert 'status="500"' not in page
    assert "fieldmark_images_inside 0.0" in page
    assert "fieldmark_bytes_arriving 0.0" in page
    assert served.end(signal.SIGTERM) == 0
    assert served.rest == ""


@pytest.mark.slow
def test_hundreds_of_hostile_files_harm_nobody(served, tiny_package):
    files = hostile.corpus()
    assert len(files) >= 500
    url = served.url()
    with (
        Neighbours(url, tiny_package) as neighbours,
        httpx.Client(base_url=url, timeout=60) as client,
        ThreadPoolExecutor(3) as pool,
    ):

        def alone(file):
            name, data, statuses = file
            reply = client.post(CLASSIFY, content=data)
            return None if reply.status_code in statuses else (name, reply.text[:200])

        def many(batch):
            parts = [("images", (name, data)) for name, data, _ in batch]
            results = client.post(CLASSIFY, files=parts).json()["results"]
            assert [item["name"] for item in results] == [name for name, _, _ in batch]
            return [
                (name, item)
                for (name, _, statuses), item in zip(batch, results, strict=True)
                if item["status"] not in statuses
            ]

        assert [found for found in pool.map(alone, files) if found] == []
        batches = [files[k : k + 20] for k in range(0, len(files), 20)]
        assert [found for some in pool.map(many, batches) for found in some] == []
    page = httpx.get(f"{url}/metrics").text
    # Of the neighbours alone no batch has more than there are of them.
    found = dict(re.findall(r'(?m)^fieldmark_batch_images_bucket\{le="([^"]+)"\} (\S+)$', page))
    assert float(found["+Inf"]) > float(found["4.0"])
    assert_unharmed(served, url, neighbours)


@pytest.mark.slow
def test_the_description_is_true_of_whatever_is_sent(served, tiny_package, tmp_path):
    """schemathesis makes requests from /openapi.json, right and wrong ones, and checks answers."""
    if not SCHEMATHESIS.exists():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{SCHEMATHESIS} must be there. Run: make clients.", pytrace=False)
        pytest.skip("schemathesis is not here. Run: make clients.")
    url, report = served.url(), tmp_path / "report"
    version = open_predictor(tiny_package).version
    names = f'[parameters]\nname = "colours"\nversion = "{version}"\n'
    (tmp_path / "schemathesis.toml").write_text(names)
    with Neighbours(url, tiny_package) as neighbours:
        told = subprocess.run(
            [SCHEMATHESIS, "run", f"{url}/openapi.json", "--url", url]
            + ["--checks", ",".join(CHECKS), "--max-examples", "25", "--seed", "1"]
            + ["--header", TIMEOUT]
            + ["--report", "ndjson", "--report-dir", report, "--no-color"],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
    assert told.returncode == 0, told.stdout + told.stderr
    events = [json.loads(line) for file in report.iterdir() for line in file.open()]
    assert sum("ScenarioFinished" in event for event in events) >= 10
    assert_unharmed(served, url, neighbours)

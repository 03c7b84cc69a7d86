"""What the service counts, for Prometheus. Every label has few values: none comes from a client."""

import platform
from collections.abc import Callable
from typing import TypeVar, cast

import onnxruntime
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.exposition import choose_encoder
from prometheus_client.process_collector import ProcessCollector

import fieldmark
from fieldmark.serving.batcher import BatchReport
from fieldmark.serving.predictor import Predictor

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
M = TypeVar("M", Counter, Histogram)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class Metrics:
    """The counters of one service."""

    def __init__(self) -> None:
        own = self._registry = CollectorRegistry()
        self._parts: dict[tuple[object, tuple[str, ...]], object] = {}
        ProcessCollector(registry=own)
        self._requests = Counter(
            "fieldmark_requests",
            "Requests answered; of a refusal, its reason.",
            ["route", "status", "reason"],
            registry=own,
        )
        self._request_s = Histogram(
            "fieldmark_request_seconds",
            "From the headers of a request to the end of its answer.",
            ["route"],
            buckets=_SECONDS,
            registry=own,
        )
        self._refused = Counter(
            "fieldmark_refused",
            "Requests and connections refused, given up or ended, by the reason.",
            ["reason"],
            registry=own,
        )
        self._images = Counter(
            "fieldmark_images", "Images answered, by the status of each.", ["status"], registry=own
        )
        stage_s = Histogram(
            "fieldmark_stage_seconds",
            "Of an image waiting to be decoded, decoded, waiting for the model; of a batch in it.",
            ["stage"],
            buckets=_SECONDS,
            registry=own,
        )
        stages = ("decode_queue", "decode", "queue", "model")
        self._decode_queue_s, self._decode_s, self._queue_s, self._model_s = (
            stage_s.labels(stage) for stage in stages
        )
        self._batch_images = Histogram(
            "fieldmark_batch_images", "Images in a batch.", buckets=_SIZES, registry=own
        )
        self._batch_failures = Counter(
            "fieldmark_batch_failures", "Batches that failed and were run again.", registry=own
        )
        Info("fieldmark_build", "Versions.", registry=own).info(
            {
                "version": fieldmark.__version__,
                "onnxruntime": onnxruntime.__version__,
                "python": platform.python_version(),
            }
        )
        self._model = Info("fieldmark_model", "The model that answers.", registry=own)

    def _part(self, metric: M, *labels: str) -> M:
        """Return what counts for these labels; they are few, and looking them up is not cheap."""
        found = self._parts.get((metric, labels))
        if found is None:
            found = self._parts[metric, labels] = metric.labels(*labels)
        return cast(M, found)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Add a value that is read when it is asked for."""
        Gauge(f"fieldmark_{name}", text, registry=self._registry).set_function(read)

    def model(self, predictor: Predictor) -> None:
        """Name the model that answers from now on."""
        self._model.info(
            {
                "model": predictor.model_id,
                "name": predictor.name,
                "version": predictor.version,
                "variant": predictor.variant,
                "device": predictor.device,
                "preprocessing": predictor.preprocessing,
            }
        )

    def request(self, route: str, status: int, seconds: float, reason: str = "") -> None:
        """Count an answer. `route` is a template of ours, never a client's path."""
        self._part(self._requests, route, str(status), reason).inc()
        self._part(self._request_s, route).observe(seconds)

    def refused(self, reason: str) -> None:
        """Count what was refused; `reason` is one of few words."""
        self._part(self._refused, reason).inc()

    def image(self, status: int) -> None:
        """Count an image's answer."""
        self._part(self._images, str(status)).inc()

    def waited_to_decode(self, seconds: float) -> None:
        """Count an image that found a thread to decode it; the model's own threads have a queue."""
        self._decode_queue_s.observe(seconds)

    def decoded(self, seconds: float) -> None:
        """Count an image that was decoded."""
        self._decode_s.observe(seconds)

    def batch(self, report: BatchReport) -> None:
        """Count a batch."""
        self._batch_images.observe(report.num_images)
        self._model_s.observe(report.seconds)
        for waited in report.waited_s:
            self._queue_s.observe(waited)
        if report.failed:
            self._batch_failures.inc()

    def page(self, accept: str) -> tuple[bytes, str]:
        """Return all of it and its content type, in the format that the header Accept prefers."""
        try:
            encode, content_type = choose_encoder(accept)
        except (TypeError, ValueError):  # it compares versions, which a client may have made up
            encode, content_type = choose_encoder("")
        return encode(self._registry), content_type

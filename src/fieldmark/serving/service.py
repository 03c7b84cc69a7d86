"""From encoded images to logits: admission, decoding each image alone, the model in batches."""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import cast

from fieldmark.preprocess import MAX_PIXELS, Pixels
from fieldmark.runtime.cpu import num_cores
from fieldmark.serving.batcher import Batcher, BatchReport, Logits
from fieldmark.serving.predictor import Predictor
from fieldmark.serving.replies import Busy, Late, NotAlive, NotReady

MAX_TIMEOUT_S = 60.0  # that a client can ask for
HTTP_FORMATS = ("JPEG", "PNG", "WEBP")


@dataclass(frozen=True, slots=True)
class Limits:
    """What the service takes, and how long it tries."""

    max_body_bytes: int = 10_000_000  # of an image
    max_request_bytes: int = 64_000_000  # of a request with several
    max_pixels: int = MAX_PIXELS
    max_images: int = 32  # of one request
    max_inside: int = 256  # images waiting, decoding or in the model
    max_inside_bytes: int = 256_000_000  # of their encoded bytes
    timeout_s: float = 10.0  # of a request that names none
    max_timeout_s: float = MAX_TIMEOUT_S
    max_batch_size: int = 8
    max_wait_s: float = 0.0  # for a batch to fill
    hung_after_s: float = 60.0  # one batch this long in the model means that it hangs


class Service:
    """The way of an image through the process. All methods belong to one event loop."""

    def __init__(
        self,
        predictor: Predictor | Future[Predictor],
        limits: Limits,
        report: Callable[[BatchReport], None] = lambda _: None,
    ) -> None:
        """Make a service that answers once `predictor` is there.

        Args:
            report: is told of each batch.
        """
        self.limits = limits
        self._predictor = predictor
        self._report = report
        self._decoders = ThreadPoolExecutor(num_cores(), thread_name_prefix="image")
        self._batcher: Batcher | None = None
        self._num_inside = 0
        self._bytes_inside = 0
        self._decode_s = 0.0  # of an image, a moving average

    @property
    def predictor(self) -> Predictor:
        """The model that answers, or NotReady."""
        found = self._predictor
        if isinstance(found, Predictor):
            return found
        if not found.done() or found.exception() is not None:
            raise NotReady("the model must be loaded and checked first. Retry in a moment.")
        return found.result()

    @property
    def batcher(self) -> Batcher:
        """The queue in front of the model, or NotReady."""
        if self._batcher is None:
            self._batcher = Batcher(
                self.predictor.logits,
                workers=self.predictor.workers,
                max_batch_size=self.limits.max_batch_size,
                max_wait_s=self.limits.max_wait_s,
                report=self._report,
            )
        return self._batcher

    @property
    def num_inside(self) -> int:
        """Images admitted and not yet answered."""
        return self._num_inside

    def close(self) -> None:
        """Give up what is still inside."""
        self._decoders.shutdown(wait=False, cancel_futures=True)
        if self._batcher is not None:
            self._batcher.close()

    def must_live(self) -> None:
        """Raise NotAlive where nothing will be answered any more."""
        if self._batcher is not None:
            problem = self._batcher.problem(self.limits.hung_after_s)
            if problem is not None:
                raise NotAlive(f"{problem}. Restart the service.")

    def predicted_s(self, num_images: int) -> float:
        """Return how long so many images on top of those inside would take; 0: not yet known.

        Decoding and the model work at the same time, so the slower of the two counts.
        """
        batcher = self.batcher
        inside = self._num_inside + num_images
        model_s = batcher.cost.seconds(inside, batcher.max_batch_size) / batcher.workers
        return max(model_s, self._decode_s * inside / num_cores())

    async def logits(
        self, images: Sequence[bytes | Pixels], deadline: float
    ) -> list[Logits | Exception]:
        """Return for each image its logits, or an ImageError, Late or ModelError.

        Args:
            images: encoded, or uint8 (H, W, 3) as the preprocessing makes them.
            deadline: on the clock of time.monotonic(); what is late then is given up.

        Raises:
            Busy: there is no room, or the deadline would be missed.
            NotReady: there is no model yet.
        """
        num_bytes = sum(len(x) if isinstance(x, bytes) else x.nbytes for x in images)
        self._admit(len(images), num_bytes, deadline)
        try:
            tasks = [asyncio.create_task(self._one(image, deadline)) for image in images]
            try:
                async with asyncio.timeout_at(_loop_time(deadline)):
                    return await asyncio.gather(*tasks, return_exceptions=True)  # type: ignore[return-value]
            except TimeoutError:
                return [_outcome(task) for task in tasks]
            finally:
                for task in tasks:
                    task.cancel()
        finally:
            self._num_inside -= len(images)
            self._bytes_inside -= num_bytes

    def _admit(self, num_images: int, num_bytes: int, deadline: float) -> None:
        limits, predicted = self.limits, self.predicted_s(num_images)
        left = deadline - time.monotonic()
        if self._num_inside + num_images > limits.max_inside:
            raise Busy(
                f"at most {limits.max_inside} images may wait. Got {num_images} more. Retry later.",
                reason="queue_full",
                retry_after_s=self._retry_after(predicted / 2),
            )
        if self._bytes_inside and self._bytes_inside + num_bytes > limits.max_inside_bytes:
            raise Busy(
                "the images that wait have too many bytes together. Retry later.",
                reason="bytes_full",
                retry_after_s=self._retry_after(predicted / 2),
            )
        if self._num_inside and predicted > left:
            raise Busy(
                f"the answer must come within {max(left, 0):.3g} s. It would take about "
                f"{predicted:.3g} s. Retry later, or allow more time.",
                reason="deadline",
                retry_after_s=self._retry_after(predicted - left),
            )
        self._num_inside += num_images
        self._bytes_inside += num_bytes

    @staticmethod
    def _retry_after(seconds: float) -> int:
        """Return whole seconds, as the header wants them, until there should be room."""
        return max(1, math.ceil(seconds))

    async def _one(self, image: bytes | Pixels, deadline: float) -> Logits:
        if not isinstance(image, bytes):
            return await self.batcher.logits(image, deadline)
        pixels = await asyncio.get_running_loop().run_in_executor(
            self._decoders, partial(self._decode, image, deadline)
        )
        return await self.batcher.logits(pixels, deadline)

    def _decode(self, encoded: bytes, deadline: float) -> Pixels:
        started = time.monotonic()
        if started > deadline:
            raise Late.before_the_model(started - deadline)
        pixels = self.predictor.decode(
            encoded,
            max_bytes=self.limits.max_body_bytes,
            max_pixels=self.limits.max_pixels,
            formats=HTTP_FORMATS,
        )
        seconds = time.monotonic() - started
        self._decode_s += (seconds - self._decode_s) * (0.1 if self._decode_s else 1.0)
        return pixels


def _loop_time(deadline: float) -> float | None:
    """Return a time of time.monotonic() on the clock of the running loop; None: infinity."""
    if deadline == math.inf:
        return None
    return asyncio.get_running_loop().time() + deadline - time.monotonic()


def _outcome(task: "asyncio.Task[Logits]") -> Logits | Exception:
    if not task.done() or task.cancelled():
        return Late("the answer must come before its deadline. It did not. Allow more time.")
    error = task.exception()
    return task.result() if error is None else cast(Exception, error)

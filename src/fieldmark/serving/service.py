"""From encoded images to logits: admission, decoding each image alone, the model in batches."""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar, cast

import numpy as np

from fieldmark.errors import ImageError, ModelError
from fieldmark.preprocess import Pixels
from fieldmark.runtime.cpu import num_cores
from fieldmark.serving.arrivals import Arrivals
from fieldmark.serving.batcher import Batcher, Logits
from fieldmark.serving.cost import BatchCost
from fieldmark.serving.heat import heat_png
from fieldmark.serving.limits import HTTP_FORMATS, Limits
from fieldmark.serving.metrics import Metrics
from fieldmark.serving.predictor import Predictor
from fieldmark.serving.replies import Busy, Late, NotAlive, NotReady, to_error

_PUNCTUAL = 0.95  # of the admitted should be answered by when it was predicted
_LEARN, _MAX_SLOWNESS = 0.03, 10.0
THREAD_NAMES = ("image", "explain", "model", "unpack")  # how those of a service begin
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer:
    """An image's logits, and where it was asked for a picture of what spoke for its class."""

    logits: Logits
    png: bytes | None = None


class Service:
    """The way of an image through the process. All methods belong to one event loop."""

    def __init__(
        self,
        predictor: Predictor | Future[Predictor],
        limits: Limits,
        cost: BatchCost | None = None,
    ) -> None:
        """Make a service that answers once `predictor` is there.

        Args:
            cost: what is known of the cost of a batch by then; it goes on learning.
        """
        self.limits = limits
        self.metrics = Metrics()
        self.is_draining = False
        self._predictor = predictor
        self._cost = cost
        self._num_cores = num_cores()
        self._decoders = ThreadPoolExecutor(self._num_cores, thread_name_prefix="image")
        self._free_decoders = asyncio.Semaphore(self._num_cores)
        self._explainer = ThreadPoolExecutor(1, thread_name_prefix="explain")
        self._unpacker = ThreadPoolExecutor(1, thread_name_prefix="unpack")
        self.arrivals = Arrivals(limits.max_reading_bytes, self.busy)
        self._batcher: Batcher | None = None
        self._drawing_since: float | None = None  # time.monotonic()
        self._num_inside = 0
        self._bytes_inside = 0
        self._decode_s = 0.0  # of an image, a moving average
        self._slowness = 1.0  # what nearly all work took at most, over what it should have
        self._add_gauges()
        if isinstance(predictor, Predictor):
            self.metrics.model(predictor)
        else:
            predictor.add_done_callback(self._note_model)

    @property
    def predictor(self) -> Predictor:
        """The model that answers, or NotReady."""
        found = self._predictor
        if isinstance(found, Predictor):
            return found
        if not found.done() or found.exception() is not None:
            raise NotReady("the model must be loaded and checked first. Retry in a moment.")
        self._predictor = found.result()
        return self._predictor

    @property
    def batcher(self) -> Batcher:
        """The queue in front of the model, or NotReady."""
        if self._batcher is None:
            self._batcher = Batcher(
                self.predictor.logits,
                alone=None if self.predictor.alone is None else self.predictor.logits_alone,
                alone_gain=self.predictor.alone_gain,
                decode=self._decode,
                workers=self.predictor.workers,
                max_batch_size=self.limits.largest_batch,
                max_wait_s=self.limits.max_wait_s,
                report=self.metrics.batch,
                cost=self._cost,
                pool=self._decoders if self._shares_threads else None,
            )
        return self._batcher

    @property
    def num_inside(self) -> int:
        """Images admitted and not yet answered."""
        return self._num_inside

    def close(self) -> None:
        """Give up what is still inside."""
        for pool in (self._decoders, self._explainer, self._unpacker):
            pool.shutdown(wait=False, cancel_futures=True)
        if self._batcher is not None:
            self._batcher.close()

    def must_be_ready(self) -> Predictor:
        """Return the model, or raise NotReady or NotAlive where requests should go elsewhere."""
        if self.is_draining:
            raise NotReady("the service must not be ending. It is: ask another.")
        self.must_live()
        return self.predictor

    @property
    def is_ready(self) -> bool:
        """Whether requests should be sent here."""
        try:
            self.must_be_ready()
        except (NotReady, NotAlive):
            return False
        return True

    @property
    def is_alive(self) -> bool:
        """Whether anything will be answered any more."""
        try:
            self.must_live()
        except NotAlive:
            return False
        return True

    def must_live(self) -> None:
        """Raise NotAlive where nothing will be answered any more."""
        hung_after_s, problem = self.limits.hung_after_s, None
        if self._batcher is not None:
            problem = self._batcher.problem(hung_after_s)
        since = self._drawing_since
        if since is not None and time.monotonic() - since > hung_after_s:
            problem = f"an image has been explained for more than {hung_after_s:g} s"
        if problem is not None:
            raise NotAlive(f"{problem}. Restart the service.")

    async def apart(self, call: Callable[[], T], deadline: float) -> T:
        """Return what a call returns that would hold up all others; one runs at a time.

        Raises:
            Late: the deadline passed before its end; if before its beginning, it is left out.
        """
        came = time.monotonic()

        def unless_late() -> T:
            if time.monotonic() > deadline:
                raise Late.before_the_model(time.monotonic() - came)
            return call()

        try:
            async with asyncio.timeout_at(_loop_time(deadline)):
                return await asyncio.wrap_future(self._unpacker.submit(unless_late))
        except TimeoutError:
            raise _too_late() from None

    def predicted_s(self, num_images: int) -> float:
        """Return how long so many images on top of those inside would take; 0: not yet known."""
        return self._work_s(num_images) * self._slowness

    def _work_s(self, num_images: int) -> float:
        """Return the time of the model and of decoding, as if nothing else took any.

        The last image takes its own time, after that of those before it on all threads.
        """
        batcher = self.batcher
        before = self._num_inside + num_images - 1
        model_s = batcher.cost.seconds(before, batcher.max_batch_size) / batcher.workers
        decode_s = self._decode_s * before / self._num_cores
        wait_s = model_s + decode_s if self._shares_threads else max(model_s, decode_s)
        return wait_s + batcher.cost.seconds(1, batcher.max_batch_size) + self._decode_s

    @property
    def _shares_threads(self) -> bool:
        """Whether images are decoded by the model's threads.

        With a call for each core, more threads would only take the caches from each other.
        """
        return self.predictor.workers == self._num_cores > 1

    def _learn(self, work_s: float, seconds: float) -> None:
        """Compare what was predicted with what it took, which refusals and others add to.

        What is admitted just in time must not be late half of the time, so a high quantile is
        followed and not the mean.
        """
        if work_s > 0:
            is_slower = seconds > work_s * self._slowness
            step = _PUNCTUAL if is_slower else _PUNCTUAL - 1
            self._slowness = min(max(self._slowness * (1 + _LEARN * step), 0.5), _MAX_SLOWNESS)

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
        found = await self.answers(images, deadline)
        return [one if isinstance(one, Exception) else one.logits for one in found]

    async def answers(
        self, images: Sequence[bytes | Pixels], deadline: float, explain: bool = False
    ) -> list[Answer | Exception]:
        """Return what `logits` does, with a picture of each where it is to `explain`.

        A picture costs a second pass, so it is admitted as a second image; the predictor must have
        `maps`.
        """
        num_bytes = sum(len(x) if isinstance(x, bytes) else x.nbytes for x in images)
        places = len(images) * (2 if explain else 1)
        self.must_have_room(places, num_bytes, deadline)
        work_s, started = self._work_s(places), time.monotonic()
        # Then it may be sooner than others will be, which says only that too much is expected.
        came_alone = places == 1 and not self._num_inside
        self._num_inside += places
        self._bytes_inside += num_bytes
        try:
            found = await self._all(images, deadline, explain)
        except asyncio.CancelledError:
            self.metrics.refused("client_gone")
            raise
        finally:
            self._num_inside -= places
            self._bytes_inside -= num_bytes
        is_telling = not came_alone or self._slowness > 1
        if is_telling and not any(isinstance(one, ImageError | ModelError) for one in found):
            self._learn(work_s, time.monotonic() - started)
        for outcome in found:
            if isinstance(outcome, Late):
                self.metrics.refused("late")
            self.metrics.image(to_error(outcome)[0] if isinstance(outcome, Exception) else 200)
        return found

    async def _all(
        self, images: Sequence[bytes | Pixels], deadline: float, explain: bool
    ) -> list[Answer | Exception]:
        ends_at = _loop_time(deadline)
        if len(images) == 1:  # without a task of its own, which would cost more than this
            try:
                async with asyncio.timeout_at(ends_at):
                    return [await self._one(images[0], deadline, explain, at_once=True)]
            except TimeoutError:
                return [_too_late()]
            except Exception as error:  # noqa: BLE001  # the image's answer
                return [error]
        tasks = [asyncio.create_task(self._one(image, deadline, explain)) for image in images]
        try:
            async with asyncio.timeout_at(ends_at):
                await asyncio.gather(*tasks, return_exceptions=True)
        except TimeoutError:
            pass
        finally:
            for task in tasks:
                task.cancel()
        return [_outcome(task) for task in tasks]

    def must_have_room(self, num_images: int, num_bytes: int, deadline: float) -> None:
        """Raise Busy where images cannot be taken now, NotAlive where none will be answered."""
        self.must_live()
        limits, predicted = self.limits, self.predicted_s(num_images)
        left = deadline - time.monotonic()
        if self._num_inside + num_images > limits.max_inside:
            raise self.busy(
                f"at most {limits.max_inside} images may wait. Got {num_images} more. Retry later.",
                "queue_full",
                predicted / 2,
            )
        if self._bytes_inside and self._bytes_inside + num_bytes > limits.max_inside_bytes:
            raise self.busy(
                "the images that wait have too many bytes together. Retry later.",
                "bytes_full",
                predicted / 2,
            )
        if self._num_inside and predicted > left:
            raise self.busy(
                f"the answer must come within {max(left, 0):.3g} s. It would take about "
                f"{predicted:.3g} s. Retry later, or allow more time.",
                "deadline",
                predicted - left,
            )

    def busy(self, message: str, reason: str, wait_s: float) -> Busy:
        """Return a refusal, counted. `reason` is one of few words; whole seconds are sent."""
        self.metrics.refused(reason)
        return Busy(message, retry_after_s=max(1, math.ceil(wait_s)), reason=reason)

    async def _one(
        self, image: bytes | Pixels, deadline: float, explain: bool, at_once: bool = False
    ) -> Answer:
        if isinstance(image, bytes) and (explain or not self._shares_threads):
            image = await self._decoded(image, deadline)
        logits = await self.batcher.logits(image, deadline, at_once)
        if not explain or isinstance(image, bytes):
            return Answer(logits)
        draw = partial(self._draw, image, int(np.argmax(logits)), deadline)
        return Answer(logits, await asyncio.wrap_future(self._explainer.submit(draw)))

    async def _decoded(self, encoded: bytes, deadline: float) -> Pixels:
        """Decode in a thread once one is free; until then nothing but the caller holds the bytes.

        A decode that was given up goes on and keeps its thread: only its end frees that.
        """
        loop, came = asyncio.get_running_loop(), time.monotonic()
        await self._free_decoders.acquire()
        self.metrics.waited_to_decode(time.monotonic() - came)
        running = self._decoders.submit(self._decode, encoded, deadline)

        def free(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(self._free_decoders.release)

        running.add_done_callback(free)
        return await asyncio.wrap_future(running)

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
        self.metrics.decoded(seconds)
        return pixels

    def _draw(self, pixels: Pixels, class_index: int, deadline: float) -> bytes:
        if time.monotonic() > deadline:
            raise Late.before_the_model(time.monotonic() - deadline)
        model = self.predictor.maps
        if model is None:
            raise NotReady("the model must give its features to be explained. It does not.")
        self._drawing_since = time.monotonic()
        try:
            _, features = model.run(pixels[None])
            return heat_png(pixels, model.maps(features, [class_index])[0, 0])
        finally:
            self._drawing_since = None

    def _note_model(self, loaded: Future[Predictor]) -> None:
        if not loaded.cancelled() and loaded.exception() is None:
            self.metrics.model(loaded.result())

    def _add_gauges(self) -> None:
        def of_batcher(read: Callable[[Batcher], float]) -> Callable[[], float]:
            return lambda: 0.0 if self._batcher is None else read(self._batcher)

        gauge = self.metrics.gauge
        gauge("ready", "1 where requests should be sent.", lambda: self.is_ready)
        gauge("images_inside", "Images waiting or in work.", lambda: self._num_inside)
        gauge("bytes_arriving", "Of bodies being read.", lambda: self.arrivals.num_bytes)
        gauge("batch_max_images", "Most in a batch.", lambda: self.limits.largest_batch)
        gauge("queue_images", "Images waiting for the model.", of_batcher(lambda b: b.num_waiting))
        oldest = of_batcher(lambda batcher: batcher.oldest_s())
        gauge("queue_age_seconds", "How long the first of them has waited.", oldest)


def _loop_time(deadline: float) -> float | None:
    """Return a time of time.monotonic() on the clock of the running loop; None: infinity."""
    if deadline == math.inf:
        return None
    return asyncio.get_running_loop().time() + deadline - time.monotonic()


def _too_late() -> Late:
    return Late("the answer must come before its deadline. It did not. Allow more time.")


def _outcome(task: "asyncio.Task[Answer]") -> Answer | Exception:
    if not task.done() or task.cancelled():
        return _too_late()
    error = task.exception()
    return task.result() if error is None else cast(Exception, error)

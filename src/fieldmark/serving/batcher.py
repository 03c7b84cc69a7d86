"""Images from many requests meet in one queue and go through the model in batches.

Nothing runs until an image comes. Then the batcher waits at most `max_wait_s` for a batch to fill,
from its first image on, drops those whose client has gone or whose deadline has passed, and runs
the rest in a thread, which first decodes those that are still encoded. A batch that fails is run
again image by image, so that one image's failure is no other's.
"""

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from fieldmark.errors import ModelError
from fieldmark.measure import Predict
from fieldmark.preprocess import Pixels
from fieldmark.runtime import log
from fieldmark.serving.cost import BatchCost
from fieldmark.serving.replies import Late

Logits = npt.NDArray[np.float32]


@dataclass(eq=False, slots=True)
class Job:
    """One image on its way through the model."""

    image: bytes | Pixels
    deadline: float  # time.monotonic(); infinity: none
    answer: asyncio.Future[Logits]
    since: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What one batch was like."""

    num_images: int
    seconds: float
    waited_s: tuple[float, ...]  # of each image, in the queue
    failed: bool


class Batcher:
    """A queue in front of a model. All public methods belong to one event loop."""

    def __init__(
        self,
        predict: Predict,
        *,
        alone: Predict | None = None,
        alone_gain: float = 1.0,
        decode: Callable[[bytes, float], Pixels] | None = None,
        workers: int = 1,
        max_batch_size: int,
        max_wait_s: float = 0.0,
        report: Callable[[BatchReport], None] = lambda _: None,
        cost: BatchCost | None = None,
        pool: ThreadPoolExecutor | None = None,
    ) -> None:
        """Make a batcher, which is idle until an image comes.

        Args:
            predict: uint8 (B, H, W, 3) -> logits, float32 (B, num_classes); raises if one is not
                finite.
            alone: takes the place of `predict` for one image while no other waits or runs.
            alone_gain: how many times as fast that is.
            decode: an encoded image and its deadline -> uint8 (H, W, 3); None: none is encoded.
            workers: batches that run at once. What waits is shared among them, but for batches
                that are to fill.
            max_wait_s: how long a batch waits to fill, from its first image on. 0: whatever is
                there when the model is free, which on a CPU loses nothing.
            report: is told of each batch.
            cost: what is known of it; it goes on learning.
            pool: the threads that it runs in; None: its own.
        """
        self.cost = BatchCost() if cost is None else cost
        self.max_batch_size = max_batch_size
        self.workers = workers
        self._predict = predict
        self._alone, self._alone_gain = alone, alone_gain
        self._decode = decode
        self._max_wait_s = max_wait_s
        self._report = report
        self._pool = pool or ThreadPoolExecutor(workers, thread_name_prefix="model")
        self._crash: str | None = None
        self._changed = threading.Condition()  # of the queue; held for all that follows
        self._queue: deque[Job] = deque()
        self._num_turns = 0  # in the pool, waiting or running: at most as many as workers
        self._running_since: dict[int, float] = {}  # by thread
        self._num_running = 0

    def close(self) -> None:
        """Give up what waits."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def num_waiting(self) -> int:
        """Images in the queue."""
        return len(self._queue)

    @property
    def num_inside(self) -> int:
        """Images in the queue and in the model."""
        return len(self._queue) + self._num_running

    def oldest_s(self) -> float:
        """Return how long the first image in the queue has waited, in seconds."""
        with self._changed:
            return time.monotonic() - self._queue[0].since if self._queue else 0.0

    def problem(self, hung_after_s: float) -> str | None:
        """Return why no image will be answered any more, or None."""
        if self._crash is not None:
            return self._crash
        # Copied in one step of Python, so without the lock: each request asks.
        first = min(list(self._running_since.values()), default=math.inf)
        if time.monotonic() - first > hung_after_s:
            return f"the model has been busy with one batch for more than {hung_after_s:g} s"
        return None

    async def logits(self, image: bytes | Pixels, deadline: float, at_once: bool = False) -> Logits:
        """Return the logits of an image, float32 (num_classes,).

        Cancelled before its batch begins, the image is not computed.

        Args:
            image: uint8 (H, W, 3), or encoded where there is a `decode`.
            deadline: on the clock of time.monotonic().
            at_once: whether an idle model begins without a look at what comes at the same time.

        Raises:
            Late: the deadline passed before its batch began.
            ModelError: the model fails for this image, also alone.
            ImageError: what `decode` raises of it.
        """
        loop = asyncio.get_running_loop()
        job = Job(image, deadline, loop.create_future())
        with self._changed:
            self._queue.append(job)
            if len(self._queue) >= self.max_batch_size:
                self._changed.notify()
            is_turn = self._num_turns < self.workers
            self._num_turns += is_turn
        if is_turn and at_once:
            self._submit()
        elif is_turn:
            loop.call_soon(self._submit)  # what a request has goes together
        try:
            return await job.answer
        finally:
            job.image = b""  # given up, it may stay in the queue for long

    def _submit(self) -> None:
        with contextlib.suppress(RuntimeError):  # it is closed
            self._pool.submit(self._turn)

    def _turn(self) -> None:
        """Run a batch, in a thread, and then another while there are images.

        The next one needs no word from the event loop: until that comes, a core would be idle.
        """
        try:
            batch = self._next_batch()
            if batch:
                self._run(batch)
        except Exception as error:  # noqa: BLE001  # nobody else would hear of it
            self._has_crashed(error)
        with self._changed:
            if not self._queue:
                # In the same step as the last look at it: an image that comes next must find that
                # nobody works.
                self._num_turns -= 1
                return
        self._submit()  # behind others that wait for the same threads

    def _next_batch(self) -> list[Job]:
        """Return what runs next, on the way into the model; empty if all of it was given up."""
        batch: list[Job] = []
        late: list[Job] = []
        with self._changed:
            most = min(self.max_batch_size, -(-len(self._queue) // self.workers))
            if self._max_wait_s and self._queue:
                most = self.max_batch_size
                left = self._queue[0].since + self._max_wait_s - time.monotonic()
                self._changed.wait_for(lambda: len(self._queue) >= most, max(0.0, left))
            now = time.monotonic()
            while self._queue and len(batch) < most:
                job = self._queue.popleft()
                if not job.answer.done():  # else its client has gone
                    (late if job.deadline <= now else batch).append(job)
            if batch:
                self._num_running += len(batch)
                self._running_since[threading.get_ident()] = now
        for job in late:
            _tell(job, _settle, job, Late.before_the_model(now - job.since))
        return batch

    def _run(self, batch: list[Job]) -> None:
        try:
            done = self._compute(batch)
        finally:
            with self._changed:
                self._num_running -= len(batch)
                del self._running_since[threading.get_ident()]
        _tell(batch[0], self._deliver, batch, done)

    def _deliver(self, batch: list[Job], done: "_Done") -> None:
        """Take what a thread has done, on the event loop."""
        for job, answer in zip(batch, done.answers, strict=True):
            _settle(job, answer)
        try:
            if done.num_images and not done.failed:
                gain = self._alone_gain if done.alone else 1.0
                self.cost.add(done.num_images, done.seconds * gain)
            if done.num_images:
                waited = tuple(done.started - job.since for job in batch)
                self._report(BatchReport(done.num_images, done.seconds, waited, done.failed))
        except Exception as error:  # noqa: BLE001  # nobody else would hear of it
            self._has_crashed(error)

    def _has_crashed(self, error: Exception) -> None:
        self._crash = "what runs the model has crashed"
        log.warn(f"{self._crash}: {error!r}")

    def _compute(self, batch: list[Job]) -> "_Done":
        """Decode and run a batch, in a thread."""
        began = time.monotonic()
        decoded = [self._decoded(job) for job in batch]
        # Looked at again, as the others of the batch may have taken long to decode.
        images = [_if_wanted(job, image) for job, image in zip(batch, decoded, strict=True)]
        wanted = [
            (job, image)
            for job, image in zip(batch, images, strict=True)
            if not isinstance(image, Exception)
        ]
        started = time.monotonic()
        alone = self._alone if len(wanted) == self.num_inside == 1 else None
        found, failed = self._logits(wanted, alone or self._predict) if wanted else ([], False)
        seconds = time.monotonic() - started
        rest = iter(found)
        answers = [image if isinstance(image, Exception) else next(rest) for image in images]
        return _Done(answers, len(wanted), began, seconds, failed, alone is not None)

    def _decoded(self, job: Job) -> Pixels | Exception:
        image = job.image
        if job.answer.done():
            return _GivenUp()
        if not isinstance(image, bytes):
            return image
        if self._decode is None:
            raise AssertionError("an encoded image needs a decoder")
        try:
            return self._decode(image, job.deadline)
        except Exception as error:  # noqa: BLE001  # this image's answer and no other's
            return error

    def _logits(
        self, batch: list[tuple[Job, Pixels]], predict: Predict
    ) -> tuple[list[Logits | Exception], bool]:
        """Return for each image its logits or what went wrong, and whether the batch failed."""
        try:
            return list(predict(np.stack([image for _, image in batch]))), False
        except Exception as error:  # noqa: BLE001  # whatever a run time raises
            if len(batch) == 1:
                return [_as_model_error(error)], True
            log.warn(f"a batch of {len(batch)} images failed ({error}): each is run alone")
        answers: list[Logits | Exception] = []
        for job, image in batch:
            found = _if_wanted(job, image)
            if isinstance(found, Exception):
                answers.append(found)
            else:
                answers += self._logits([(job, image)], predict)[0]
        return answers, True


class _GivenUp(Exception):
    """Its client has gone; nobody gets this."""


@dataclass(frozen=True, slots=True)
class _Done:
    """What a thread made of a batch."""

    answers: list[Logits | Exception]
    num_images: int  # that reached the model
    started: float  # time.monotonic(), before any was decoded
    seconds: float  # in the model
    failed: bool
    alone: bool  # it was the only image inside


def _if_wanted(job: Job, decoded: Pixels | Exception) -> Pixels | Exception:
    """Return what was decoded of a job, or why the model need not see it."""
    if isinstance(decoded, Exception):
        return decoded
    now = time.monotonic()
    if job.answer.done():
        return _GivenUp()
    return Late.before_the_model(now - job.since) if job.deadline <= now else decoded


def _settle(job: Job, answer: Logits | Exception) -> None:
    if job.answer.done():
        return
    if isinstance(answer, Exception):
        job.answer.set_exception(answer)
    else:
        job.answer.set_result(answer)


def _tell(job: Job, call: Callable[..., None], *arguments: object) -> None:
    """Have the event loop of a job call something."""
    with contextlib.suppress(RuntimeError):  # it has ended
        job.answer.get_loop().call_soon_threadsafe(call, *arguments)


def _as_model_error(error: Exception) -> Exception:
    if isinstance(error, ModelError):
        return error
    log.warn(f"the model failed: {type(error).__name__}: {error}")
    failure = ModelError("the model failed for this image. The cause is in the service's log.")
    failure.__cause__ = error
    return failure

"""Images from many requests meet in one queue and go through the model in batches.

Nothing runs until an image comes. Then the batcher waits at most `max_wait_s` for a batch to fill,
from its first image on, drops those whose client has gone or whose deadline has passed, and runs
the rest in a thread. A batch that fails is run again image by image, so that one image's
failure is no other's.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import cast

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

    pixels: Pixels
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
    """A queue in front of a model. All methods belong to one event loop."""

    def __init__(
        self,
        predict: Predict,
        *,
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
            workers: batches that run at once.
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
        self._max_wait_s = max_wait_s
        self._report = report
        self._queue: deque[Job] = deque()
        self._is_full = asyncio.Event()
        self._pool = pool or ThreadPoolExecutor(workers, thread_name_prefix="model")
        self._working: set[asyncio.Task[None]] = set()
        self._running_since: dict[asyncio.Task[None], float] = {}
        self._num_running = 0
        self._crash: str | None = None

    def close(self) -> None:
        """Give up what waits."""
        for task in self._working:
            task.cancel()
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
        return time.monotonic() - self._queue[0].since if self._queue else 0.0

    def problem(self, hung_after_s: float) -> str | None:
        """Return why no image will be answered any more, or None."""
        if self._crash is not None:
            return self._crash
        now = time.monotonic()
        longest = max((now - since for since in self._running_since.values()), default=0.0)
        if longest > hung_after_s:
            return f"the model has been busy with one batch for more than {hung_after_s:g} s"
        return None

    async def logits(self, pixels: Pixels, deadline: float) -> Logits:
        """Return the logits of an image, float32 (num_classes,).

        Cancelled before its batch begins, the image is not computed.

        Args:
            pixels: uint8 (H, W, 3).
            deadline: on the clock of time.monotonic().

        Raises:
            Late: the deadline passed before its batch began.
            ModelError: the model fails for this image, also alone.
        """
        job = Job(pixels, deadline, asyncio.get_running_loop().create_future())
        self._queue.append(job)
        if len(self._queue) >= self.max_batch_size:
            self._is_full.set()
        if len(self._working) < self.workers:
            task = asyncio.create_task(self._work())
            self._working.add(task)
            task.add_done_callback(self._has_ended)
        return await job.answer

    async def _work(self) -> None:
        """Run batches while there are images."""
        me = cast("asyncio.Task[None]", asyncio.current_task())
        try:
            while self._queue:
                batch = await self._next_batch()
                if not batch:
                    continue
                self._running_since[me] = time.monotonic()
                self._num_running += len(batch)
                try:
                    await self._run(batch)
                finally:
                    self._num_running -= len(batch)
                    del self._running_since[me]
        finally:
            # In the same step as the last look at the queue: an image that comes next must find
            # that nobody works.
            self._working.discard(me)

    def _has_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and task.exception() is not None:
            self._crash = "what runs the model has crashed"
            log.warn(f"{self._crash}: {task.exception()!r}")

    async def _next_batch(self) -> list[Job]:
        """Return what runs next; empty if all of it has been given up."""
        closes = self._queue[0].since + self._max_wait_s
        left = closes - time.monotonic()
        if left > 0 and len(self._queue) < self.max_batch_size:
            self._is_full = asyncio.Event()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._is_full.wait(), left)
        batch: list[Job] = []
        now = time.monotonic()
        while self._queue and len(batch) < self.max_batch_size:
            job = self._queue.popleft()
            if job.answer.done():  # its client has gone
                continue
            if job.deadline <= now:
                job.answer.set_exception(Late.before_the_model(now - job.since))
                continue
            batch.append(job)
        return batch

    async def _run(self, batch: list[Job]) -> None:
        started = time.monotonic()
        found, failed = await self._compute([job.pixels for job in batch])
        seconds = time.monotonic() - started
        if not failed:
            self.cost.add(len(batch), seconds)
        for job, answer in zip(batch, found, strict=True):
            if job.answer.done():
                continue
            if isinstance(answer, Exception):
                job.answer.set_exception(answer)
            else:
                job.answer.set_result(answer)
        waited = tuple(started - job.since for job in batch)
        self._report(BatchReport(len(batch), seconds, waited, failed))

    async def _compute(self, images: list[Pixels]) -> tuple[list[Logits | Exception], bool]:
        """Return for each image its logits or what went wrong, and whether the batch failed."""
        run = asyncio.get_running_loop().run_in_executor
        try:
            return list(await run(self._pool, self._predict, np.stack(images))), False
        except Exception as error:  # noqa: BLE001  # whatever a run time raises
            if len(images) == 1:
                return [_as_model_error(error)], True
            log.warn(f"a batch of {len(images)} images failed ({error}): each is run alone")
        alone = [(await self._compute([image]))[0][0] for image in images]
        return alone, True


def _as_model_error(error: Exception) -> Exception:
    if isinstance(error, ModelError):
        return error
    log.warn(f"the model failed: {type(error).__name__}: {error}")
    failure = ModelError("the model failed for this image. The cause is in the service's log.")
    failure.__cause__ = error
    return failure

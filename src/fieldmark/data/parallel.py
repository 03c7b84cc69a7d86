"""Work spread over threads, results in order, with a bound on what is ahead."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from fieldmark.runtime.cpu import num_cores

Item = TypeVar("Item")
Result = TypeVar("Result")


def ordered_map(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    num_threads: int = 0,
    ahead: int = 3,
) -> Iterator[Result]:
    """Yield `function(item)` in the order of `items`, computed by a pool of threads.

    Decoding releases the interpreter's lock, so threads are enough. At most `ahead` results per
    thread wait to be taken. An exception of the function is raised at its place in the order.

    Args:
        num_threads: 0 for the cores this process may use.
    """
    count = num_threads or num_cores()
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(count, thread_name_prefix="fieldmark-images") as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > count * ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

"""Work done ahead in threads."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def mapped_ahead(
    function: Callable[[Item], Result], items: Iterable[Item], *, threads: int = 1, ahead: int = 1
) -> Generator[Result, None, None]:
    """`map(function, items)`, in order, with the next `ahead` results made in threads while the caller uses one.

    With one thread, `function` is called in the order of `items`, one call at a time. What it raises is raised here.

    >>> list(mapped_ahead(abs, [-1, 2, -3], threads=2))
    [1, 2, 3]
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="vitzoo-ahead")
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

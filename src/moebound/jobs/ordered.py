"""Work on many things at once, get the results in order, never hold more than a few."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], *, jobs: int
) -> Generator[Result, None, None]:
    """work(item) for each item, in threads; results come in the order of the items.

    At most `jobs` run at a time and at most jobs + 1 are begun but not yet handed out, so memory
    is that of jobs + 1 items whatever their number. The first exception of `work` is raised in
    its place in the order; what has not begun by then never does.
    """
    pending: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(jobs, thread_name_prefix="moebound") as pool:
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) > jobs:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

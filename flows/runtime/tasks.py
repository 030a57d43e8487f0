"""Submits many tasks of one kind with a bounded number in flight, and decides which failures are retried."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from prefect.futures import PrefectFuture, PrefectWrappedFuture

from model.config import ResourcesConfig
from storage.errors import SourceUnavailable, StoreUnavailable

Future = PrefectFuture[Any]
Item = TypeVar("Item")
POLL_SECONDS = 0.5


def worker_count(resources: ResourcesConfig) -> int:
    """How many tasks run at once: resources.workers, or one per core."""
    return resources.workers or (os.cpu_count() or 1)


def is_transient(error: object) -> bool:
    """Whether an error is transient: disk and network errors are, bad data is not."""
    return isinstance(error, OSError | StoreUnavailable | SourceUnavailable)


def retries(*delays: float) -> dict[str, Any]:
    """The options of a task that is retried after these delays (seconds) if its error is transient."""
    options = {"retries": len(delays), "retry_delay_seconds": list(delays), "retry_jitter_factor": 0.5}
    return options | {"retry_condition_fn": lambda _, __, state: is_transient(state.result(raise_on_failure=False))}


def in_window(
    items: Iterable[Item], submit: Callable[[Item], Future], window: int, on_poll: Callable[[], None] = lambda: None
) -> Iterator[tuple[Item, BaseException | None, Future]]:
    """Submit a task per item, `window` at once; calls `on_poll` while it waits. Yields item, error, future in order."""
    waiting = iter(items)
    pending: deque[tuple[Item, Future]] = deque()
    while True:
        pending.extend((item, submit(item)) for item in islice(waiting, window - len(pending)))
        if not pending:
            return
        item, future = pending.popleft()
        assert isinstance(future, PrefectWrappedFuture)  # true of every task runner in use
        while not future.wrapped_future.done():
            future.wait(POLL_SECONDS)
            on_poll()
        future.wait()
        error = None if future.state.is_completed() else future.state.result(raise_on_failure=False)
        yield item, error, future

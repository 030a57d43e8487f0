"""Submits many tasks of one kind with a bounded number in flight, and decides which failures are retried."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeVar

from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture, PrefectWrappedFuture

from model.config import ResourcesConfig
from storage.errors import SourceUnavailable, StoreUnavailable

Item = TypeVar("Item")
POLL_SECONDS = 0.5


def worker_count(resources: ResourcesConfig) -> int:
    """How many tasks run at once: resources.workers, or one per core."""
    return resources.workers or (os.cpu_count() or 1)


def is_transient(error: object) -> bool:
    """Whether an error is transient: disk and network errors are, bad data is not."""
    return isinstance(error, OSError | StoreUnavailable | SourceUnavailable)


def retry_if_transient(_task: Any, _run: Any, state: State[Any]) -> bool:
    """is_transient as Prefect's `retry_condition_fn`."""
    return is_transient(state.result(raise_on_failure=False))


def in_window(
    items: Iterable[Item],
    submit: Callable[[Item], PrefectFuture[Any]],
    window: int,
    on_poll: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Item, BaseException | None, PrefectFuture[Any]]]:
    """Submit a task for each item, at most `window` at once. Yields item, error or None, and future, in order.

    The window keeps every worker busy and the flow's memory small. `on_poll` is called every POLL_SECONDS of waiting.
    """
    waiting = iter(items)
    pending: deque[tuple[Item, PrefectFuture[Any]]] = deque()
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

"""Submits many tasks of one kind with a bounded number in flight, decides which failures are retried, and ends."""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture, PrefectWrappedFuture

from model.config import ResourcesConfig
from model.runs.job import OUT_OF_MEMORY
from storage.errors import SourceUnavailable, StoreUnavailable

Item = TypeVar("Item")
POLL_SECONDS = 0.5
STOP_SECONDS = 8.0  # for the tasks to end after a signal: Prefect expects a cancelled run to end within 10 s


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


@contextmanager
def ending() -> Iterator[None]:
    """End this process if the block hangs after SIGTERM or Ctrl-C. Only for work that can be repeated."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    has_ended = threading.Event()

    def watch() -> None:
        while (signum := os.read(reader, 1)) and signum[0] not in (signal.SIGTERM, signal.SIGINT):
            pass
        if signum and not has_ended.wait(STOP_SECONDS):
            _exit(128 + signum[0], "stopped; run the same command again to continue")
        os.close(reader)

    threading.Thread(target=watch, daemon=True).start()
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(-1)
        has_ended.set()
        os.close(writer)


def _on_unraisable(raised: Any) -> None:
    """End this process if a thread dies before it starts: whoever started it waits forever, Prefect included."""
    if issubclass(raised.exc_type, MemoryError):
        _exit(1, f"error: {OUT_OF_MEMORY}")
    sys.__unraisablehook__(raised)


def _exit(code: int, message: str) -> None:
    for child in multiprocessing.active_children():
        child.kill()
    os.write(2, f"{message}\n".encode())
    os._exit(code)


sys.unraisablehook = _on_unraisable  # at import, since a task runner's processes only import the tasks

"""Many tasks of one kind: a window of them in flight, and which of their failures are worth another try.

A window keeps every worker busy and the flow small.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture, PrefectWrappedFuture

from model.config import ResourcesConfig
from storage.errors import SourceUnavailable, StoreUnavailable

Asked = TypeVar("Asked")
LOOK_SECONDS = 0.5


def worker_count(resources: ResourcesConfig) -> int:
    """How many things at once `resources` asks for."""
    return resources.workers or (os.cpu_count() or 1)


def is_transient(error: object) -> bool:
    """Whether an error may be gone at the next try: what disk or network did, never bad data."""
    return isinstance(error, OSError | StoreUnavailable | SourceUnavailable)


def retry_if_transient(_task: Any, _run: Any, state: State[Any]) -> bool:
    """The same of a task's final state, as Prefect asks it."""
    return is_transient(state.result(raise_on_failure=False))


def in_window(
    asked: Iterable[Asked],
    submit: Callable[[Asked], PrefectFuture[Any]],
    window: int,
    look: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Asked, BaseException | None, PrefectFuture[Any]]]:
    """Submit each, at most `window` at once; yields each when it has ended, in order, and its error if it failed.

    `look` is called every LOOK_SECONDS while one is waited for.
    """
    pending: deque[tuple[Asked, PrefectWrappedFuture[Any, Any]]] = deque()

    def oldest() -> tuple[Asked, BaseException | None, PrefectFuture[Any]]:
        one, future = pending.popleft()
        while not future.wrapped_future.done():
            future.wait(LOOK_SECONDS)
            look()
        future.wait()
        return one, _error(future), future

    for one in asked:
        future = submit(one)
        assert isinstance(future, PrefectWrappedFuture)  # of every runner there is
        pending.append((one, future))
        if len(pending) >= window:
            yield oldest()
    while pending:
        yield oldest()


def _error(future: PrefectFuture[Any]) -> BaseException | None:
    if future.state.is_completed():
        return None
    error = future.state.result(raise_on_failure=False)
    return error if isinstance(error, BaseException) else RuntimeError(str(future.state.message))

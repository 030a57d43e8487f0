"""A stage's progress: on the page of its run, as artifacts, and as bars on a terminal or lines on another console."""

import logging
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import httpx
from prefect.logging import get_run_logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from flows.runtime.page import run_page
from storage.errors import printable

LINE_SECONDS = 15.0  # between plain lines
WAITS_SECONDS = (1, 2, 4, 8, 16, 32, 0)  # after each try: a restarted server answers within a minute

_make_record = logging.getLogRecordFactory()
_bars: ContextVar[Progress | None] = ContextVar("bars", default=None)  # None under a worker, which has no console


def _printable_record(*arguments: Any, **options: Any) -> logging.LogRecord:
    """A log record of any library, Prefect's included, that shows control characters as escapes."""
    record = _make_record(*arguments, **options)
    record.msg, record.args = printable(record.getMessage(), lines=True), ()
    if record.exc_info and record.exc_info[0]:
        record.exc_text = printable("".join(traceback.format_exception(*record.exc_info)), lines=True).rstrip()
    return record


logging.setLogRecordFactory(_printable_record)  # at import, since a task runner's processes only import the tasks


@contextmanager
def on_console(console: Console) -> Iterator[None]:
    """Show the progress of every stage on this console while the block lasts."""
    columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bars = Progress(*columns, TextColumn("{task.fields[note]}"), console=console)
    token = _bars.set(bars)
    try:
        with bars if console.is_terminal else nullcontext():
            yield
    finally:
        _bars.reset(token)


def say(stage: str, text: str) -> None:
    """Print one line on the console, if there is one, and write it to the flow run's log."""
    text = printable(text)
    get_run_logger().info("%s: %s", stage, text)
    run_page().enter(stage, text)
    if bars := _bars.get():
        bars.console.print(f"{stage:<10} {text}")


def show(create: Callable[..., Any], **arguments: Any) -> None:
    """Create an artifact with a function of prefect.artifacts, unless every request fails."""
    for wait in WAITS_SECONDS:
        try:
            create(**arguments)
            return
        except httpx.HTTPError as error:
            reason = error
            time.sleep(wait)
    get_run_logger().warning("artifact %r is not shown: Prefect's server failed: %s", arguments.get("key"), reason)


class Bar(AbstractContextManager["Bar"]):
    """A stage's progress from 0 to `total` of a unit, such as "shards". The end of the block removes the bar."""

    def __init__(self, stage: str, total: int, unit: str) -> None:
        self._stage, self._total, self._unit = stage, total, unit
        self._done, self._printed = 0, -1
        self._page = run_page()  # a callback in another thread has no context
        self._page.count(stage, 0, total, unit)
        self._printed_at = time.monotonic()
        self._bars = _bars.get() or Progress(console=Console(quiet=True))
        self._task = self._bars.add_task(stage, total=total, note=unit)

    def to(self, done: int, note: str = "") -> None:
        """Set the progress to `done`. On a terminal, the note replaces the unit after the bar."""
        self._done = done
        self._page.count(self._stage, done, self._total, self._unit)
        self._bars.update(self._task, completed=done, note=note or self._unit)
        now = time.monotonic()
        is_new = done != self._printed and now - self._printed_at > LINE_SECONDS
        if is_new and not self._bars.console.is_terminal:
            self._printed, self._printed_at = done, now
            self._bars.console.print(f"{self._stage:<10} {done:,} of {self._total:,} {self._unit}  {note}")

    def advance(self, count: int = 1) -> None:
        self.to(self._done + count)

    def __exit__(self, *_: object) -> None:
        self._bars.remove_task(self._task)

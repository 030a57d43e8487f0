"""How far a stage is: an artifact in Prefect's UI, a bar on a terminal, plain lines elsewhere. Decides nothing."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from prefect.artifacts import create_progress_artifact
from prefect.logging import get_run_logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from flows.runtime import artifacts

UPDATE_SECONDS = 1.0  # an artifact's update is a call of Prefect's API
LINE_SECONDS = 15.0  # between plain lines, where there is no terminal


class _Shown:
    """What the console shows, when there is one: set by `on_console`, and nothing under a worker."""

    console: Console | None = None
    bars: Progress | None = None


@contextmanager
def on_console(console: Console) -> Iterator[None]:
    """Show the progress of every stage on this console while the block lasts."""
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    _Shown.console = console
    try:
        if console.is_terminal:
            with Progress(*columns, console=console) as _Shown.bars:
                yield
        else:
            yield
    finally:
        _Shown.console, _Shown.bars = None, None


def say(stage: str, text: str) -> None:
    """One line for people: on the console, and in the flow run's log."""
    get_run_logger().info("%s: %s", stage, text)
    _print(stage, text)


def _print(stage: str, text: str) -> None:
    if _Shown.console is not None:
        _Shown.console.print(f"{stage:<10} {text}", highlight=False, markup=False)


class Bar:
    """A stage's progress from 0 to `total`."""

    def __init__(self, stage: str, total: int, what: str) -> None:
        self._stage, self._total, self._what = stage, total, what
        self._done = 0
        self._at = self._line_at = time.monotonic()
        self._artifact = artifacts.show(
            create_progress_artifact, progress=0.0, key=f"{stage}-progress", description=f"{stage}: {total:,} {what}"
        )
        self._sender = ThreadPoolExecutor(1)  # a busy server answers after seconds: the stage does not wait for it
        self._sent: Future[None] | None = None
        self._task: TaskID | None = None
        if _Shown.bars is not None:
            self._task = _Shown.bars.add_task(stage, total=total, note=what)

    def to(self, done: int, note: str = "") -> None:
        """Stand at `done` of `total`."""
        self._done = done
        if _Shown.bars is not None and self._task is not None:
            _Shown.bars.update(self._task, completed=done, note=note or self._what)
        now = time.monotonic()
        if now - self._at > UPDATE_SECONDS or done == self._total:
            self._at = now
            if self._sent is None or self._sent.done() or done == self._total:
                self._sent = self._sender.submit(self._send)
        if _Shown.console is not None and _Shown.bars is None and now - self._line_at > LINE_SECONDS:
            self._line_at = now
            _print(self._stage, f"{done:,} of {self._total:,} {self._what}  {note}")

    def advance(self) -> None:
        """One more is done."""
        self.to(self._done + 1)

    def _send(self) -> None:
        artifacts.replace(self._artifact, 100 * self._done / max(self._total, 1))

    def close(self) -> None:
        """Take the bar off the terminal; a line of `say` stands for the stage from now on."""
        self._sender.shutdown()  # the last number is on its way
        if _Shown.bars is not None and self._task is not None:
            _Shown.bars.remove_task(self._task)

"""Standard output and standard error that never raise and never block: text that cannot be written is dropped.

A reader may end (EPIPE) or stop reading, a terminal may close (EIO), a disk may be full (ENOSPC); training goes on.
"""

import io
import os
import select
import sys
from contextlib import suppress
from typing import Any

from storage.errors import printable

PATIENCE_SECONDS = 1.0  # for a slow reader; then text is dropped at once, until the reader reads again


def drop_failing_output() -> None:
    """Replace sys.stdout and sys.stderr of this process. A stream that was closed at the start stays None."""
    while os.open(os.devnull, os.O_RDWR) <= 2:
        pass  # else the next file takes the number of a closed stream, and C code writes its messages into it
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is not None:
            output = _LossyOutput(stream.fileno())
            setattr(sys, name, io.TextIOWrapper(output, stream.encoding, "backslashreplace", line_buffering=True))


def discard_output() -> None:
    """Write further output nowhere, since its reader, such as head, has ended: else Python fails when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(message: str, exit_code: int) -> int:
    """Print an error. Returns the exit code."""
    print(printable(message, lines=True), file=sys.stderr, flush=True)
    return exit_code


class _LossyOutput(io.FileIO):
    def __init__(self, descriptor: int) -> None:
        self._patience = PATIENCE_SECONDS
        with suppress(OSError):  # select finds a terminal writable that then blocks, so it is opened anew
            descriptor = os.open(os.ttyname(descriptor), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
        super().__init__(descriptor, "w", closefd=False)

    def write(self, data: Any, /) -> int:
        rest = data
        with suppress(OSError):
            while rest and select.select((), (self,), (), self._patience)[1]:
                # A writable pipe takes PIPE_BUF bytes without blocking. None: the terminal took nothing
                rest = rest[super().write(rest[: select.PIPE_BUF]) or len(rest) :]
            self._patience = 0.0 if rest else PATIENCE_SECONDS
        return len(data)

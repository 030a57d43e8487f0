"""Output that cannot be written neither ends nor blocks a process, and output that can be written arrives whole."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

WRITER = """
import sys
from pathlib import Path
from model.processes.output import drop_failing_output
drop_failing_output()
print("started", flush=True)
sys.stdin.read()
print("a long line " * 20_000, flush=True)
for number in range(3_000):
    print("a line of output", number, flush=True)
    print("an error", number, file=sys.stderr)
with Path(sys.argv[1]).open("w") as file:
    assert file.fileno() > 2
"""
Ends = tuple[int, Callable[[], object]]  # the descriptor to write to, and what happens after the first line


def _broken_pipe() -> Ends:
    reader, writer = os.pipe()
    return writer, lambda: (os.read(reader, 1), os.close(reader))


def _unread_pipe() -> Ends:
    reader, writer = os.pipe()
    return writer, lambda: os.read(reader, 1)


def _unread_terminal() -> Ends:
    terminal, name = os.openpty()
    return name, lambda: os.read(terminal, 1)


def _closed_terminal() -> Ends:
    terminal, name = os.openpty()
    return name, lambda: (os.read(terminal, 1), os.close(terminal))


def _full_disk() -> Ends:
    return os.open("/dev/full", os.O_WRONLY), lambda: None


@contextmanager
def writing(stdout: int | None, done: Path, *prefix: str) -> Iterator[subprocess.Popen[bytes]]:
    argv = [*prefix, sys.executable, "-c", WRITER, str(done)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.STDOUT) as process:
        yield process


@pytest.mark.parametrize("ends", [_broken_pipe, _unread_pipe, _unread_terminal, _closed_terminal, _full_disk])
def test_output_that_cannot_be_written_is_dropped(tmp_path: Path, ends: Callable[[], Ends]) -> None:
    stdout, after_first_line = ends()
    with writing(stdout, tmp_path / "done") as process, ExitStack() as stack:
        stack.callback(process.kill)
        os.close(stdout)
        after_first_line()
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait() == 0
        assert (tmp_path / "done").exists()


def test_a_process_without_output_runs(tmp_path: Path) -> None:
    with writing(None, tmp_path / "done", "sh", "-c", 'exec "$0" "$@" >&- 2>&-') as process:
        process.communicate()
    assert (process.returncode, (tmp_path / "done").exists()) == (0, True)


def test_a_slow_reader_gets_every_line(tmp_path: Path) -> None:
    with writing(subprocess.PIPE, tmp_path / "done") as process:
        written, _ = process.communicate()
    lines = written.decode().splitlines()
    assert len(lines) == 1 + 2 * 3_000 + 1
    assert lines[1] == "a long line " * 20_000

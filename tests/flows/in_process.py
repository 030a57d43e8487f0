"""The console called in this process: no second import of Prefect or torch, so a refusal takes milliseconds."""

import json
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from flows.console import cli


class Outcome(NamedTuple):
    """What a command left: its exit code and what it and its child processes printed."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err

    @property
    def error(self) -> str:
        """The message on stderr, without Prefect's log before it."""
        return self.err.rpartition("error: ")[2]

    @property
    def json_lines(self) -> list[Any]:
        assert self.code == 0, self.err
        return [json.loads(line) for line in self.out.splitlines()]


Gpt2 = Callable[..., Outcome]


@pytest.fixture
def gpt2(capfd: pytest.CaptureFixture[str]) -> Gpt2:
    """A function that runs `gpt2` with these arguments in a folder (by default the current one)."""

    def run(*argv: str, cwd: Path | str = ".") -> Outcome:
        capfd.readouterr()
        with chdir(cwd), pytest.raises(SystemExit) as exited:
            cli.main(list(argv))
        return Outcome(int(exited.value.code or 0), *capfd.readouterr())

    return run

"""A stand-in for the package of a tracker, without its dependencies, which may misbehave."""

import os
from pathlib import Path

# A stand-in for the package trackio, which is imported in its place. It appends each step to the file RUN.
STAND_IN = """
import os, pathlib, signal, time
{at_import}
class Run:
    def __init__(self, project, name, resume):
        assert (project, resume) == ("small-models", "allow")
        {at_start}
        self.file = pathlib.Path({folder!r}, name)
        self._next_step = len(self.file.read_text().split()) + 1 if self.file.exists() else 0
        self.finish = lambda: None
    def log(self, values, step):
        {at_step}
        with self.file.open("a") as file:
            file.write(str(step) + " ")
init = Run
"""
REACHED = "pathlib.Path({folder!r}, 'reached').touch(); "


def install(folder: Path, **code: str) -> None:
    """Write the stand-in, with code that runs at these places."""
    code = {place: (REACHED + line).format(folder=str(folder)) for place, line in code.items()}
    places = {"at_import": "", "at_start": "", "at_step": ""} | code
    (folder / "trackio.py").write_text(STAND_IN.format(folder=str(folder), **places))


def import_path(folder: Path) -> str:
    """The value of PYTHONPATH with which a process imports the stand-in of this folder."""
    return os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


def sent_steps(folder: Path, run: str) -> list[int]:
    """The steps that the stand-in got, in their order."""
    return [int(step) for step in (folder / run).read_text().split()]

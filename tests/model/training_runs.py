"""Trainings from outside: a store to train in, processes to kill, and what a run stores."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from model.__main__ import run_job
from model.checkpoints.records import WEIGHTS, CheckpointRecord, checkpoints, read_metrics
from model.config import RunConfig
from model.runs.job import put_job
from model.runs.run import pin_run, training_job
from storage.datasets.manifest import Manifest
from storage.keys import RunKeys
from storage.stores.opening import open_store
from storage.stores.store import Store
from tests.making import tiny_config
from tests.polling import poll
from tests.processes import kill, with_arguments

STEPS = 12
EXACT = ("step", "loss", "val_loss", "learning_rate", "gradient_norm", "skipped")
BATCH_TOKENS = 256  # steps of about 0.05 s: long enough to be killed in the middle
SHORT = ("train.batch_tokens=64", "train.validate_every_steps=0")


class StoredDataset(NamedTuple):
    """A sealed dataset in a store. Every test trains a run of its own on it."""

    store: Store
    source: str
    manifest: Manifest

    def config(self, run: str, *overrides: str) -> RunConfig:
        ours = [f"name={run}", f"train.batch_tokens={BATCH_TOKENS}", f"train.max_steps={STEPS}"]
        return tiny_config(self.store.url, self.source, *ours, *overrides)

    def put_job(self, run: str, *overrides: str) -> str:
        """Pin a run and store its training job. Returns the job's key."""
        return put_job(
            self.store, training_job(pin_run(self.store, self.config(run, *overrides), self.manifest.digest, None))
        )

    def train(self, run: str, *overrides: str) -> str:
        """Train a run in this process. Returns its name."""
        assert run_job(self.store.url, self.put_job(run, *overrides)) == 0
        return run

    def copy_without_runs(self, folder: Path) -> "StoredDataset":
        shutil.copytree(self.store.url, folder, ignore=shutil.ignore_patterns("runs"))
        return StoredDataset(open_store(str(folder)), self.source, self.manifest)


class Training:
    """`python -m model` for one job, in its own session, with its output in files."""

    def __init__(self, store: Store, job_key: str, ranks: int, folder: Path) -> None:
        self._store, self._job_key, self._folder = store, job_key, folder
        argv = [sys.executable, "-m", "model", store.url, job_key, "--processes", str(ranks)]
        with self._file("out").open("w") as out, self._file("err").open("w") as err:
            self._process = subprocess.Popen(argv, stdout=out, stderr=err, cwd=folder, start_new_session=True)

    def _file(self, name: str) -> Path:
        return self._folder / name

    def output(self) -> str:
        return self._file("out").read_text() + self._file("err").read_text()

    def errors(self) -> str:
        return self._file("err").read_text()

    def steps(self) -> list[int]:
        return [int(step) for step in re.findall(r"^step +(\d+)/", self._file("out").read_text(), re.MULTILINE)]

    def wait(self) -> int:
        return self._process.wait()

    def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait for the condition. Fails when the training ends first."""
        poll(lambda: condition() or self._process.poll() is not None, every_seconds=0.001)
        assert self._process.poll() is None, self.output()

    def send(self, signum: signal.Signals) -> None:
        os.killpg(self._process.pid, signum)

    def kill(self) -> None:
        """SIGKILL the process group and the ranks, which torchrun starts in sessions of their own."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        kill_all(self._store, self._job_key)


@contextmanager
def training(store: Store, job_key: str, ranks: int, folder: Path) -> Iterator[Training]:
    folder.mkdir(exist_ok=True)
    process = Training(store, job_key, ranks, folder)
    try:
        yield process
    finally:
        process.kill()


def processes_of(store: Store, job_key: str) -> list[int]:
    """The launcher and the ranks of a job, by their command-line arguments."""
    return with_arguments(store.url, job_key)


def kill_all(store: Store, job_key: str) -> None:
    kill(processes_of(store, job_key))
    poll(lambda: not processes_of(store, job_key), failure="a killed process still exists")


def history(store: Store, run: str) -> list[dict[str, Any]]:
    """The run's metrics without times, speed and memory, which differ between equal runs."""
    lines = [line.model_dump(include=set(EXACT)) for line in read_metrics(store, run)]
    assert [line["step"] for line in lines] == list(range(len(lines)))
    return lines


def losses(store: Store, run: str) -> list[float]:
    return [line["loss"] for line in history(store, run)]


def final_weights(store: Store, run: str, steps: int = STEPS) -> bytes | bytearray | memoryview:
    last = checkpoints(store, run)[-1]
    assert last.step == steps
    return store.read(RunKeys(run).checkpoint_file(last.step, last.attempt, WEIGHTS)).body


def assert_equal_runs(store: Store, run: str, other: str) -> None:
    assert history(store, run) == history(store, other)
    assert final_weights(store, run) == final_weights(store, other)


def copy_checkpoints(store: Store, run: str, other: str, last_step: int = STEPS) -> list[CheckpointRecord]:
    """Copy a run's checkpoints up to a step to another run. Returns the copies."""
    for listed in list(store.list(RunKeys(run).checkpoints)):
        name = listed.key.removeprefix(RunKeys(run).checkpoints)
        if int(name[:6]) <= last_step:
            store.put_new(RunKeys(other).checkpoints + name, store.read(listed.key).body)
    return checkpoints(store, other)


def modification_times(store: Store) -> dict[str, float]:
    return {listed.key: listed.modified for listed in store.list("")}

"""One training of two ranks over a real S3 server that survives a hundred SIGKILLs without loss.

    python tests/stress_training.py --kills 100 --server seaweedfs        (make stress)

The target and the moment of each SIGKILL are random, from the start of the processes to the n-th write of a save. Then
the same command resumes the run. After every kill the stored run must be intact and no process may be left. In the end
the metrics, the weights and the optimizer's state must equal those of an undisturbed run.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from unittest import mock

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from safetensors.torch import load

from model.checkpoints.records import CheckpointRecord, StepMetrics, checkpoints, read_segments
from model.runs.job import read_job, read_result
from storage.cache import host as host_cache
from storage.digests import sha256
from storage.keys import RunKeys
from storage.sources import reading
from storage.stores.opening import open_store
from storage.stores.store import Store
from tests import servers
from tests.making import build_dataset, document, tiny_config, write_parquet
from tests.model.training_runs import StoredDataset, Training, history, processes_of, training
from tests.polling import poll
from tests.proxy import Proxy, running_proxy

RANKS = 2
RUN, UNDISTURBED = "stressed", "undisturbed"
TARGETS = ("one rank", "all at once", "the launcher", "the upload")
STARTING_SECONDS = 6.0  # time to start the processes on two cores
EVERY_STEPS = 5
KEEP_LAST = 2
FURTHER_STEPS = 3 * EVERY_STEPS  # at most, before a process is killed
STEPS_A_KILL = 2 * EVERY_STEPS  # on average at most, or the run would end too early
STARTING = 0.25  # share of the kills that hit while the processes start
WRITES = 4 + 3  # of a save: metrics, weights, optimizer, record; then an old checkpoint's three deletions
END_SECONDS = 60.0  # until all processes of a job have ended after a kill of one
REST_SECONDS = 1200.0


class Figures(NamedTuple):
    """The counts of a stress run."""

    kills: Counter[str]
    cut_saves: int  # kills that left files of a checkpoint without its record
    steps: int
    made_steps: int


class Invariants:
    """Checks what must hold after every kill. Caches the metrics segments, which never change."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._segments: dict[str, list[StepMetrics]] = {}
        self._attempts: set[str] = set()
        self.step = 0
        self.cut_saves = 0

    def check(self) -> None:
        """The newest checkpoint can be loaded, with all metrics up to it."""
        records = checkpoints(self._store, RUN)
        steps = [record.step for record in records]
        assert (steps or [0])[-1] >= self.step, f"step {self.step} was saved, the checkpoints are now of steps {steps}"
        if records:
            self.step = steps[-1]
            self._load(records[-1])
        names = {
            listed.key.removeprefix(RunKeys(RUN).checkpoints) for listed in self._store.list(RunKeys(RUN).checkpoints)
        }
        attempts = {name.rpartition("/")[0] for name in names if "/" in name}  # 000005/0123456789ab
        assert len(records) == sum("/" not in name for name in names), f"a record without its files: {names}"
        self.cut_saves += any(int(attempt[:6]) > self.step for attempt in attempts - self._attempts)
        self._attempts |= attempts

    def _load(self, record: CheckpointRecord) -> None:
        for name, stated in record.files.items():
            key = RunKeys(RUN).checkpoint_file(record.step, record.attempt, name)
            body = self._store.read(key, stated.size_bytes).body
            assert sha256(body) == stated.sha256, key
            assert all(tensor.isfinite().all() for tensor in load(bytes(body)).values()), key
        for segment in record.metrics:
            if segment not in self._segments:
                self._segments[segment] = read_segments(self._store, [segment])
        lines = [line.step for segment in record.metrics for line in self._segments[segment]]
        assert lines == list(range(record.step)), f"step {record.step} has the metrics of steps {lines}"


class Killer:
    """Kills a process of a job at a random moment."""

    def __init__(self, store: Store, key: str, proxy: Proxy, chance: random.Random) -> None:
        self._store, self._key, self._proxy, self._chance = store, key, proxy, chance

    def kill(self, process: Training, last_step: int, began_at: int) -> str:
        """Kill once, at about `last_step` or earlier. Returns the target."""
        chance = self._chance
        target = chance.choice(TARGETS)
        further = min(chance.randint(0, FURTHER_STEPS), last_step - began_at)
        target_step = began_at + max(further, 1)
        starting = target != "the upload" and (further < 0 or chance.random() < STARTING)
        moment = time.monotonic() + chance.uniform(0, STARTING_SECONDS)
        process.wait_until(lambda: process.steps()[-1:] >= [target_step] or (starting and time.monotonic() >= moment))
        if target == "the upload":
            ranks, writes, first = self._ranks(), chance.randint(1, WRITES), len(self._proxy.requests)
            process.wait_until(lambda: self._writes_since(first) >= writes)
            _kill(ranks[0])
        elif target == "one rank":
            rank = chance.randrange(RANKS)
            process.wait_until(lambda: rank in self._ranks())
            _kill(self._ranks()[rank])
        elif target == "the launcher":
            _kill(*set(processes_of(self._store, self._key)) - set(self._ranks().values()))
        else:
            process.kill()
        return target

    def _ranks(self) -> dict[int, int]:
        """The pid of each rank, from the environment variables that torchrun sets."""
        pids = {}
        for process in processes_of(self._store, self._key):
            with suppress(OSError):
                variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
                pids |= {int(variable[5:]): process for variable in variables if variable.startswith(b"RANK=")}
        return pids

    def _writes_since(self, first: int) -> int:
        """The number of write requests of saves since then."""
        return sum(
            request.method in ("PUT", "DELETE")
            and RunKeys(RUN).prefix in request.path
            and RunKeys(RUN).progress not in request.path
            for request in self._proxy.requests[first:]
        )


def stress(server: servers.Server, folder: Path, kills: int, seed: int) -> Figures:
    """Train a run and kill it this many times. Fails when data are lost or wrong, or a process is left."""
    chance = random.Random(seed)
    dataset = _put_dataset(server, folder)
    steps = STEPS_A_KILL * kills + 4 * FURTHER_STEPS
    settings = (
        f"train.max_steps={steps}", "train.batch_tokens=128", "train.micro_batch_sequences=1",  # two a rank
        "train.validate_every_steps=50",
    )  # fmt: skip
    undisturbed_key = dataset.put_job(UNDISTURBED, *settings, "train.checkpoint_every_steps=1000")
    key = dataset.put_job(
        RUN, *settings, f"train.checkpoint_every_steps={EVERY_STEPS}", f"train.keep_last={KEEP_LAST}",
        "train.keep_every_steps=0",
    )  # fmt: skip
    kills_of, invariants, made_steps = Counter[str](), Invariants(dataset.store), 0
    with training(dataset.store, undisturbed_key, RANKS, folder / "undisturbed") as process:
        _wait_until_done(dataset.store, undisturbed_key, process)
    with running_proxy(server.endpoint, lambda _: None) as proxy:
        killer = Killer(dataset.store, key, proxy, chance)
        for number in range(kills + 1):
            place = folder / f"attempt-{number}"
            with (
                mock.patch.dict(os.environ, AWS_ENDPOINT_URL_S3=proxy.endpoint),  # for the child processes only
                training(dataset.store, key, RANKS, place) as process,
            ):
                if number == kills:
                    _wait_until_done(dataset.store, key, process)
                else:
                    kills_of[killer.kill(process, STEPS_A_KILL * (number + 1), invariants.step)] += 1
                    _wait_until_gone(dataset.store, key)
                    assert process.wait() != 0, process.output()
                made_steps += len(process.steps())
            invariants.check()
    _wait_until_gone(dataset.store, key)
    _compare(dataset.store, steps)
    return Figures(kills_of, invariants.cut_saves, steps, made_steps)


def _put_dataset(server: servers.Server, folder: Path) -> StoredDataset:
    """Create a store with a dataset on the server."""
    for index in range(2):
        write_parquet(folder / "source" / f"file_{index}.parquet", [document(index * 40 + at) for at in range(40)])
    source = str(folder / "source" / "*.parquet")
    url = f"s3://{servers.BUCKET}/training-{folder.name}"
    return StoredDataset(open_store(url, create=True), source, build_dataset(tiny_config(url, source)))


def _wait_until_done(store: Store, key: str, process: Training) -> None:
    """Wait until the job is done."""
    job = read_job(store, key)
    poll(lambda: read_result(store, job) or not processes_of(store, key), REST_SECONDS, failure="the job is not done")
    assert process.wait() == 0, process.output()


def _wait_until_gone(store: Store, key: str) -> None:
    poll(lambda: not processes_of(store, key), END_SECONDS, failure=f"a process outlives a killed one: {key}")


def _kill(*processes: int) -> None:
    for process in processes:
        os.kill(process, signal.SIGKILL)


def _compare(store: Store, steps: int) -> None:
    """Assert that the run has finished and equals the undisturbed one in its metrics and last checkpoint."""
    for run in (RUN, UNDISTURBED):
        assert [line["step"] for line in history(store, run)] == list(range(steps))
    assert history(store, RUN) == history(store, UNDISTURBED)
    ours, theirs = checkpoints(store, RUN), checkpoints(store, UNDISTURBED)
    assert ours[-1].step == theirs[-1].step == steps
    assert ours[-1].files == theirs[-1].files  # names, sizes and sha256s
    assert len(ours) == KEEP_LAST


def main() -> None:
    """Run the stress test against a new server and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--server", choices=["seaweedfs", "minio"], default="seaweedfs")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        host_cache.FOLDER, reading.REMEMBERED = Path(name) / "cache", Path(name) / "digests"
        server = servers.start(options.server, Path(name) / "server")
        os.environ |= server.environment | {"HOME": name}
        try:
            started = time.monotonic()
            figures = stress(server, Path(name), options.kills, options.seed)
        finally:
            server.stop()
    print(f"{options.server}, seed {options.seed}: {figures.kills.total()} kills of a run of {figures.steps:,} steps "
          f"on {RANKS} ranks ({figures.made_steps:,} steps run), {figures.cut_saves} between the files of a save, "
          f"{time.monotonic() - started:.0f} s; "
          f"no data lost or wrong: {dict(figures.kills)}")  # fmt: skip


if __name__ == "__main__":
    main()

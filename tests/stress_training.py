"""One training of two ranks over a real S3 server, killed a hundred times, and the proof that nothing of it is lost.

    python tests/stress_training.py --kills 100 --server seaweedfs        (make stress)

Each SIGKILL has a target and a moment that are drawn, from the start of the processes to the n-th write of a save;
afterwards the same command goes on. After every kill what the run is known by must be whole and no process be left; in
the end all numbers, the weights and the optimizer's state must be those of a run that nobody has disturbed.
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
from typing import Any, NamedTuple
from unittest import mock

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from safetensors.torch import load

from model.checkpoints.records import CheckpointRecord, checkpoints, read_segments
from model.runs.job import read_job, read_result
from storage.cache import host as host_cache
from storage.digests import sha256
from storage.keys import RunKeys
from storage.sources import identity
from storage.stores.opening import open_store
from storage.stores.store import Store, read_json
from tests import servers
from tests.making import build_dataset, document, tiny_config, write_parquet
from tests.model.training_runs import House, Training, history, processes_of, training, until
from tests.proxy import Proxy, spoiling

RANKS = 2
RUN, CALM = "stressed", "undisturbed"
TARGETS = ("one rank", "all at once", "the launcher", "the upload")
STARTING_SECONDS = 6.0  # in which the processes start on two cores
EVERY_STEPS = 5
KEEP_LAST = 2
FURTHER_STEPS = 3 * EVERY_STEPS  # which a process makes at most before it is killed
STEPS_A_KILL = 2 * EVERY_STEPS  # and no more on average, or the run would end too early
STARTING = 0.25  # of the kills come while the processes start
WRITES = 5 + 3  # of a save: metrics, weights, optimizer, record, latest; and an old checkpoint's three objects go
END_SECONDS = 60.0  # in which all processes of a job are gone after a kill of one
REST_SECONDS = 1200.0


class Figures(NamedTuple):
    """What happened."""

    kills: Counter[str]
    cut_saves: int  # kills that left files of a checkpoint without its record
    stale: int  # kills that left `latest` one checkpoint behind
    steps: int
    made_steps: int


class Proof:
    """What must hold after every kill; remembers the segments of metrics, which never change."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._segments: dict[str, list[dict[str, Any]]] = {}
        self._attempts: set[str] = set()
        self.step = 0
        self.cut_saves = self.stale = 0

    def check(self) -> None:
        """The newest checkpoint, and that which `latest` names, can be loaded, with all numbers up to it."""
        there = checkpoints(self._store, RUN)
        steps = [record.step for record in there]
        assert (steps or [0])[-1] >= self.step, f"step {self.step} was saved, the newest is now of {steps}"
        latest: dict[str, Any] | None = read_json(self._store, RunKeys(RUN).latest)  # type: ignore[assignment]
        assert latest is not None or len(there) <= 1, f"no latest, but checkpoints of {steps}"
        if there:
            self.step = steps[-1]
            self._load(there[-1])
        if latest is not None and latest["step"] != self.step:
            self.stale += 1
            assert latest["step"] == steps[-2], f"latest is {latest}, the checkpoints are {steps}"
            self._load(CheckpointRecord(**read_json(self._store, latest["record"])))  # type: ignore[arg-type]
        names = {
            listed.key.removeprefix(RunKeys(RUN).checkpoints) for listed in self._store.list(RunKeys(RUN).checkpoints)
        }
        begun = {name.rpartition("/")[0] for name in names if "/" in name}  # 000005/0123456789ab
        assert len(there) == sum("/" not in name for name in names), f"a record without its files: {names}"
        self.cut_saves += any(int(attempt[:6]) > self.step for attempt in begun - self._attempts)
        self._attempts |= begun

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
        assert lines == list(range(record.step)), f"step {record.step} has the numbers of steps {lines}"


class Killer:
    """Waits for a moment in a job's life and kills a part of it."""

    def __init__(self, store: Store, key: str, proxy: Proxy, chance: random.Random) -> None:
        self._store, self._key, self._proxy, self._chance = store, key, proxy, chance

    def kill(self, process: Training, last_step: int, began_at: int) -> str:
        """Kill once, at a moment not after `last_step` or little later. Returns what was killed."""
        chance = self._chance
        target = chance.choice(TARGETS)
        further = min(chance.randint(0, FURTHER_STEPS), last_step - began_at)
        wanted = began_at + max(further, 1)
        starting = target != "the upload" and (further < 0 or chance.random() < STARTING)
        moment = time.monotonic() + chance.uniform(0, STARTING_SECONDS)
        process.until(lambda: process.steps()[-1:] >= [wanted] or (starting and time.monotonic() >= moment))
        if target == "the upload":
            ranks, writes, first = self._ranks(), chance.randint(1, WRITES), len(self._proxy.seen)
            process.until(lambda: self._writes_since(first) >= writes)
            _kill(ranks[0])
        elif target == "one rank":
            rank = chance.randrange(RANKS)
            process.until(lambda: rank in self._ranks())
            _kill(self._ranks()[rank])
        elif target == "the launcher":
            _kill(*set(processes_of(self._store, self._key)) - set(self._ranks().values()))
        else:
            process.kill()
        return target

    def _ranks(self) -> dict[int, int]:
        """The process of each rank, by the environment that torchrun has given it."""
        found = {}
        for process in processes_of(self._store, self._key):
            with suppress(OSError):
                words = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
                found |= {int(word[5:]): process for word in words if word.startswith(b"RANK=")}
        return found

    def _writes_since(self, first: int) -> int:
        """How many writes of saves were begun."""
        return sum(
            request.method in ("PUT", "DELETE")
            and RunKeys(RUN).prefix in request.path
            and RunKeys(RUN).progress not in request.path
            for request in self._proxy.seen[first:]
        )


def stress(server: servers.Server, folder: Path, kills: int, seed: int) -> Figures:
    """Train a run while it is killed so often. Fails when anything is lost, wrong or left behind."""
    chance = random.Random(seed)
    house = _house(server, folder)
    steps = STEPS_A_KILL * kills + 4 * FURTHER_STEPS
    settings = (
        f"train.max_steps={steps}", "train.batch_tokens=128", "train.micro_batch_sequences=1",  # two a rank
        "train.validate_every_steps=50",
    )  # fmt: skip
    calm = house.ask(CALM, *settings, "train.checkpoint_every_steps=1000")
    key = house.ask(
        RUN, *settings, f"train.checkpoint_every_steps={EVERY_STEPS}", f"train.keep_last={KEEP_LAST}",
        "train.keep_every_steps=0",
    )  # fmt: skip
    happened, proof, made = Counter[str](), Proof(house.store), 0
    with training(house.store, calm, RANKS, folder / "undisturbed") as process:
        _to_the_end(house.store, calm, process)
    with spoiling(server.endpoint, lambda _: None) as proxy:
        killer = Killer(house.store, key, proxy, chance)
        for number in range(kills + 1):
            place = folder / f"attempt-{number}"
            with (
                mock.patch.dict(os.environ, AWS_ENDPOINT_URL_S3=proxy.endpoint),  # the processes', not this one's
                training(house.store, key, RANKS, place) as process,
            ):
                if number == kills:
                    _to_the_end(house.store, key, process)
                else:
                    happened[killer.kill(process, STEPS_A_KILL * (number + 1), proof.step)] += 1
                    _gone(house.store, key)
                    assert process.wait() != 0, process.said()
                made += len(process.steps())
            proof.check()
    _gone(house.store, key)
    _compare(house.store, steps)
    return Figures(happened, proof.cut_saves, proof.stale, steps, made)


def _house(server: servers.Server, folder: Path) -> House:
    """A new store on the server, with a dataset."""
    for index in range(2):
        write_parquet(folder / "source" / f"file_{index}.parquet", [document(index * 40 + at) for at in range(40)])
    source = str(folder / "source" / "*.parquet")
    url = f"s3://{servers.BUCKET}/training-{folder.name}"
    return House(open_store(url, create=True), source, build_dataset(tiny_config(url, source)))


def _to_the_end(store: Store, key: str, process: Training) -> None:
    """Wait until the job is done."""
    job = read_job(store, key)
    until(lambda: read_result(store, job) or not processes_of(store, key), "it does not end", REST_SECONDS)
    assert process.wait() == 0, process.said()


def _gone(store: Store, key: str) -> None:
    until(lambda: not processes_of(store, key), f"a process outlives a kill of another: {key}", END_SECONDS)


def _kill(*processes: int) -> None:
    for process in processes:
        os.kill(process, signal.SIGKILL)


def _compare(store: Store, steps: int) -> None:
    """The run is finished, and is the undisturbed one in all its numbers and in every bit of its last checkpoint."""
    for run in (RUN, CALM):
        assert [line["step"] for line in history(store, run)] == list(range(steps))
    assert history(store, RUN) == history(store, CALM)
    ours, theirs = checkpoints(store, RUN), checkpoints(store, CALM)
    assert ours[-1].step == theirs[-1].step == steps
    assert ours[-1].files == theirs[-1].files  # names, sizes and sha256s
    assert (read_json(store, RunKeys(RUN).latest) or {})["step"] == steps
    assert len(ours) == KEEP_LAST


def main() -> None:
    """Start a server, train on it under kills, print the figures."""
    asked = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    asked.add_argument("--kills", type=int, default=100)
    asked.add_argument("--server", choices=["seaweedfs", "minio"], default="seaweedfs")
    asked.add_argument("--seed", type=int, default=int(time.time()))
    words = asked.parse_args()
    with tempfile.TemporaryDirectory() as name:
        host_cache.FOLDER, identity.REMEMBERED = Path(name) / "cache", Path(name) / "digests"
        server = servers.start(words.server, Path(name) / "server")
        os.environ |= server.environment | {"HOME": name}
        try:
            started = time.monotonic()
            found = stress(server, Path(name), words.kills, words.seed)
        finally:
            server.stop()
    print(f"{words.server}, seed {words.seed}: {found.kills.total()} kills of a run of {found.steps:,} steps on "
          f"{RANKS} ranks ({found.made_steps:,} steps made), {found.cut_saves} of them within a save's files, "
          f"{found.stale} before latest, {time.monotonic() - started:.0f} s; "
          f"nothing lost, nothing wrong: {dict(found.kills)}")  # fmt: skip


if __name__ == "__main__":
    main()

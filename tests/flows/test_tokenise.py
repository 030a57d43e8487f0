"""Tokenising under Prefect: the same bytes under every runner, and only missing shards are built."""

import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prefect import task

from flows import tokenise
from flows.handoffs import Downloaded
from flows.inspection.status import dataset_status
from flows.pretrain import build_dataset
from flows.runtime import settle
from model import tokenizer
from model.config import ResourcesConfig, RunConfig
from model.runs.job import JobFailed
from model.runs.run import pin_run
from storage.datasets.manifest import read_manifest
from storage.datasets.plan import ShardJob
from storage.datasets.records import Record, delete_shard
from storage.errors import DatasetMismatch, SourceInvalid, SourceUnavailable
from storage.keys import DatasetKeys
from storage.stores.opening import open_store
from storage.stores.store import Store
from tests.flows.client import shard_runs
from tests.making import build_dataset as build_without_prefect
from tests.making import document, published, settings_of, tiny_config, write_parquet
from tests.polling import poll
from tests.processes import family, kill, listening, matching, parent

pytestmark = pytest.mark.usefixtures("api")


@task
def nothing() -> None:
    pass


def opened(config: RunConfig) -> Store:
    return open_store(config.store_url)


def shard_tasks_of_next_build(api: str, config: RunConfig) -> int:
    """The number of shard tasks that one more build starts, from Prefect's records of its flow."""
    since = datetime.now(UTC)
    build_dataset(config)
    settle.wait_for_task_runs(since, 60)
    return len(shard_runs(api, {"start_time": {"after_": since.isoformat()}}))


def test_a_lost_shard_of_an_unreachable_source_is_not_called_unrecoverable(config: RunConfig) -> None:
    manifest, store = build_without_prefect(config), opened(config)
    run = pin_run(store, config, manifest.digest, None)
    delete_shard(store, "small", manifest.shard_ids[-1])
    for failed, kind in ((["the Hub did not respond"], SourceUnavailable), ([], DatasetMismatch)):
        with pytest.raises(kind) as caught:
            tokenise._repair(store, config, run, Downloaded([], {}, None, failed))
        assert ("Restore" in str(caught.value)) == (kind is DatasetMismatch)


@pytest.mark.parametrize(
    ("runner", "workers"),
    [
        ("threads", 2),
        *(pytest.param("threads", workers, marks=pytest.mark.full) for workers in (1, 7)),
        ("processes", 2),
        ("dask", 2),
    ],
)
def test_every_runner_gives_the_same_token_stream(tmp_path: Path, source: str, runner: str, workers: int) -> None:
    config = tiny_config(str(tmp_path / "store"), source, f"resources.runner={runner}", f"resources.workers={workers}")
    store, digest = open_store(config.store_url, create=True), build_dataset(config)
    manifest = read_manifest(store, "small", digest)
    stream = b"".join(store.read(DatasetKeys("small").shard(row.shard_id)).body for row in manifest.rows())
    texts = [text for path in sorted(Path(source).parent.iterdir()) for text in pq.read_table(path)["text"].to_pylist()]
    encoding = published()
    expected = np.array([i for text in texts for i in (tokenizer.EOT, *encoding.encode_ordinary(text))], np.uint16)
    assert stream == expected.tobytes()
    assert build_without_prefect(tiny_config(str(tmp_path / "serial"), source)).digest == digest


def test_a_second_build_runs_no_job_and_seals_no_version(api: str, config: RunConfig) -> None:
    build_dataset(config)
    pointer = opened(config).read(DatasetKeys("small").latest)
    assert shard_tasks_of_next_build(api, config) == 0
    assert opened(config).read(DatasetKeys("small").latest) == pointer


def test_one_lost_record_is_one_job(api: str, config: RunConfig) -> None:
    digest = build_dataset(config)
    store = opened(config)
    store.delete(DatasetKeys("small").record(read_manifest(store, "small", digest).shard_ids[3]))
    assert shard_tasks_of_next_build(api, config) == 1
    assert build_dataset(config) == digest


def test_a_bad_document_fails_its_shard_and_leaves_the_others(tmp_path: Path, api: str) -> None:
    texts: list[str | None] = [document(number) for number in range(90)]
    texts[31] = None
    path = tmp_path / "bad.parquet"
    pq.write_table(pa.table({"text": texts}), path, write_statistics=False)  # so that no footer shows the null
    config = tiny_config(str(tmp_path / "store"), str(path))
    with pytest.raises(SourceInvalid, match="row 31"):
        build_dataset(config)
    store = opened(config)
    assert [line.error for line in dataset_status(store, "small") if "row 31" in line.error]
    kept = {listed.key for listed in store.list(DatasetKeys("small").shards) if listed.key.endswith(".bin")}
    assert len(kept) > 3
    assert list(store.list(DatasetKeys("small").prefix + "manifests/")) == []


def test_grouped_shards_give_the_same_manifest(api: str, tmp_path: Path, source: str) -> None:
    grouped = tiny_config(str(tmp_path / "store"), source, "resources.shards_per_task=2")
    assert shard_tasks_of_next_build(api, grouped) == 4  # two of each file, which has three shards
    single = build_without_prefect(tiny_config(str(tmp_path / "single"), source))
    assert build_dataset(grouped) == single.digest


def test_too_few_shards_for_the_split_is_refused(tmp_path: Path, source: str) -> None:
    with pytest.raises(ValueError, match=r"data\.val_shards = 500"):
        build_dataset(tiny_config(str(tmp_path / "store"), source, "data.val_shards=500"))


@pytest.mark.parametrize(("error", "tries"), [(OSError("the disk"), 3), (SourceInvalid("the data"), 1)])
def test_transient_errors_are_retried_and_bad_data_is_not(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, error: Exception, tries: int
) -> None:
    tries_of: Counter[str] = Counter()
    is_finished = tokenise.is_finished

    def failing(store: Store, dataset: str, shard_id: str) -> bool:
        tries_of[shard_id] += 1
        if shard_id == min(tries_of):
            raise error
        return is_finished(store, dataset, shard_id)

    monkeypatch.setattr(tokenise, "is_finished", failing)
    at_once = tokenise.tokenise_shards.with_options(retry_delay_seconds=0)
    monkeypatch.setattr(tokenise, "tokenise_shards", at_once)
    with pytest.raises(type(error)):
        build_dataset(config.model_copy(update={"resources": ResourcesConfig(workers=1)}))
    assert tries_of.pop(min(tries_of)) == tries
    assert set(tries_of.values()) == {1}


ASK = b"GET /info/main/workers.html HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


def answer(port: int, tls: ssl.SSLContext | None) -> bytes:
    """The first bytes that a server sends to a client without a certificate."""
    with suppress(OSError), ExitStack() as stack:
        connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), 10))
        if tls:
            connection = stack.enter_context(tls.wrap_socket(connection))
        connection.sendall(ASK)
        return connection.recv(100)
    return b""


@pytest.mark.full
def test_a_local_dask_cluster_serves_only_its_own_processes() -> None:
    """A cluster runs whatever code a client sends."""
    tls = ssl.create_default_context()
    tls.check_hostname, tls.verify_mode = False, ssl.CERT_NONE
    before = listening(family(os.getpid()))
    with tokenise.task_runner(ResourcesConfig(runner="dask", workers=1)) as runner:
        (future := runner.submit(nothing, {})).wait()
        assert future.state.is_completed()
        ports = listening(family(os.getpid())) - before
        assert len(ports) >= 3  # of the scheduler, a worker and its nanny
        for address, port in ports:
            assert address == "127.0.0.1"
            for answered in (answer(port, None), answer(port, tls)):
                assert answered == b"" or b" 404 " in answered, answered


def spawned(folder: Path) -> bool:
    """Whether the process is a worker of one of this process's pools."""
    return parent(folder) == os.getpid() and b"spawn_main" in (folder / "cmdline").read_bytes()


@pytest.mark.full
def test_a_killed_worker_process_costs_only_its_current_shard(tmp_path: Path) -> None:
    texts = [document(number, 2_000) for number in range(300)]
    source = write_parquet(tmp_path / "source" / "file.parquet", texts)
    settings = ("resources.runner=processes", "resources.workers=2", "data.shard_tokens=5000")
    config = tiny_config(str(tmp_path / "store"), str(source), *settings)
    folder = tmp_path / "store" / "datasets" / "small" / "shards"
    before: dict[Path, int] = {}

    def kill_one() -> None:
        poll(lambda: len(list(folder.glob("*.json"))) > 5)
        before.update({path: path.stat().st_mtime_ns for path in folder.glob("*.json")})
        kill(matching(spawned)[:1])

    killer = threading.Thread(target=kill_one)
    killer.start()
    digest = build_dataset(config)
    killer.join()
    assert len(before) < len(read_manifest(open_store(config.store_url), "small", digest).shard_ids)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    serial = tiny_config(str(tmp_path / "serial"), str(source), "data.shard_tokens=5000")
    assert build_without_prefect(serial).digest == digest


def test_pools_that_keep_breaking_fail_with_a_remedy(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise BrokenProcessPool("a child process terminated abruptly")

    monkeypatch.setattr(tokenise, "_run_jobs", broken)
    with pytest.raises(JobFailed, match=r"3 process pools.*resources.workers=1"):
        build_dataset(config)


def test_a_shard_without_memory_fails_in_words_and_leaves_the_others(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = tokenise.build_shard

    def build_with_less_memory(store: Store, dataset: str, job: ShardJob, *rest: Any) -> Record:
        if job.name.startswith("file_1-00001"):
            raise MemoryError
        return build(store, dataset, job, *rest)

    monkeypatch.setattr(tokenise, "build_shard", build_with_less_memory)
    with pytest.raises(JobFailed, match=r"rows 15 to 29 of 'file_1.parquet': memory ran out.*resources.workers=1"):
        build_dataset(config)
    assert [line.error for line in dataset_status(opened(config), "small") if "memory ran out" in line.error]
    monkeypatch.undo()
    assert build_dataset(config)


# Under a memory limit a thread may die before it starts: its starter then waits forever, such as a thread of Prefect.
STALLS = {  # os.write: two threads would mix what they print
    "thread": "thread = threading.Thread()\nthread._bootstrap = lambda: [0] * 2**60\nthread.start()\n",
    "shard": "os.write(1, b'stalled\\n')\nthreading.Event().wait()\n",
}


@pytest.mark.parametrize(
    ("stall", "signum", "code", "word"),
    [
        ("thread", None, 1, "memory ran out"),
        ("shard", signal.SIGTERM, 143, "stopped"),
        ("shard", signal.SIGINT, 130, "stopped"),
    ],
)
def test_a_stalled_build_ends(config: RunConfig, stall: str, signum: int | None, code: int, word: str) -> None:
    overrides = [word for setting in settings_of(config) for word in ("--set", setting)]
    body = "".join(f"    {line}\n" for line in STALLS[stall].splitlines())
    script = (
        "import os, sys, threading\nfrom flows import tokenise\nfrom flows.console import cli\n"
        "from flows.runtime import ending\nending.STOP_SECONDS = 1\nbuild = tokenise.build_shard\n"
        f"def stall(*arguments):\n{body}    return build(*arguments)\n"
        "tokenise.build_shard = stall\ncli.main(['dataset', 'build', *sys.argv[1:]])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, *overrides], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            if signum:
                assert any("stalled" in line for line in process.stdout)  # two threads may share a line
                process.send_signal(signum)
            _, error = process.communicate()
        finally:
            process.kill()
    assert process.returncode == code
    assert word in error

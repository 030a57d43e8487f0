"""130,000 shards of 2,400 source files, simulated: seconds and peak memory of the flow process; prints one table.

    python tests/benchmarks/orchestration/bench_scale.py [--shards 130000] [--files 2400] [--server postgresql|sqlite]

As many as all of FineWeb-Edu gives. A stand-in serves tiny parquet files whose `token_count` column fills a shard with
every row. All that runs is real (the verb, the flow, the tasks, the store in a folder, the Prefect server, PostgreSQL)
but for one function: instead of tokenising 10 million tokens a job puts a shard of a few, and a record as long as a
real one. The stand-in, the server and the database share the processors with the flow; Linux only. PostgreSQL is
Debian's, in a temporary folder (`apt install postgresql`); TMPDIR says where the folders are.
"""

import argparse
import io
import os
import platform
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from storage.datasets.manifest import latest_manifest, read_manifest
from storage.datasets.plan import ShardJob
from storage.datasets.records import Record
from storage.digests import canonical_json, sha256
from storage.keys import DatasetKeys
from storage.stores.opening import open_store
from storage.stores.store import Store
from tests.benchmarks.tokenise import phases
from tests.benchmarks.tokenise.phases import Phase, build_alone, surroundings
from tests.polling import poll
from tests.ports import free_port

DATASET, SOURCE = "edu", "org/edu"
SHARD_TOKENS = 10_000_000
DOCUMENTS = 9_690  # of a shard of FineWeb-Edu
LENGTHS = [0, 0, 0, 0, 0, 4, 61, 406, 1_522, 2_890, 2_683, 1_420, 503, 141, 44, 12, 4]
POSTGRESQL = "/usr/lib/postgresql"


def put_quickly(store: Store, dataset: str, job: ShardJob, *_: Any) -> Record:
    """What stands for `shards.build_shard`: a shard of 8 tokens, other ones for each job, and its record."""
    body = bytes.fromhex(sha256(job.shard_id.encode())[:32])
    record = Record(
        shard_id=job.shard_id, tokens=len(body) // 2, documents=DOCUMENTS, skipped=0, text_bytes=46_000_000,
        sha256=sha256(body), source=job.source.name, recipe=job.recipe, lengths=LENGTHS,
        versions={"python": "3.11.7", "gpt2-pipeline": "0.1.0", "numpy": "2.4.6", "tiktoken": "0.14.0"},
        dumps={job.source.name.split("/")[1]: DOCUMENTS},
    )  # fmt: skip
    store.put_new(DatasetKeys(dataset).shard(job.shard_id), body)
    store.put_new(DatasetKeys(dataset).record(job.shard_id), canonical_json(asdict(record)))
    return record


def source_files(shards: int, files: int) -> dict[str, bytes]:
    """Files named as FineWeb-Edu's, each of so many rows as it has shards: some 54, up to twice as many."""
    draw = np.random.default_rng(1)
    weights = draw.uniform(0.3, 1.7, files)
    ends = np.round(np.cumsum(weights) / weights.sum() * shards).astype(int)
    made = {}
    for index, rows in enumerate(np.diff(ends, prepend=0)):
        dump, part = divmod(index, 25)
        table = pa.table({"text": [f"text {index}"] * rows, "token_count": np.full(rows, SHARD_TOKENS - 1)})
        pq.write_table(table, body := io.BytesIO())
        name = f"data/CC-MAIN-{2013 + dump // 10}-{10 + dump % 10}/train-{part:05d}-of-00025.parquet"
        made[name] = body.getvalue()
    return made


@contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    """The address, for Prefect, of a PostgreSQL of our own on a free port; root hands it to the user `postgres`."""
    found = sorted(Path(POSTGRESQL).glob("*/bin/initdb")) or [shutil.which("initdb")]
    assert found[-1], "initdb was not found: apt install postgresql"
    programs = Path(found[-1]).parent
    folder.mkdir()
    folder.parent.chmod(0o755)  # of another user, who has to get in
    (folder / "password").write_text(password := secrets.token_hex(16))
    words = ["setpriv", "--pdeathsig=INT"]  # it ends with the benchmark, however that ends
    if os.geteuid() == 0:
        words += ["--reuid=postgres", "--regid=postgres", "--clear-groups"]
        for path in (folder, folder / "password"):
            shutil.chown(path, "postgres", "postgres")
    data, port = str(folder / "data"), free_port()
    initialise = [programs / "initdb", "-D", data, "-U", "prefect", "-A", "scram-sha-256", "-E", "UTF8", "--no-sync"]
    done = subprocess.run([*words, *initialise, f"--pwfile={folder / 'password'}"], cwd=folder, capture_output=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": ""}
    options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([*words, programs / "postgres", "-D", data, *options], cwd=folder, stderr=log)
    try:
        ready = [programs / "pg_isready", "-q", "-h", "127.0.0.1", "-p", str(port)]
        poll(lambda: server.poll() is not None or subprocess.run(ready, check=False).returncode == 0)
        assert server.poll() is None, (folder / "log").read_text()
        yield f"postgresql+asyncpg://prefect:{password}@127.0.0.1:{port}/postgres"
    finally:
        server.send_signal(signal.SIGINT)  # a fast shutdown
        server.wait()


def open_manifest(url: str, digest: str) -> tuple[Phase, int]:
    """What a process that trains begins with: the version read and checked, and every row of it seen."""
    store, before, cpu = open_store(url), time.perf_counter(), time.process_time()
    rows = sum(1 for _ in read_manifest(store, DATASET, digest).rows())
    return Phase(time.perf_counter() - before, time.process_time() - cpu, phases.megabytes("VmHWM")), rows


def measure(folder: Path, shards: int, files: int, database_url: str) -> None:
    settings = [
        f"store_url={folder / 'store'}", f"data.dataset={DATASET}", f"data.source={SOURCE}", "data.config=default",
        f"data.shard_tokens={SHARD_TOKENS}",
    ]  # fmt: skip
    with surroundings(folder, database_url) as hub:
        hub.dataset(SOURCE, source_files(shards, files), configs={"default": {"train": "data/*/*"}})
        program = (__file__, "--build")
        print(phases.HEAD)
        build_alone(folder, settings, program).show("first build", shards)
        store = open_store(settings[0].removeprefix("store_url="))
        sealed = latest_manifest(store, DATASET)
        assert sealed is not None
        assert len(sealed.shard_ids) == shards
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            opened, rows = pool.submit(open_manifest, store.url, sealed.digest).result()
        assert rows == shards
        phases.row("open the manifest, in a process of its own", opened, shards, limited=False)
        hub.requests.clear()
        build_alone(folder, settings, program).show("second build", shards)
        again = latest_manifest(store, DATASET)
        assert again is not None
        assert again.digest == sealed.digest
        assert len(hub.requests) == 1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shards", type=int, default=130_000)
    parser.add_argument("--files", type=int, default=2_400)
    parser.add_argument("--server", choices=("postgresql", "sqlite"), default="postgresql")
    asked = parser.parse_args()
    print(f"{asked.shards:,} shards of {asked.files:,} files, {asked.server}, {os.cpu_count()} cores, "
          f"Python {platform.python_version()}, Prefect {version('prefect')}\n")  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="scale-") as name:
        folder = Path(name)
        with postgresql(folder / "postgresql") if asked.server == "postgresql" else nullcontext("") as database_url:
            measure(folder, asked.shards, asked.files, database_url)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--build"]:  # the process that is measured
        from storage.datasets import shards as real

        real.build_shard = put_quickly
        phases.build(sys.argv[2], sys.argv[3:])
    else:
        main()

"""The S3 store, the shard cache and manifests beside plain boto3 and obstore: prints one markdown table.

    python tests/benchmarks/store/bench_store.py [--server minio|seaweedfs] [--objects 64] [--megabytes 20]

Starts the server itself, in a temporary folder. `pip install obstore` into the environment to include it; Linux only.
The server shares the processors with its clients and machines are noisy, so contenders take turns of a quarter of the
objects each, in another order every turn; a ratio is the median of those within a turn. Ours puts a memoryview, as a
build does, the others bytes. By default plain boto3 sends and checks a CRC-32 besides the SHA-256 that it signs.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from itertools import count
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import boto3
from botocore.config import Config

from storage.cache import host as host_cache
from storage.cache import shards as shard_cache
from storage.datasets.manifest import ShardRow, read_manifest
from storage.digests import canonical_json, sha256
from storage.keys import DatasetKeys
from storage.stores.opening import open_store
from storage.stores.store import Store
from tests import servers

try:
    import obstore
    from obstore.store import S3Store as Obstore
except ImportError:
    obstore = None  # type: ignore[assignment]

DATASET = "bench"
OVER_HTTP: Any = {"client_options": {"allow_http": True}}  # endpoint and secrets come from the environment
BARE = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
THREADS = (1, 4, 8)
ROUNDS, TURNS = 3, 4  # a round has as many turns
PLAIN, CHECKED = "boto3, defaults", "boto3, defaults, what ours put (SHA-256 checked)"
TO_FILE = "boto3, download_file (to a file, no fsync)"
ALONE = partial(ProcessPoolExecutor, 1, get_context("spawn"))  # for work in a process of its own
numbers = count()
shard_keys = [DatasetKeys(DATASET).shard(f"{n:06d}") for n in range(1000)]


class Contender(NamedTuple):
    """Who does what with object n; beside whom, who does as much; what is made ready before a turn, unmeasured."""

    name: str
    act: Callable[[int], object]
    beside: str = PLAIN
    prepare: Callable[[], object] = lambda: None


def row(what: str, who: str, figure: str, ratio: str = "", target: str = "", met: bool | None = None,
        threads: int = 1, cpu: str = "") -> None:  # fmt: skip
    verdict = "" if met is None else ": yes" if met else ": **no**"
    print(f"| {what} | {who} | {threads} | {figure} | {cpu} | {ratio} | {target}{verdict} |", flush=True)


def measured(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds on the clock, and processor seconds of this process."""
    since, before = time.perf_counter(), time.process_time()  # as getrusage counts, finer
    work()
    return time.perf_counter() - since, time.process_time() - before


def race(what: str, setting: Callable[[], AbstractContextManager[list[Contender]]], threads: int, objects: int,
         size: int | None) -> None:  # fmt: skip
    """Rounds of turns, in each of which every contender handles the same quarter of the objects; a row for each."""
    found: dict[str, list[tuple[float, float]]] = {}
    beside: dict[str, str] = {}
    for lap in range(ROUNDS):
        with setting() as contenders, ThreadPoolExecutor(threads) as pool:
            found = found or {contender.name: [] for contender in contenders}
            beside = {contender.name: contender.beside for contender in contenders}
            for turn in range(TURNS):
                first = (lap * TURNS + turn) % len(contenders)
                order = contenders[first:] + contenders[:first]
                for who, act, _, prepare in order if turn % 2 else reversed(order):
                    prepare()
                    todo = range(turn, objects, TURNS)
                    found[who].append(measured(lambda act=act, todo=todo: list(pool.map(act, todo))))  # type: ignore[misc]
    for who, turns in found.items():
        seconds, cpu = (TURNS * median(column) for column in zip(*turns, strict=True))
        figure = f"{objects * size / seconds / 1e6:,.0f} MB/s" if size else f"{seconds / objects:.2f} s"
        ratio = median(plain / ours for (plain, _), (ours, _) in zip(found[beside[who]], turns, strict=True))
        target, met = ("≥ 0.95", ratio >= 0.95) if who.startswith("ours") else ("", None)
        row(
            what,
            who,
            figure,
            f"{ratio:.2f}{'' if beside[who] == PLAIN else f' of {beside[who]}'}",
            target,
            met,
            threads,
            f"{cpu / (1 if size else objects):.2f}",
        )
    if not obstore:
        row(what, "obstore", "not installed: pip install obstore", threads=threads)


def plain_client(**config: Any) -> Any:
    return boto3.Session().client("s3", config=Config(**config))


@contextmanager
def new_bucket() -> Iterator[str]:
    """A bucket that goes with what is in it: SeaweedFS gives no space back for single objects at once."""
    client, name = plain_client(), f"bench-{next(numbers)}"
    client.create_bucket(Bucket=name)
    try:
        yield name
    finally:
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
            if listed := [{"Key": found["Key"]} for found in page.get("Contents", [])]:
                client.delete_objects(Bucket=name, Delete={"Objects": listed, "Quiet": True})
        client.delete_bucket(Bucket=name)


def bench_put(bodies: list[bytes], threads: int) -> None:
    @contextmanager
    def setting() -> Iterator[list[Contender]]:
        with new_bucket() as bucket:
            store, plain, bare = open_store(f"s3://{bucket}/ours", create=True), plain_client(), plain_client(**BARE)
            for client in (plain, bare):  # also, the server makes the bucket ready
                client.put_object(Bucket=bucket, Key="warm", Body=bodies[0])
            contenders = [
                Contender("ours (create-only, SHA-256)", lambda n: store.put_new(shard_keys[n], memoryview(bodies[n]))),
                Contender(PLAIN, lambda n: plain.put_object(Bucket=bucket, Key=f"plain/{n}", Body=bodies[n])),
                Contender("boto3, when_required", lambda n: bare.put_object(Bucket=bucket, Key=f"{n}", Body=bodies[n])),
            ]
            if obstore:
                put = partial(obstore.put, Obstore(bucket, **OVER_HTTP), mode="create", use_multipart=False)
                contenders.append(Contender("obstore (create-only)", lambda n: put(f"obstore/{n}", bodies[n])))
            yield contenders

    race("put", setting, threads, len(bodies), len(bodies[0]))


def bench_get(bodies: list[bytes], folder: Path) -> None:
    plain, caches = plain_client(), dict[int, shard_cache.ShardCache]()  # one a thread
    shard_rows = [ShardRow(f"{n:06d}", len(body) // 2, 1, 0, 1, sha256(body), "train") for n, body in enumerate(bodies)]
    host_cache.FOLDER = folder

    def empty() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        caches.clear()

    def cold(n: int) -> int:
        mine = caches.setdefault(threading.get_ident(), shard_cache.ShardCache(store, DATASET))
        return int(mine.open(shard_rows[n]).nbytes)

    def of(client: Any, prefix: str) -> Callable[[int], int]:
        return lambda n: len(client.get_object(Bucket=bucket, Key=f"{prefix}/{shard_keys[n]}")["Body"].read())

    with new_bucket() as bucket:
        store = open_store(f"s3://{bucket}/ours", create=True)
        for n, body in enumerate(bodies):
            store.put_new(shard_keys[n], body)
            plain.put_object(Bucket=bucket, Key=f"plain/{shard_keys[n]}", Body=body)
        contenders = [
            Contender("ours (SHA-256 checked)", lambda n: len(store.read(shard_keys[n]).body), CHECKED),
            Contender("ours through a cold cache (checked, fsync, mapped)", cold, TO_FILE, empty),
            Contender(PLAIN, of(plain, "plain")),
            Contender(CHECKED, of(plain, "ours")),
            Contender("boto3, when_required (unchecked)", of(plain_client(**BARE), "plain")),
            Contender(
                TO_FILE,
                lambda n: plain.download_file(bucket, f"plain/{shard_keys[n]}", f"{folder}-{n}") or len(bodies[n]),
            ),
        ]
        if obstore:
            get = partial(obstore.get, Obstore(bucket, **OVER_HTTP))
            contenders.append(Contender("obstore (unchecked)", lambda n: len(get(f"ours/{shard_keys[n]}").bytes())))
        assert {contender.act(0) for contender in contenders} == {len(bodies[0])}
        for threads in THREADS:
            race("get", lambda: nullcontext(contenders), threads, len(bodies), len(bodies[0]))
        bench_warm(store, bodies, shard_rows)


def bench_warm(store: Store, bodies: list[bytes], shard_rows: list[ShardRow]) -> None:
    found = []
    for shard, body in zip(shard_rows, bodies, strict=True):
        shard_cache.ShardCache(store, DATASET).open(shard)
        fresh = shard_cache.ShardCache(store, DATASET)  # has proved nothing yet, as a new process
        hashing, opening = partial(hashlib.sha256, body), partial(fresh.open, shard)
        found.append([measured(work)[0] for work in (hashing, opening, opening, hashing)])
    hashed, first, second, _ = (median(column) for column in zip(*found, strict=True))
    ratio, what = median((t[0] + t[3]) / 2 / t[1] for t in found), "warm cache, one shard"
    row(what, "hashlib.sha256 of it in memory", f"{1e3 * hashed:.1f} ms", "1.00")
    row(what, "ours, first open in a process", f"{1e3 * first:.1f} ms", f"{ratio:.2f} of that", "≥ 0.95", ratio >= 0.95)
    row(what, "ours, opened again", f"{1e6 * second:.1f} µs", "", "< 0.1 ms", second < 1e-4)


def bench_list(objects: int) -> None:
    with new_bucket() as bucket, ThreadPoolExecutor(8) as pool:
        store, plain, prefix = (
            open_store(f"s3://{bucket}/ours", create=True),
            plain_client(),
            DatasetKeys(DATASET).shards,
        )
        list(pool.map(lambda n: store.put_new(DatasetKeys(DATASET).record(f"{n:06d}"), b"{}"), range(objects)))
        pages = partial(plain.get_paginator("list_objects_v2").paginate, Bucket=bucket, Prefix=f"ours/{prefix}")
        contenders = [
            Contender("ours", lambda _: sum(1 for _ in store.list(prefix))),
            Contender(PLAIN, lambda _: sum(len(page.get("Contents", [])) for page in pages())),
        ]
        if obstore:
            listed = partial(obstore.list, Obstore(bucket, **OVER_HTTP), f"ours/{prefix}")
            contenders.append(Contender("obstore", lambda _: sum(map(len, listed()))))
        assert {contender.act(0) for contender in contenders} == {objects}
        race(f"list {objects:,} objects", lambda: nullcontext(contenders), 1, TURNS, None)


def put_manifest(store: Store, shards: int) -> str:
    columns = dict(zip(ShardRow._fields, map(list, zip(*(
        (f"000_{n:05d}-{n:05d}-{n:012x}", 10_000_000 + n % 1000, 9_700 + n % 300, 46_000_000 + n % 999,
         sha256(b"%d" % n), "train" if n else "val") for n in range(shards)), strict=True)), strict=True))  # fmt: skip
    made = {"recipe": {"shard_tokens": 10_000_000}, "tokenizer": {"name": "gpt2"}, "totals": {}, "parent": None}
    body = canonical_json({"schema": 1, **made, "shards": columns})
    store.put_new(DatasetKeys(DATASET).manifest(sha256(body)), body)
    return sha256(body)


def megabytes_of(name: str) -> float:
    """VmHWM is the peak; getrusage's ru_maxrss would begin with the peak of the process that started this one."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024 / 1e6


def open_manifest(url: str, digest: str, times: int) -> tuple[float, float, float]:
    """Median seconds, those of plain get_object and json.loads, and the peak's growth in MB."""
    store, plain, (bucket, prefix) = open_store(url), plain_client(), url.removeprefix("s3://").split("/")
    get = partial(plain.get_object, Bucket=bucket, Key=f"{prefix}/{DatasetKeys(DATASET).manifest(digest)}")
    before = megabytes_of("VmHWM")
    ours = [measured(lambda: read_manifest(store, DATASET, digest))[0] for _ in range(times)]
    grown = megabytes_of("VmHWM") - before
    bare = [measured(lambda: json.loads(get()["Body"].read()))[0] for _ in range(times)]
    return median(ours), median(bare), grown


def bench_manifest(shards: int, times: int, most_seconds: float) -> None:
    with new_bucket() as bucket:
        digest = put_manifest(open_store(url := f"s3://{bucket}/ours", create=True), shards)
        found = [ALONE().submit(open_manifest, url, digest, times).result() for _ in range(ROUNDS)]
    seconds, bare, grown = (median(column) for column in zip(*found, strict=True))
    what, ratio = f"manifest of {shards:,} shards", median(bare / seconds for seconds, bare, _ in found)
    row(what, f"{PLAIN}, and json.loads", f"{1e3 * bare:.1f} ms", "1.00")
    row(what, "ours (checked)", f"{1e3 * seconds:.1f} ms, peak + {grown:,.0f} MB", f"{ratio:.2f}",
        f"< {1e3 * most_seconds:g} ms, < 300 MB", seconds < most_seconds and grown < 300)  # fmt: skip


def pass_through(url: str, folder: Path, size: int) -> list[tuple[float, float]]:
    """The peak and the mapped megabytes after 10 and 100 shards that were put, read and opened."""
    host_cache.FOLDER, found = folder, []
    opened = shard_cache.ShardCache(store := open_store(url, create=True), DATASET, 10 * size)
    for n in range(100):
        body = os.urandom(size)
        store.put_new(shard_keys[n], body)
        assert store.read(shard_keys[n]).body == body
        opened.open(ShardRow(f"{n:06d}", size // 2, 1, 0, 1, sha256(body), "train"))
        if n in (9, 99):
            found.append((megabytes_of("VmHWM"), megabytes_of("RssFile")))
    return found


def bench_memory(folder: Path, size: int) -> None:
    with new_bucket() as bucket:
        found = ALONE().submit(pass_through, f"s3://{bucket}/ours", folder, size).result()
    (early, early_maps), (late, late_maps) = found
    grown = late - late_maps - (early - early_maps)
    figure = f"peak {early:,.0f} MB after 10, {late:,.0f} after 100; mapped {early_maps:,.0f} and {late_maps:,.0f}"
    row("100 shards put, read, opened", "ours", figure, "", f"flat but for maps ({grown:+,.0f} MB)", grown < size / 5e5)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--server", choices=("minio", "seaweedfs"), default="seaweedfs")
    parser.add_argument("--objects", type=int, default=64)
    parser.add_argument("--megabytes", type=int, default=20)
    size = (asked := parser.parse_args()).megabytes * 1_000_000
    print(f"{asked.server}, {asked.objects} x {asked.megabytes} MB, {ROUNDS} rounds of {TURNS} turns, {os.cpu_count()} "
          f"cores, Python {platform.python_version()}, boto3 {version('boto3')}\n")  # fmt: skip
    print("| what | who | threads | median | client CPU s | speed beside plain boto3, or whom is named | target |\n"
          "| --- | --- | ---: | ---: | ---: | ---: | --- |")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        server = servers.start(asked.server, Path(folder) / "server")
        os.environ |= server.environment
        try:
            bodies = [os.urandom(size) for _ in range(asked.objects)]
            for threads in THREADS:
                bench_put(bodies, threads)
            bench_get(bodies, Path(folder) / "shards")
            bench_list(10_000)
            bench_manifest(1_000, 7, 0.05)
            bench_manifest(130_000, 1, 2.0)
            bench_memory(Path(folder) / "memory", size)
        finally:
            server.stop()


if __name__ == "__main__":
    main()

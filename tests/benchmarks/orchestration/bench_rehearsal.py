"""FineWeb-Edu sample-10BT rehearsed: its real totals, row groups and columns from a stand-in of the Hub; prints tables.

    python tests/benchmarks/orchestration/bench_rehearsal.py [--documents 9672101]

14 parquet files whose `token_count` columns add up to the published totals, long-tailed; the texts are a few words, so
what is missing of the real thing is the bytes: 28.5 GB to fetch and hash, 10 billion tokens to encode. All that runs is
real: the verb `gpt2 dataset build`, the store in a folder, Prefect's server with its SQLite. Builds: a first one, one
with nothing changed, the same two of a local folder, and one after a change of one file. Every check that fails ends
the benchmark; a limit that is missed is said in the table. Linux only: the kernel tells who opens a file.
"""

import argparse
import ctypes
import io
import os
import platform
import struct
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from model import tokenizer
from storage import keys
from storage.datasets import records
from storage.datasets.manifest import Manifest, latest_manifest
from storage.datasets.plan import plan_file
from storage.datasets.recipe import DatasetSettings
from storage.digests import sha256
from storage.keys import DatasetKeys
from storage.sources.files import SourceFile
from storage.sources.mirror import mirror
from storage.sources.reading import open_source
from storage.stores.opening import open_store
from storage.stores.store import Store
from tests.benchmarks.tokenise import phases
from tests.benchmarks.tokenise.phases import FLOW, WORK, Build, build_alone, megabytes, surroundings
from tests.hub import Hub, Repository

SOURCE, FOLDER = "org/edu", "sample/10BT"
DOCUMENTS, TOKENS = 9_672_101, 9_982_590_278  # of sample-10BT; the tokens with one EOT a document
FILES, FILE_DOCUMENTS, GROUP = 14, 726_000, 1_000  # the last file holds the rest
SHARD_TOKENS = 10_000_000
FILES_AT_ONCE = 4  # as flows.download, which would import Prefect here
CHANGED = 5  # the file that changes: the val shards are of the first one
NOTHING_SECONDS = 3.0  # of work, where nothing is to be done
LARGE_BYTES = 1 << 28  # of a file that is mirrored alone; the real ones have 2.15 GB
PLAN_SECONDS, PLAN_MEGABYTES = 10.0, 300.0  # of a million documents; above what the process held
TEXTS = [f"Page {n} says that {'very ' * (n % 5)}little was written here." for n in range(50)]


def token_counts(documents: int, tokens: int) -> np.ndarray:
    """Long-tailed lengths of so many documents, from a seed, that add up to `tokens` with one EOT each."""
    drawn = np.minimum(np.random.default_rng(10).lognormal(0, 1.0, documents), 120)
    counts = np.maximum(drawn * ((tokens - documents) / drawn.sum()), 1).astype(np.int64)
    missing = tokens - documents - int(counts.sum())
    assert 0 <= missing <= documents
    counts[:missing] += 1
    return counts


def published(counts: np.ndarray, seed: int) -> bytes:
    """A parquet file with FineWeb-Edu's columns."""
    draw, rows = np.random.default_rng(seed), len(counts)

    def column(values: list[Any]) -> pa.Array:
        return pa.array(values).take(pa.array(draw.integers(0, len(values), rows)))

    scores = 2.5 + 2.5 * draw.random(rows)
    columns = {
        "text": column(TEXTS),
        "id": column([f"<urn:uuid:{sha256(text.encode())[:36]}>" for text in TEXTS]),
        "dump": column([f"CC-MAIN-2024-{week:02d}" for week in range(10, 52, 4)]),
        "url": column([f"https://example.org/{n}" for n in range(50)]),
        "file_path": column([f"s3://commoncrawl/crawl-data/segments/{n}/warc.gz" for n in range(20)]),
        "language": column(["en"]),
        "language_score": pa.array(np.round(0.65 + 0.35 * draw.random(rows), 2)),
        "token_count": pa.array(counts),
        "score": pa.array(np.round(scores, 2)),
        "int_score": pa.array(np.round(scores).astype(np.int64)),
    }
    pq.write_table(pa.table(columns), body := io.BytesIO(), row_group_size=GROUP)
    return body.getvalue()


def greedy(counts: list[int]) -> list[tuple[int, int]]:
    """The row ranges of the shards of one file, the plainest way: what the plan is compared with."""
    ranges, first, held = [], 0, 0
    for row, count in enumerate(counts):
        if row > first and held + count + 1 > SHARD_TOKENS:
            ranges.append((first, row))
            first, held = row, 0
        held += count + 1
    return [*ranges, (first, len(counts))]


@contextmanager
def opened(folders: list[Path]) -> Iterator[list[str]]:
    """The names of the files in these folders that any process opens or reads within the block, told by inotify."""
    system, found = ctypes.CDLL(None, use_errno=True), list[str]()
    watch = system.inotify_init1(os.O_NONBLOCK)
    for folder in folders:
        assert system.inotify_add_watch(watch, os.fsencode(folder), 0x01 | 0x20) >= 0, os.strerror(ctypes.get_errno())
    try:
        yield found
        while body := _read(watch):
            while body:
                _, mask, _, length = struct.unpack_from("iIII", body)
                name = body[16 : 16 + length].rstrip(b"\0").decode()
                found += [] if mask & 0x40000000 else [name]  # a folder: to list it is to open it
                body = body[16 + length :]
    finally:
        os.close(watch)


def _read(watch: int) -> bytes:
    try:
        return os.read(watch, 1 << 16)
    except BlockingIOError:
        return b""


def mirror_all(url: str, files: list[SourceFile]) -> tuple[float, float, float]:
    """Seconds, the peak in MB and what of it was there before, of what is done with files before they are planned."""
    store = open_store(url)
    phases.forget_peak()
    before, since = megabytes("VmRSS"), time.perf_counter()
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        list(pool.map(lambda file: open_source(mirror(store, file)), files))
    return time.perf_counter() - since, megabytes("VmHWM"), before


def show_mirroring(store: Store, hub: Hub) -> None:
    """Files of more than a few MB: what is fetched, hashed, put and opened with is not held in memory, or is it?"""
    bodies = {f"data/{n}.parquet": os.urandom(LARGE_BYTES) for n in range(FILES_AT_ONCE)}
    repository = hub.repositories["org/large"] = Repository({})
    repository.commits[commit := "1" * 40] = bodies
    place = f"hf://datasets/org/large@{commit}"
    files = [SourceFile(name, LARGE_BYTES, sha256(body), f"{place}/{name}") for name, body in bodies.items()]
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        seconds, peak, before = pool.submit(mirror_all, store.url, files).result()
    count = f"{FILES_AT_ONCE} files of {LARGE_BYTES / 1e6:,.0f} MB at once"
    print(f"\n| mirroring alone, in a process of its own | seconds | MB/s | peak MB (mapped files count) "
          f"| MB more than before |\n| --- | ---: | ---: | ---: | ---: |\n| {count} | {seconds:.1f} "
          f"| {FILES_AT_ONCE * LARGE_BYTES / seconds / 1e6:,.0f} | {peak:,.0f} | {peak - before:,.0f} |")  # fmt: skip
    del hub.repositories["org/large"]


def plan_all(files: list[SourceFile], filters: tuple[str, ...]) -> tuple[float, float, float, int]:
    """Seconds, the peak in MB, what of it was there before, and the planned tokens of all files, one by one."""
    shape = DatasetSettings(SHARD_TOKENS, tokenizer.identity()["sha256"], filters=filters)
    phases.forget_peak()
    before, since = megabytes("VmRSS"), time.perf_counter()
    tokens = sum(plan_file(file, shape).tokens for file in files)
    return time.perf_counter() - since, megabytes("VmHWM"), before, tokens


def show_planning(store: Store, bodies: dict[str, bytes], documents: int, tokens: int) -> None:
    found = []
    for name, body in bodies.items():
        file = SourceFile(name, len(body), sha256(body), "")
        found.append(SourceFile(name, file.size_bytes, file.digest, str(store.local_path(file.key))))
    print("\n| planning alone, in a process of its own | seconds | of a million documents | limit "
          "| peak MB | MB more than before | limit |\n| --- | ---: | ---: | --- | ---: | ---: | --- |")  # fmt: skip
    for filters in ((), ("int_score >= 4",)):
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            seconds, peak, before, planned = pool.submit(plan_all, found, filters).result()
        assert filters or planned == tokens
        each, grown = seconds / documents * 1e6, peak - before
        print(f"| {documents:,} documents, {filters[0] if filters else 'no filter'} | {seconds:.1f} | {each:.2f} "
              f"| {PLAN_SECONDS:g}: {verdict(each <= PLAN_SECONDS)} | {peak:,.0f} | {grown:,.0f} "
              f"| {PLAN_MEGABYTES:g}: {verdict(grown <= PLAN_MEGABYTES)} |", flush=True)  # fmt: skip
    print(f"\n{phases.HEAD}")


def verdict(met: bool) -> str:
    return "yes" if met else "**no**"


def check_shards(store: Store, dataset: str, columns: dict[str, np.ndarray], total: int) -> None:
    """Every shard's rows are a plain greedy cut's, their number is what it must be, no token is lost."""
    ranges = defaultdict(list)
    for shard_id in newest(store, dataset).shard_ids:
        recipe = records.read_record(store, dataset, shard_id).recipe
        ranges[recipe["source"]].append((recipe["row_from"], recipe["row_to"]))
    assert dict(ranges) == {source: greedy(counts.tolist()) for source, counts in columns.items()}
    least, found = -(-total // SHARD_TOKENS), sum(map(len, ranges.values()))
    assert least <= found <= least + len(columns), (least, found)  # of all of it: 999 to 1,013
    planned = sum(
        int((columns[source][first:last] + 1).sum()) for source, cuts in ranges.items() for first, last in cuts
    )
    assert planned == total, (planned, total)
    print(f"| {dataset}: {found:,} shards of {least:,} to {least + len(columns):,}; each one's rows are the plain "
          f"cut's; {planned:,} tokens | | | | | yes |")  # fmt: skip


def show_nothing(dataset: str, found: Build, count: int) -> None:
    """The rows of a build that had nothing to do, and its limit."""
    found.show(f"{dataset} again", count)
    for names, what in ((WORK, "work"), (FLOW, "flow")):
        seconds = found.sum(*names).seconds
        print(f"| **{dataset} again: {what}, limit {NOTHING_SECONDS:g} s** | {seconds:.2f} | | | | "
              f"{NOTHING_SECONDS:g} s: {verdict(seconds <= NOTHING_SECONDS)} |", flush=True)  # fmt: skip


def newest(store: Store, dataset: str) -> Manifest:
    found = latest_manifest(store, dataset)
    assert found is not None
    return found


def versions(store: Store, dataset: str) -> list[str]:
    """Every object that says what the dataset's versions are, with its time."""
    wanted = (DatasetKeys(dataset).manifests, DatasetKeys(dataset).latest, DatasetKeys(dataset).split)
    return sorted(f"{found.key} {found.modified}" for prefix in wanted for found in store.list(prefix))


def sources_in(store: Store) -> list[Path]:
    """The folders in which the store keeps copies of the Hub's files."""
    place = store.local_path(keys.source("0" * 64, "none"))
    assert place is not None
    return [folder for folder in place.parent.parent.iterdir() if len(folder.name) == len(place.parent.name)]


def paths(hub: Hub) -> list[str]:
    return [f"{request.method} {request.path}" for request in hub.requests]


def rehearse(folder: Path, hub: Hub, documents: int) -> None:
    tokens = round(TOKENS * documents / DOCUMENTS)
    counts = token_counts(documents, tokens)
    a_file = -(-FILE_DOCUMENTS * documents // DOCUMENTS)
    parts = [counts[a_file * n : a_file * (n + 1)] for n in range(FILES)]
    bodies = {f"{FOLDER}/{n:03d}_00000.parquet": published(part, n) for n, part in enumerate(parts)}
    columns = {sha256(body): part for body, part in zip(bodies.values(), parts, strict=True)}
    print(f"{sum(map(len, bodies.values())) / 1e6:,.0f} MB in {FILES} files; lengths: median {np.median(counts):,.0f}, "
          f"mean {counts.mean():,.0f}, longest {counts.max():,}\n\n{phases.HEAD}", flush=True)  # fmt: skip
    hub.dataset(SOURCE, bodies, configs={"sample-10BT": {"train": f"{FOLDER}/*"}})
    url = str(folder / "store")
    settings = [f"store_url={url}", f"data.shard_tokens={SHARD_TOKENS}"]
    ours = [*settings, "data.dataset=edu", f"data.source={SOURCE}", "data.config=sample-10BT"]

    found = build_alone(folder, ours)
    store = open_store(url)
    first = newest(store, "edu")
    count = len(first.shard_ids)
    found.show("edu, the first time", count)
    check_shards(store, "edu", columns, tokens)
    print(f"| edu, the first time: {len(hub.requests)} requests, {len(hub.received('/stored/*'))} of them for data | | "
          f"| | | {verdict(len(hub.received('/stored/*')) == FILES)} |")  # fmt: skip
    show_mirroring(store, hub)
    show_planning(store, bodies, documents, tokens)

    hub.requests.clear()
    before = versions(store, "edu")
    with opened(sources_in(store)) as seen:
        found = build_alone(folder, ours)
    assert (seen, paths(hub)) == ([], [f"GET /api/datasets/{SOURCE}/revision/main"])
    assert versions(store, "edu") == before
    show_nothing("edu", found, count)
    print("| edu again: one request, no source file opened, no new version | | | | | yes |")
    rehearse_local(folder, store, settings, bodies)
    rehearse_change(folder, hub, store, ours, bodies)


def rehearse_local(folder: Path, store: Store, settings: list[str], bodies: dict[str, bytes]) -> None:
    """The same files from a folder: the same shards, which are there already, so that only the plans are made."""
    (local := folder / "local").mkdir()
    for name, body in bodies.items():
        (local / Path(name).name).write_bytes(body)
    there, wanted = (store.local_path(DatasetKeys(name).shards.rstrip("/")) for name in ("edu", "local"))
    assert there is not None
    assert wanted is not None
    wanted.mkdir(parents=True)
    for path in there.iterdir():
        os.link(path, wanted / path.name)
    settings = [*settings, "data.dataset=local", f"data.source={local}/*.parquet"]
    with opened([local]) as seen:
        found = build_alone(folder, settings)
    assert {Path(name).name for name in bodies} == set(seen)  # whoever opens one is seen
    first = newest(store, "local")
    assert first.columns == newest(store, "edu").columns
    found.show("local, planned and sealed", len(first.shard_ids))
    before = versions(store, "local")
    with opened([local]) as seen:
        found = build_alone(folder, settings)
    assert (seen, versions(store, "local")) == ([], before)
    show_nothing("local", found, len(first.shard_ids))
    print("| local again: no source file opened, no new version | | | | | yes |")


def rehearse_change(folder: Path, hub: Hub, store: Store, settings: list[str], bodies: dict[str, bytes]) -> None:
    """One file of the Hub changes: its shards are made, and no other."""
    name = list(bodies)[CHANGED]
    rows = pq.read_metadata(io.BytesIO(bodies[name])).num_rows
    counts = token_counts(rows, rows * TOKENS // DOCUMENTS)
    changed = published(counts, 99)
    hub.repositories[SOURCE].commit(bodies | {name: changed})
    hub.requests.clear()
    first = newest(store, "edu")
    before = {found.key: found.modified for found in store.list(DatasetKeys("edu").shards)}
    with opened(sources_in(store)) as seen:
        found = build_alone(folder, settings)
    second = newest(store, "edu")
    after = {one.key: one.modified for one in store.list(DatasetKeys("edu").shards)}
    made = {DatasetKeys("edu").shard(one) for one in set(second.shard_ids) - set(first.shard_ids)}
    ranges = greedy(counts.tolist())
    assert {key for key in after.items() - before.items() if key[0].endswith(".bin")} == {
        (key, after[key]) for key in made
    }
    assert len(made) == len(ranges)
    stem = Path(name).stem
    assert {one for one in second.shard_ids if not one.startswith(stem)} == {
        one for one in first.shard_ids if not one.startswith(stem)
    }
    assert second.parent == first.digest
    assert list(second.rows("val")) == list(first.rows("val"))
    assert seen == []  # the copy that changed lies in a new folder
    assert [path.rpartition("/")[2] for path in paths(hub) if "/stored/" in path] == [Path(name).name]
    found.show("edu, one file changed", len(made))
    print(f"| edu, one file changed: its {len(made)} shards were made, no other; one file of {FILES} fetched, in "
          f"{len(hub.requests)} requests | | | | | yes |")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--documents", type=int, default=DOCUMENTS, help="fewer for a quick look")
    asked = parser.parse_args()
    print(f"{asked.documents:,} documents, {os.cpu_count()} cores, Python {platform.python_version()}, "
          f"Prefect {version('prefect')}, pyarrow {pa.__version__}; ", end="")  # fmt: skip
    sys.stdout.flush()
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as name, surroundings(Path(name)) as hub:
        rehearse(Path(name), hub, asked.documents)


if __name__ == "__main__":
    main()

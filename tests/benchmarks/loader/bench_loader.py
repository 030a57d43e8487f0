"""Batches of 8 x 1,024 tokens, int64, shuffled, over 64 million tokens: our loader beside peers. Prints one table.

    python tests/benchmarks/loader/bench_loader.py [--peers PYTHON] [--rounds 5] [--only NAME ...]
        [--caches warm,cold] [--seconds 10]

The tokens lie in shards of 10 million. Each contender has a fresh process in each round, in another order each round;
its clock runs from the making of its loader (after the imports) to the last batch, or to --seconds. Ours is
MixedWindows and DataLoader in one process, without and with 4 micro-batches made ahead by a thread; mixed: the same
shards as two datasets, 0.8 to 0.2, at least 0.95 times as fast as unmixed in the same run. The memory copy
reads the mapped shards in order and copies x and y each to int64; nanoGPT's way is a random place for each row. Warm:
files on this host, in the page cache. Cold: from an S3 store (SeaweedFS on this host) through an empty cache; ours
proves each shard's SHA-256 in both, peers prove nothing. Peers run by the Python that --peers names:

    uv venv /tmp/peers && uv pip install --python /tmp/peers/bin/python --compile-bytecode \\
        litdata 'mosaicml-streaming>=0.13'

Linux only.
"""

import argparse
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import boto3
import numpy as np
import torch
from torch import Tensor

from model import tokenizer
from model.data.loader import DataLoader
from storage.cache import host as host_cache
from storage.cache.shards import LIMIT_BYTES
from storage.datasets.manifest import COUNTS, FILE_COLUMNS, Manifest, ShardRow
from storage.datasets.recipe import DatasetSettings
from storage.digests import canonical_json, sha256
from storage.keys import DatasetKeys
from storage.loading.mix import Share
from storage.loading.windows import MixedWindows
from storage.stores.opening import open_store
from storage.stores.store import Store
from tests import servers
from tests.benchmarks import contest
from tests.benchmarks.contest import Outcome
from tests.benchmarks.loader.loader_peers import B, T, consume

PEERS = Path(__file__).with_name("loader_peers.py")
SHARDS, WHOLE, MIXES_FILE = "shards", "whole.bin", "mixes.json"
SHARD_TOKENS = 10_000_000
BATCH_WINDOWS = 524_288 // T  # of a step, as the default recipe has it
AHEAD = (0, 4)
OF_PEER, OF_COPY, OF_UNMIXED = 4.0, 0.5, 0.95  # targets of ours, warm
MIXES = {"unmixed": {"made": 1}, "mixed": {"web": 4, "code": 1}}  # weights by dataset; shards in the same ratio
COPY = "memory copy (in order)"


class Contender(NamedTuple):
    """Who it is, the words that start it up to its tokens and seconds, and whether it is ours, a peer or the limit."""

    name: str
    cache: str
    words: tuple[str, ...]
    kind: str


# Contenders that run by this Python


def ours(url: str, mix: str, ahead: str, tokens: str, seconds: str) -> None:
    host_cache.FOLDER = Path("cache").absolute()
    store, shares = open_store(url), {name: Share(**share) for name, share in json.loads(mix).items()}
    begin = time.monotonic()
    loader = MixedWindows(store, shares, "train", sequence_tokens=T, seed=1, cache_bytes=LIMIT_BYTES)
    share = {"batch_windows": BATCH_WINDOWS, "size": B, "rank": 0, "ranks": 1, "ahead": int(ahead)}
    made = DataLoader(loader, torch.device("cpu"), step=0, **share)
    consume(iter(made.next, None), begin, int(tokens), float(seconds))
    made.close()


def mapped(folder: str) -> list[np.ndarray]:
    return [np.memmap(path, np.uint16, mode="r") for path in sorted(Path(folder).glob("*.bin"))]


def copy(folder: str, tokens: str, seconds: str) -> None:
    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for ids in mapped(folder):
            for start in range(0, len(ids) - B * T, B * T):
                x, y = (ids[at : at + B * T].astype(np.int64).reshape(B, T) for at in (start, start + 1))
                yield torch.from_numpy(x), torch.from_numpy(y)

    consume(batches(), time.monotonic(), int(tokens), float(seconds))


def nanogpt(path: str, tokens: str, seconds: str) -> None:
    """Maps the file anew for each batch, as nanoGPT does."""

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            ids = np.memmap(path, np.uint16, mode="r")
            starts = torch.randint(len(ids) - T, (B,)).tolist()
            x, y = (
                torch.stack([torch.from_numpy(ids[at : at + T].astype(np.int64)) for at in places])
                for places in (starts, [at + 1 for at in starts])
            )
            yield x, y

    consume(batches(), time.monotonic(), int(tokens), float(seconds))


# What they read


def put_mix(store: Store, shards: Path, columns: dict[str, list[Any]], weights: dict[str, int]) -> dict[str, Any]:
    """Share out the shards among the datasets of a mix; returns the mix as JSON."""
    mix, first = {}, 0
    for dataset, weight in weights.items():
        last = first + -(-len(columns["shard_id"]) * weight // sum(weights.values()))
        part = {name: values[first:last] for name, values in columns.items()}
        for name in part["shard_id"]:
            store.put_new(DatasetKeys(dataset).shard(name), (shards / f"{name}.bin").read_bytes())
        totals = {split: dict.fromkeys((*COUNTS, "shards"), 1) for split in ("train", "val")}
        files: dict[str, list[Any]] = {name: [] for name in FILE_COLUMNS}
        identity = tokenizer.identity()
        settings = DatasetSettings(SHARD_TOKENS, identity["sha256"])
        body = canonical_json(Manifest("", settings, identity, {}, totals, None, part, files).to_json())
        store.put_new(DatasetKeys(dataset).manifest(sha256(body)), body)
        mix[dataset], first = {"manifest": sha256(body), "weight": weight}, last
    return mix


def write_shards(folder: Path, whole: Path, tokens: int) -> dict[str, list[Any]]:
    """Random ids, as shards and as the one file that nanoGPT wants; returns the columns of the shards' manifest."""
    folder.mkdir()
    random = np.random.Generator(np.random.PCG64(1))
    columns: dict[str, list[Any]] = {name: [] for name in ShardRow._fields}
    with whole.open("wb") as one_file:
        for index, start in enumerate(range(0, tokens, SHARD_TOKENS)):
            ids = random.integers(0, tokenizer.VOCABULARY, min(SHARD_TOKENS, tokens - start), np.uint16)
            body, name = ids.tobytes(), f"shard-{index:05d}"
            (folder / f"{name}.bin").write_bytes(body)
            one_file.write(body)
            row = (name, len(ids), 1, 0, len(ids), sha256(body), "train", 0)
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
    return columns


# The contest


def contenders(folder: Path, urls: dict[str, str], peers: str | None) -> Iterator[Contender]:
    """`urls`: the store of each cache. The peers' files lie in `folder`, or in the bucket, under their names."""
    here = (sys.executable, str(Path(__file__).absolute()))
    for cache, url in urls.items():
        if cache == "warm":
            yield Contender(COPY, cache, (*here, "copy", str(folder / SHARDS)), "limit")
            yield Contender("nanoGPT's way (random)", cache, (*here, "nanogpt", str(folder / WHOLE)), "peer")
        mixes = json.loads((folder / MIXES_FILE).read_text())
        for (mix, shares), ahead in itertools.product(mixes.items(), AHEAD):
            words = (*here, "ours", url, json.dumps(shares), str(ahead))
            yield Contender(f"ours, {mix}, {ahead} ahead", cache, words, "ours")
        place = folder / "peers" if cache == "warm" else f"s3://{servers.BUCKET}/peers"
        for name, workers in itertools.product(("litdata", "mosaicml"), (0, 2)) if peers else ():
            words = (str(peers), str(PEERS), name, f"{place}/{name}", str(workers))
            yield Contender(f"{name}, {workers} workers, shuffle", cache, words, "peer")


def one_round(
    everyone: list[Contender], number: int, last: list[str], folder: Path, server: servers.Server | None
) -> dict[Contender, Outcome]:
    first = number % len(everyone)
    found = {}
    for who in everyone[first:] + everyone[:first]:
        if server and who.cache == "cold":
            contest.settle(server.process.pid)
        words = [*who.words, *last]
        try:
            found[who] = one = contest.run(words, folder / "work", environment())
        except RuntimeError as error:
            if who.kind != "peer":
                raise
            print(f"round {number + 1}: {who.cache}, {who.name} failed: {error}", file=sys.stderr)
            continue
        finally:
            shutil.rmtree(folder / "work")
        print(f"round {number + 1}: {who.cache}, {who.name}: {rate(one):.1f} M tokens/s, "
              f"others had {one.foreign:.0%} of the machine", file=sys.stderr)  # fmt: skip
    return found


def environment() -> dict[str, str]:
    return os.environ | {"S3_ENDPOINT_URL": os.environ.get("AWS_ENDPOINT_URL_S3", "")}  # mosaicml's name for it


def rate(one: Outcome) -> float:
    """Million tokens/s from the making of the loader to the last batch."""
    return one.result["tokens"] / one.work_seconds / 1e6


def steady(one: Outcome) -> float:
    """The same, after the first batch."""
    return (one.result["tokens"] - B * T) / (one.work_seconds - one.result["first_seconds"]) / 1e6


def table(everyone: list[Contender], rounds: list[dict[Contender, Outcome]]) -> None:
    ended = {who: [one[who] for one in rounds if who in one] for who in everyone}
    middle = {who: median(map(rate, outcomes)) for who, outcomes in ended.items() if outcomes}
    print("| cache | contender | M tokens read | M tokens/s (best) | M tokens/s (median) | of memory copy "
          "| of best shuffling peer | after the first batch (median) | first batch ms | others' share | rounds "
          "| target |\n| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |")  # fmt: skip
    for who, outcomes in ended.items():
        if not outcomes:
            print(f"| {who.cache} | {who.name} | failed in each round |")
            continue
        limit = next((middle[other] for other in middle if other.kind == "limit"), None)
        peer = max(
            (middle[other] for other in middle if (other.kind, other.cache) == ("peer", who.cache)), default=None
        )
        of_limit, of_peer = (middle[who] / beside if beside else None for beside in (limit, peer))
        verdicts = []
        if who.kind == "ours" and who.cache == "warm":
            name = who.name.replace(" mixed", " unmixed")
            beside = [ended[one] for one in ended if (one.name, one.cache) == (name, who.cache) and one != who]
            unmixed = max(map(rate, outcomes)) / max(map(rate, beside[0])) if beside else None  # best: others slow both
            wanted = (
                (of_peer, OF_PEER, "of peer"), (of_limit, OF_COPY, "of copy"), (unmixed, OF_UNMIXED, "of unmixed, best")
            )  # fmt: skip
            verdicts = [
                f"{reached:.2f} ≥ {least} {what}: {'yes' if reached >= least else '**no**'}"
                for reached, least, what in wanted
                if reached is not None
            ]
        cells = [
            who.cache,
            who.name,
            f"{median(one.result['tokens'] for one in outcomes) / 1e6:.0f}",
            f"{max(rate(one) for one in outcomes):,.1f}",
            f"{middle[who]:,.1f}",
            f"{of_limit:.3f}" if of_limit else "",
            f"{of_peer:.2f}" if of_peer else "",
            f"{median(steady(one) for one in outcomes):,.1f}",
            f"{1e3 * median(one.result['first_seconds'] for one in outcomes):,.0f}",
            f"{median(one.foreign for one in outcomes):.0%}",
            ", ".join([f"{rate(one):,.1f}" for one in outcomes] + ["failed"] * (len(rounds) - len(outcomes))),
            ", ".join(verdicts),
        ]
        print(f"| {' | '.join(cells)} |")


def prepare(
    folder: Path, caches: list[str], peers: str | None, tokens: int, server: servers.Server | None
) -> dict[str, str]:
    """Writes everybody's files; returns the URL of our store for each cache."""
    columns = write_shards(folder / SHARDS, folder / WHOLE, tokens)
    urls = {}
    if "warm" in caches:
        urls["warm"] = str(folder / "store")
    if server:
        os.environ |= server.environment
        urls["cold"] = f"s3://{servers.BUCKET}/ours"
    for url in urls.values():
        store = open_store(url, create=True)
        mixes = {mix: put_mix(store, folder / SHARDS, columns, weights) for mix, weights in MIXES.items()}
        (folder / MIXES_FILE).write_text(json.dumps(mixes))
    if peers:
        words = [peers, str(PEERS), "write", str(folder / SHARDS), str(folder / "peers")]
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if server:
            put_peers(folder / "peers")
    return urls


def put_peers(folder: Path) -> None:
    client = boto3.client("s3")
    for path in folder.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), servers.BUCKET, f"peers/{path.relative_to(folder)}")


def versions(peers: str | None) -> str:
    text = f"torch {torch.__version__}, numpy {np.__version__}"
    if peers:
        asked = subprocess.run([peers, str(PEERS), "versions"], capture_output=True, text=True, check=False)
        if asked.returncode:
            sys.exit(f"--peers {peers}: {asked.stderr.strip()[-500:]}. The head of this file says how to install them.")
        theirs = json.loads(asked.stdout.splitlines()[-1])
        text += "; peers: " + ", ".join(f"{name} {number}" for name, number in theirs.items())
    return text


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers", help="the Python of an environment that has the peers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=[""], help="contenders whose name holds one of these")
    parser.add_argument("--caches", default="warm,cold", choices=("warm", "cold", "warm,cold"))
    parser.add_argument("--seconds", type=float, default=10.0, help="after which a slow contender stops")
    parser.add_argument("--tokens", type=int, default=64_000_000)
    asked = parser.parse_args()
    caches = asked.caches.split(",")
    print(f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {asked.rounds} rounds, {asked.tokens:,} tokens, at most "  # noqa: E501
          f"{asked.seconds:g} s each, Python {platform.python_version()}, {versions(asked.peers)}\n", flush=True)  # fmt: skip  # noqa: E501
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as name:
        folder = Path(name)
        server = servers.start("seaweedfs", folder / "server") if "cold" in caches else None
        try:
            urls = prepare(folder, caches, asked.peers, asked.tokens, server)
            everyone = [
                who for who in contenders(folder, urls, asked.peers) if any(part in who.name for part in asked.only)
            ]
            last = [str(asked.tokens), str(asked.seconds)]
            rounds = [one_round(everyone, number, last, folder, server) for number in range(asked.rounds)]
        finally:
            if server:
                server.stop()
    table(everyone, rounds)


if __name__ == "__main__":
    if sys.argv[1:2] in (["ours"], ["copy"], ["nanogpt"]):
        {"ours": ours, "copy": copy, "nanogpt": nanogpt}[sys.argv[1]](*sys.argv[2:])
    else:
        main()

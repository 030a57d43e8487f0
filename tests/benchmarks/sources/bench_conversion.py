"""Compressed files to parquet: our conversion beside `datasets.load_dataset(…).to_parquet`. Prints one table.

    python tests/benchmarks/sources/bench_conversion.py --corpus FOLDER [--rounds 3] [--megabytes 300] [--only NAME ...]

FOLDER holds parquet files with a `text` column. Their documents are written again, with their words in another order
each time so that no two are alike, until there are so many megabytes of text, in each format. Every contender works in
a fresh process each round, in turn. The work is from the first byte read to the parquet file on the disk; ours also
hashes it, and puts file and record into a store. The peak is the process's own, imports and all.
"""

import argparse
import json
import platform
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median

import pyarrow.parquet as pq

from tests.corpora import COMPRESS, FORMATS

OURS = """
import json, resource, sys, time
from storage.sources import mirror, reading
from storage.stores.opening import open_store
path, folder = sys.argv[1:]
mirror.FOLDER, reading.REMEMBERED = mirror.Path(folder) / "incoming", mirror.Path(folder) / "digests"
store, file = open_store(folder, create=True), reading.identify(path)
began = time.monotonic()
copy = mirror.mirror(store, file)
seconds = time.monotonic() - began
"""
PEER = """
import json, resource, sys, time
import datasets
path, folder = sys.argv[1:]
kind = "csv" if ".csv" in path else "json"
began = time.monotonic()
made = datasets.load_dataset(kind, data_files=path, split="train", cache_dir=folder)
made.to_parquet(folder + "/out.parquet")
seconds = time.monotonic() - began
"""
END = """
peak = next(int(line.split()[1]) / 1e3 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({"seconds": seconds, "peak": peak}))
"""
CONTENDERS = {"ours": OURS, "datasets.to_parquet": PEER}
KINDS = {"jsonl.gz": "jsonl", "jsonl.xz": "jsonl", "json.gz, one array": "json array", "csv.gz": "csv"}


def documents(corpus: Path, size_bytes: int) -> Iterator[dict[str, object]]:
    """Rows like those of C4, until they hold so many bytes of text."""
    texts = [text for path in sorted(corpus.glob("*.parquet")) for text in pq.read_table(path)["text"].to_pylist()]
    if not texts:
        sys.exit(f"--corpus {corpus}: parquet files with a `text` column were expected, found no documents.")
    drawn, written, number = random.Random(0), 0, 0  # only shuffles words
    while written < size_bytes:
        words = texts[number % len(texts)].split(" ")
        drawn.shuffle(words)
        text = " ".join(words)
        yield {"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": f"https://example.com/{number}", "score": 3.25}
        written, number = written + len(text.encode()), number + 1


def timed(code: str, path: Path) -> dict[str, float]:
    """The seconds and the peak in MB of one conversion in a fresh process."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        done = subprocess.run([sys.executable, "-c", code + END, path, folder], capture_output=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--only", nargs="*", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    made = ", ".join(f"{name} {version(name)}" for name in ("pyarrow", "datasets"))
    print(f"{datetime.now(UTC):%Y-%m-%d}, {args.megabytes:,} MB of text, {args.rounds} rounds, Python "
          f"{platform.python_version()}, {made}\n")  # fmt: skip
    print("| file | MB | contender | MB/s compressed (best) | (median) | of the peer | MB/s of text | peak MB |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        rows = list(documents(args.corpus, args.megabytes * 1_000_000))
        for name in args.only:
            suffix, write = FORMATS[KINDS[name]]
            compression = "." + name.split(",")[0].rpartition(".")[2]
            path = Path(folder) / f"corpus{suffix}{compression}"
            path.write_bytes(COMPRESS[compression](write(rows)))
            results = [{who: timed(code, path) for who, code in CONTENDERS.items()} for _ in range(args.rounds)]
            size = path.stat().st_size / 1e6
            for who in CONTENDERS:
                seconds = [result[who]["seconds"] for result in results]
                ratio = median(result["datasets.to_parquet"]["seconds"] / result[who]["seconds"] for result in results)
                peak = max(result[who]["peak"] for result in results)
                print(f"| {name} | {size:,.0f} | {who} | {size / min(seconds):.1f} | {size / median(seconds):.1f} | "
                      f"{ratio:.2f} | {args.megabytes / median(seconds):,.0f} | {peak:,.0f} |", flush=True)  # fmt: skip
            path.unlink()


if __name__ == "__main__":
    main()

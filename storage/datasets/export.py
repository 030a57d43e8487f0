"""Writes a dataset as other trainers read it: nanoGPT's two files, or llm.c's shards with their header.

`export.json` comes first and says what the folder is to hold, so nothing else is ever mixed with it. Each file is
verified as it is read and appears under its name when it is whole: an export that was killed goes on.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from storage.datasets.manifest import Manifest
from storage.datasets.shards import DTYPE, read_shard
from storage.errors import StoreUnusable
from storage.stores.store import Store

# llm.c, dev/data/data_common.py and llmc/dataloader.h: 256 int32, of which the first three say magic, version, tokens
LLMC_HEADER, LLMC_MAGIC, LLMC_VERSION = 256, 20240520, 1
LLMC_TOKENS = 100_000_000  # about so many a file, as its own dev/data/fineweb.py writes them
NOTE = "export.json"


class Part(NamedTuple):
    """One file to write: its name, and which tokens of its split, from the first to the one after the last."""

    name: str
    split: str
    first: int
    last: int
    header_bytes: int

    @property
    def size_bytes(self) -> int:
        """What it has when it is whole."""
        return self.header_bytes + (self.last - self.first) * DTYPE.itemsize


def export(
    store: Store, dataset: str, manifest: Manifest, folder: Path, layout: str, come: Callable[[int], None]
) -> list[Path]:
    """Write what is missing of both splits into the folder. Returns its files; `come` is told tokens that are there.

    Raises ShardCorrupt, ObjectMissing, and StoreUnusable when the folder cannot be written or holds something else.
    """
    parts = [part for split in ("train", "val") for part in _parts(manifest, dataset, split, layout)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _claim(folder, {"dataset": dataset, "manifest": manifest.digest, "format": layout})
        for part in parts:
            path = folder / part.name
            if path.exists() and path.stat().st_size == part.size_bytes:
                come(part.last - part.first)
                continue
            with _whole(path) as file:
                _write(store, dataset, manifest, part, file, come)
    except OSError as error:
        raise StoreUnusable(
            f"folder {folder}: {sum(part.size_bytes for part in parts):,} bytes were to be written there, found "
            f"{error}. Free some space, mend its mode or give another folder, then run the same command again: it goes "
            f"on."
        ) from error
    return [folder / part.name for part in parts]


def _parts(manifest: Manifest, dataset: str, split: str, layout: str) -> Iterator[Part]:
    total = sum(row.tokens for row in manifest.rows(split))
    if layout == "nanogpt":
        yield Part(f"{split}.bin", split, 0, total, 0)
        return
    # llm.c globs for the split's name, and wants a batch of all ranks in each file: all are as long as can be.
    count = max(round(total / LLMC_TOKENS), 1)
    for number in range(count):
        first, last = number * total // count, (number + 1) * total // count
        yield Part(f"{dataset}_{split}_{number:06d}.bin", split, first, last, 4 * LLMC_HEADER)


def _claim(folder: Path, asked: dict[str, Any]) -> None:
    """Say what the folder is to hold, unless it says so already. Raises StoreUnusable when it holds something else."""
    note = folder / NOTE
    try:
        found = json.loads(note.read_text())
    except FileNotFoundError:
        found = asked
        if there := sorted(path.name for path in folder.glob("*.bin")):
            found = {"files of another program": there[:5]}
    except ValueError:
        found = {"what is no JSON": NOTE}
    if found != asked:
        raise StoreUnusable(
            f"folder {folder}: it was to hold {json.dumps(asked)}, it holds {json.dumps(found)}. Give another folder, "
            f"or empty it."
        )
    if not note.exists():
        with _whole(note) as file:
            file.write(json.dumps(asked).encode())


def _write(
    store: Store, dataset: str, manifest: Manifest, part: Part, file: BinaryIO, come: Callable[[int], None]
) -> None:
    if part.header_bytes:
        words = np.zeros(LLMC_HEADER, "<i4")
        words[:3] = LLMC_MAGIC, LLMC_VERSION, part.last - part.first
        file.write(words.tobytes())
    rows = list(manifest.rows(part.split))
    starts = accumulate((row.tokens for row in rows), initial=0)
    for row, (start, stop) in zip(rows, pairwise(starts), strict=True):
        if start < part.last and stop > part.first:
            body = memoryview(read_shard(store, dataset, row.shard_id, row.tokens, row.sha256))
            begin, end = max(part.first - start, 0), min(part.last, stop) - start
            file.write(body[begin * DTYPE.itemsize : end * DTYPE.itemsize])
            come(end - begin)


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file that has its name only when all of it is on the disk."""
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)

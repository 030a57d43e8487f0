"""Writes a dataset as other trainers read it: nanoGPT's two files, or llm.c's shards with their header.

What is written is verified as it is read, appears under its name when it is whole, and is described by `export.json`,
written last: an export that was killed is made again, a finished one is not.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from storage.errors import StoreUnusable
from storage.manifest import Manifest, ShardRow
from storage.shards import read_shard
from storage.store import Store

FORMATS = ("nanogpt", "llmc")
# llm.c, dev/data/data_common.py and llmc/dataloader.h: 256 int32, of which the first three say magic, version, tokens
LLMC_HEADER, LLMC_MAGIC, LLMC_VERSION = 256, 20240520, 1
LLMC_TOKENS = 100_000_000  # about so many a file, as its own dev/data/fineweb.py writes them
DONE = "export.json"


def export(
    store: Store, dataset: str, manifest: Manifest, folder: Path, layout: str, come: Callable[[ShardRow], None]
) -> list[Path]:
    """Write both splits into the folder. Returns its files; `come` is told each shard that is written.

    Raises ShardCorrupt, ObjectMissing, and StoreUnusable when the folder cannot be written or holds something else.
    """
    note = {"dataset": dataset, "manifest": manifest.digest, "format": layout}
    names = list(_names(manifest, dataset, layout))
    done = folder / DONE
    try:
        if done.exists() and json.loads(done.read_text()) != note:
            raise StoreUnusable(
                f"folder {folder}: it was to hold {dataset} {manifest.digest[:12]} as {layout}, {done} says that it "
                f"holds {done.read_text()[:200]}. Give another folder, or empty it."
            )
        if not done.exists():
            folder.mkdir(parents=True, exist_ok=True)
            for name, rows in names:
                with _whole(folder / name) as file:
                    _write(store, dataset, rows, file, come, header=layout == "llmc")
            with _whole(done) as file:
                file.write(json.dumps(note).encode())
    except (OSError, ValueError) as error:
        raise StoreUnusable(
            f"folder {folder}: {sum(len(rows) for _, rows in names):,} shards were to be written there, found {error}. "
            f"Free some space, mend its mode or give another folder, then run the same command again."
        ) from error
    return [folder / name for name, _ in names]


def _names(manifest: Manifest, dataset: str, layout: str) -> Iterator[tuple[str, Sequence[ShardRow]]]:
    """The files to write, and the shards that each holds."""
    for split in ("train", "val"):
        rows = list(manifest.rows(split))
        if layout == "nanogpt":
            yield f"{split}.bin", rows
            continue
        # llm.c globs for the split's name, and wants a batch of all ranks in each file: no short ones.
        total = sum(row.tokens for row in rows)
        count = max(round(total / LLMC_TOKENS), 1)
        groups: list[list[ShardRow]] = [[] for _ in range(count)]
        start = 0
        for row in rows:
            groups[start * count // total].append(row)
            start += row.tokens
        yield from ((f"{dataset}_{split}_{number:06d}.bin", group) for number, group in enumerate(groups) if group)


def _write(
    store: Store,
    dataset: str,
    rows: Sequence[ShardRow],
    file: BinaryIO,
    come: Callable[[ShardRow], None],
    *,
    header: bool,
) -> None:
    if header:
        words = np.zeros(LLMC_HEADER, "<i4")
        words[:3] = LLMC_MAGIC, LLMC_VERSION, sum(row.tokens for row in rows)
        file.write(words.tobytes())
    for row in rows:
        file.write(read_shard(store, dataset, row.shard_id, row.tokens, row.sha256))
        come(row)


@contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file that has its name only when all of it is on the disk."""
    part = path.with_name(f"{path.name}.part")
    with part.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)

"""Writes a dataset as nanoGPT's two files or as llm.c's shards. An export is verified, and complete or absent."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from storage.datasets.manifest import Manifest
from storage.datasets.records import DTYPE
from storage.datasets.shards import read_shard
from storage.errors import StoreUnusable
from storage.stores.store import Store

# llm.c, dev/data/data_common.py and llmc/dataloader.h: 256 int32: magic, version, tokens, then zeros
LLMC_HEADER, LLMC_MAGIC, LLMC_VERSION = 256, 20240520, 1
LLMC_TOKENS = 100_000_000  # about this many tokens per file, as in llm.c's dev/data/fineweb.py


class Part(NamedTuple):
    """One file to write: a header, then tokens `first` to `last - 1` of a split."""

    name: str
    split: str
    header: bytes
    first: int
    last: int


def export(
    store: Store, dataset: str, manifest: Manifest, folder: Path, layout: str, on_progress: Callable[[int], None]
) -> list[Path]:
    """Write both splits into a new or empty folder. Raises ShardCorrupt, ObjectMissing, StoreUnusable."""
    parts = [part for split in ("train", "val") for part in _parts(manifest, dataset, split, layout)]
    size_bytes = sum(len(part.header) + (part.last - part.first) * DTYPE.itemsize for part in parts)
    with new_folder(folder, size_bytes) as unfinished:
        for part in parts:
            with (unfinished / part.name).open("wb") as file:
                _write(store, dataset, manifest, part, file, on_progress)
    return [folder / part.name for part in parts]


@contextmanager
def new_folder(folder: Path, size_bytes: int) -> Iterator[Path]:
    """Yield a folder that becomes `folder` after the block, complete and synced or not at all. Raises StoreUnusable."""
    if ":/" in str(folder):  # a URL, whose Path would be a folder here
        raise StoreUnusable(f"cannot export to {folder}: only a folder on this host can be written. Give its path.")
    unfinished = folder.absolute().with_name(f".{folder.absolute().name}.part")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise StoreUnusable(f"cannot export to {folder}: it is not an empty folder. Give a new or an empty one.")
        shutil.rmtree(unfinished, ignore_errors=True)  # left by a killed export
        unfinished.mkdir(parents=True)
        yield unfinished
        for path in unfinished.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        unfinished.replace(folder)
    except OSError as error:
        remedy = "Free some space, fix the folder's permissions, or give another folder."
        raise StoreUnusable(f"cannot export {size_bytes:,} bytes to {folder}: {error}. {remedy}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _parts(manifest: Manifest, dataset: str, split: str, layout: str) -> Iterator[Part]:
    total = sum(row.tokens for row in manifest.rows(split))
    if layout == "nanogpt":
        yield Part(f"{split}.bin", split, b"", 0, total)
        return
    # llm.c globs for the split's name, and each file must hold a batch for all ranks, so all files are equally long.
    count = max(round(total / LLMC_TOKENS), 1)
    for number in range(count):
        first, last = number * total // count, (number + 1) * total // count
        header = np.zeros(LLMC_HEADER, "<i4")
        header[:3] = LLMC_MAGIC, LLMC_VERSION, last - first
        yield Part(f"{dataset}_{split}_{number:06d}.bin", split, header.tobytes(), first, last)


def _write(
    store: Store, dataset: str, manifest: Manifest, part: Part, file: BinaryIO, on_progress: Callable[[int], None]
) -> None:
    file.write(part.header)
    rows = list(manifest.rows(part.split))
    starts = accumulate((row.tokens for row in rows), initial=0)
    for row, (start, stop) in zip(rows, pairwise(starts), strict=True):
        if start < part.last and stop > part.first:
            body = memoryview(read_shard(store, dataset, row))
            begin, end = max(part.first - start, 0), min(part.last, stop) - start
            file.write(body[begin * DTYPE.itemsize : end * DTYPE.itemsize])
            on_progress(end - begin)

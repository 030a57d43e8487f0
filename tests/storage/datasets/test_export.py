"""An export holds the tokens of the shards in order, as nanoGPT and llm.c read them, or leaves no file."""

import errno
import os
from collections.abc import Callable, Iterator
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from storage.datasets import export as module
from storage.datasets.export import export
from storage.datasets.manifest import Manifest
from storage.errors import ShardCorrupt, StoreUnusable
from storage.keys import DatasetKeys
from storage.sources import reading
from storage.stores.store import Store
from tests.crawl import Crawl
from tests.damage import flip_bit

FILE_TOKENS = 1_500  # tokens of an llm.c file in these tests: several shards each


class Exporter(NamedTuple):
    """Exports the newest version of a dataset (3 source files, about 15 shards) to a folder."""

    crawl: Crawl
    manifest: Manifest
    to: Path

    @property
    def store(self) -> Store:
        return self.crawl.store

    def export(self, layout: str, on_progress: Callable[[Any], object] = lambda _: None, **other: Any) -> list[Path]:
        arguments = {"store": self.store, "dataset": "small", "manifest": self.manifest, "folder": self.to} | other
        return export(**arguments, layout=layout, on_progress=on_progress)  # type: ignore[arg-type]

    def expected(self, split: str) -> np.ndarray:
        return self.crawl.ids(self.manifest, split)


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LLMC_TOKENS", FILE_TOKENS)


def build_crawl(folder: Path) -> tuple[Crawl, Manifest]:
    crawl = Crawl(folder, names=("file_0", "file_1", "file_2"))
    return crawl, crawl.build()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Crawl, Manifest]:
    folder = tmp_path_factory.mktemp("dataset")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "REMEMBERED", folder / "digests")
        return build_crawl(folder)


@pytest.fixture
def exporter(dataset: tuple[Crawl, Manifest], tmp_path: Path) -> Exporter:
    """With a shared dataset, for tests that do not change it."""
    return Exporter(*dataset, tmp_path / "a folder" / "to")


@pytest.fixture
def own_exporter(tmp_path: Path) -> Exporter:
    return Exporter(*build_crawl(tmp_path), tmp_path / "a folder" / "to")


class LlmcLoader:
    """llm.c's DataLoader (llmc/dataloader.h) in one process: its assertions and its batches."""

    def __init__(self, pattern: str, B: int, T: int) -> None:
        self.paths = [Path(name) for name in sorted(glob(pattern))]  # noqa: PTH207  # as glob(3) sorts them
        assert self.paths
        self._batch_tokens = B * T
        self.file_tokens = [self._tokens(path) for path in self.paths]
        assert min(self.file_tokens) >= self._batch_tokens + 1

    @staticmethod
    def _tokens(path: Path) -> int:
        header = np.fromfile(path, "<i4", 256)
        assert header[:2].tolist() == [20240520, 1]
        assert not header[3:].any()
        assert path.stat().st_size == 1024 + int(header[2]) * 2
        return int(header[2])

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """One epoch: inputs and targets."""
        for path, tokens in zip(self.paths, self.file_tokens, strict=True):
            for index in range((2 * tokens - 2) // (2 * self._batch_tokens)):
                with path.open("rb") as file:
                    file.seek(1024 + index * 2 * self._batch_tokens)
                    buffer = np.frombuffer(file.read(2 * (self._batch_tokens + 1)), "<u2")
                yield buffer[:-1], buffer[1:]

    def stream(self) -> np.ndarray:
        return np.concatenate([np.fromfile(path, "<u2", offset=1024) for path in self.paths])


def files_of(folder: Path) -> dict[str, tuple[int, int, int]]:
    """The files of a folder: inode, modification time and size by name."""
    stats = {path.name: path.stat() for path in folder.iterdir()} if folder.exists() else {}
    return {name: (stat.st_ino, stat.st_mtime_ns, stat.st_size) for name, stat in stats.items()}


def assert_complete(exporter: Exporter, layout: str) -> None:
    """Assert that the reader of this layout gets the tokens of both splits."""
    for split in ("train", "val"):
        if layout == "nanogpt":
            tokens: np.ndarray = np.memmap(exporter.to / f"{split}.bin", dtype=np.uint16, mode="r")
        else:
            tokens = LlmcLoader(f"{exporter.to}/*_{split}_*.bin", 1, 32).stream()
        assert np.array_equal(tokens, exporter.expected(split))


# Readers


def test_nanogpt_maps_the_tokens_of_each_split_in_order(exporter: Exporter) -> None:
    progress: list[int] = []
    written = exporter.export("nanogpt", progress.append)
    assert [path.name for path in written] == ["train.bin", "val.bin"]
    assert_complete(exporter, "nanogpt")
    assert sorted(progress) == sorted(row.tokens for row in exporter.manifest.rows())
    assert set(files_of(exporter.to)) == {"train.bin", "val.bin"}
    # get_batch of nanoGPT's train.py
    data: np.ndarray = np.memmap(exporter.to / "train.bin", dtype=np.uint16, mode="r")
    expected = exporter.expected("train").tolist()
    for start in np.random.default_rng(0).integers(len(data) - 32, size=20).tolist():
        assert data[start : start + 32].astype(np.int64).tolist() == expected[start : start + 32]


def test_llmc_reads_its_batches_from_files_of_similar_size(exporter: Exporter) -> None:
    written = exporter.export("llmc")
    assert_complete(exporter, "llmc")
    assert set(files_of(exporter.to)) == {path.name for path in written}
    loader = LlmcLoader(f"{exporter.to}/small_train_*.bin", 4, 32)
    assert loader.paths == [path for path in written if "_train_" in path.name]
    assert len(loader.paths) == round(len(exporter.expected("train")) / FILE_TOKENS) > 3
    assert min(loader.file_tokens) > FILE_TOKENS / 2
    assert max(loader.file_tokens) < FILE_TOKENS * 2
    assert len(LlmcLoader(f"{exporter.to}/small_val_*.bin", 4, 32).paths) == 1
    start = 0
    batches = loader.batches()
    for tokens in loader.file_tokens:
        ids = exporter.expected("train")[start : start + tokens]
        for first in range(0, tokens - 128, 128):
            inputs, targets = next(batches)
            assert np.array_equal(inputs, ids[first : first + 128])
            assert np.array_equal(targets, ids[first + 1 : first + 129])
        start += tokens
    assert next(batches, None) is None


@pytest.mark.parametrize("file_tokens", [400, 700, 1_000])
def test_no_llmc_file_is_short_when_shards_are_as_large_as_files(
    exporter: Exporter, monkeypatch: pytest.MonkeyPatch, file_tokens: int
) -> None:
    """As with data.shard_tokens = 100,000,000: llm.c refuses a file with less than a batch for all ranks."""
    monkeypatch.setattr(module, "LLMC_TOKENS", file_tokens)
    exporter.export("llmc")
    loader = LlmcLoader(f"{exporter.to}/small_train_*.bin", 1, 32)
    assert min(loader.file_tokens) > file_tokens / 2
    assert np.array_equal(loader.stream(), exporter.expected("train"))


# Complete or absent


class Stopped(Exception):
    """Interrupts an export."""


@pytest.mark.parametrize("layout", ("nanogpt", "llmc"))
def test_an_interrupted_export_leaves_no_file_and_can_be_repeated(exporter: Exporter, layout: str) -> None:
    complete = {path.name: path.read_bytes() for path in exporter.export(layout)}
    for stop in range(0, len(exporter.manifest.shard_ids), 3):
        to, remaining = exporter.to.with_name(f"stopped-{stop}"), iter(range(stop))

        def stop_midway(_: object, remaining: Iterator[int] = remaining) -> None:
            if next(remaining, None) is None:
                raise Stopped

        with pytest.raises(Stopped):
            exporter.export(layout, stop_midway, folder=to)
        assert not to.exists()
        exporter.export(layout, folder=to)
        assert {path.name: path.read_bytes() for path in to.iterdir()} == complete


@pytest.mark.parametrize("layout", ("nanogpt", "llmc"))
def test_the_partial_files_of_a_killed_export_are_replaced(exporter: Exporter, layout: str) -> None:
    unfinished = exporter.to.with_name(f".{exporter.to.name}.part")
    unfinished.mkdir(parents=True)
    (unfinished / "train.bin").write_bytes(b"of another version")
    (unfinished / "small_train_000099.bin").write_bytes(b"of another version")
    exporter.to.mkdir()  # an empty folder may exist
    exporter.export(layout)
    assert_complete(exporter, layout)
    assert [path.name for path in exporter.to.parent.iterdir()] == [exporter.to.name]


@pytest.mark.parametrize("layout", ("nanogpt", "llmc"))
def test_existing_files_are_not_replaced(exporter: Exporter, layout: str) -> None:
    """For example those of nanoGPT's own prepare.py."""
    name = {"nanogpt": "train.bin", "llmc": "small_train_000000.bin"}[layout]
    exporter.to.mkdir(parents=True)
    (exporter.to / name).write_bytes(b"hours of work")
    with pytest.raises(StoreUnusable, match=str(exporter.to)):
        exporter.export(layout)
    assert (exporter.to / name).read_bytes() == b"hours of work"


@pytest.mark.parametrize("layout", ("nanogpt", "llmc"))
def test_an_export_refuses_a_damaged_shard(own_exporter: Exporter, layout: str) -> None:
    row = list(own_exporter.manifest.rows("train"))[-1]
    flip_bit(own_exporter.store, DatasetKeys("small").shard(row.shard_id), 10)
    with pytest.raises(ShardCorrupt, match=row.shard_id):
        own_exporter.export(layout)
    assert not own_exporter.to.exists()


def test_a_url_is_refused(exporter: Exporter) -> None:
    with pytest.raises(StoreUnusable, match="only a folder on this host"):
        exporter.export("nanogpt", folder=Path("s3://bucket/x"))
    assert not Path("s3:").exists()


@pytest.mark.parametrize("place", ["a file", "below a file", "a full disk"])
def test_a_folder_that_cannot_be_written_is_named(
    exporter: Exporter, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    exporter.to.parent.mkdir()
    to = exporter.to / "deeper" if place == "below a file" else exporter.to
    if place == "a full disk":

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(module.os, "fsync", full)
    else:
        exporter.to.write_text("taken")
    with pytest.raises(StoreUnusable, match=str(to)):
        exporter.export("nanogpt", folder=to)
    assert place != "a full disk" or not to.exists()

"""An export is what nanoGPT and llm.c read: the tokens of the shards in order, whole or not there."""

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
from storage.sources import identity
from storage.stores.store import Store, overwrite
from tests.crawl import Crawl

FILE_TOKENS = 1_500  # of an llm.c file here: several shards each


class House(NamedTuple):
    """A dataset of 3 source files and about 15 shards, its newest version, and a folder to export to."""

    crawl: Crawl
    manifest: Manifest
    to: Path

    @property
    def store(self) -> Store:
        return self.crawl.store

    def export(self, layout: str, on_progress: Callable[[Any], object] = lambda _: None, **other: Any) -> list[Path]:
        asked = {"store": self.store, "dataset": "small", "manifest": self.manifest, "folder": self.to} | other
        return export(**asked, layout=layout, on_progress=on_progress)  # type: ignore[arg-type]

    def expected(self, split: str) -> np.ndarray:
        return self.crawl.ids(self.manifest, split)


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LLMC_TOKENS", FILE_TOKENS)


def made(folder: Path) -> tuple[Crawl, Manifest]:
    crawl = Crawl(folder, names=("file_0", "file_1", "file_2"))
    return crawl, crawl.build()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Crawl, Manifest]:
    folder = tmp_path_factory.mktemp("dataset")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity, "REMEMBERED", folder / "digests")
        return made(folder)


@pytest.fixture
def house(dataset: tuple[Crawl, Manifest], tmp_path: Path) -> House:
    """For tests that do not change the dataset."""
    return House(*dataset, tmp_path / "a folder" / "to")


@pytest.fixture
def own_house(tmp_path: Path) -> House:
    return House(*made(tmp_path), tmp_path / "a folder" / "to")


class LlmcLoader:
    """llm.c's DataLoader (llmc/dataloader.h) of one process: what it asserts, and the batches that it gives."""

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
    """What is in a folder, and when it was written by which file."""
    found = {path.name: path.stat() for path in folder.iterdir()} if folder.exists() else {}
    return {name: (one.st_ino, one.st_mtime_ns, one.st_size) for name, one in found.items()}


def assert_whole(house: House, layout: str) -> None:
    """Both splits are there, each as its reader takes it, and nothing beside them."""
    for split in ("train", "val"):
        if layout == "nanogpt":
            found: np.ndarray = np.memmap(house.to / f"{split}.bin", dtype=np.uint16, mode="r")
        else:
            found = LlmcLoader(f"{house.to}/*_{split}_*.bin", 1, 32).stream()
        assert np.array_equal(found, house.expected(split))


# What the readers find


def test_nanogpt_maps_the_tokens_of_each_split_in_order(house: House) -> None:
    told: list[int] = []
    written = house.export("nanogpt", told.append)
    assert [path.name for path in written] == ["train.bin", "val.bin"]
    assert_whole(house, "nanogpt")
    assert sorted(told) == sorted(row.tokens for row in house.manifest.rows())
    assert set(files_of(house.to)) == {"train.bin", "val.bin"}
    # get_batch of nanoGPT's train.py
    data: np.ndarray = np.memmap(house.to / "train.bin", dtype=np.uint16, mode="r")
    expected = house.expected("train").tolist()
    for start in np.random.default_rng(0).integers(len(data) - 32, size=20).tolist():
        assert data[start : start + 32].astype(np.int64).tolist() == expected[start : start + 32]


def test_llmc_reads_its_batches_from_files_of_about_one_size(house: House) -> None:
    written = house.export("llmc")
    assert_whole(house, "llmc")
    assert set(files_of(house.to)) == {path.name for path in written}
    loader = LlmcLoader(f"{house.to}/small_train_*.bin", 4, 32)
    assert loader.paths == [path for path in written if "_train_" in path.name]
    assert len(loader.paths) == round(len(house.expected("train")) / FILE_TOKENS) > 3
    assert min(loader.file_tokens) > FILE_TOKENS / 2
    assert max(loader.file_tokens) < FILE_TOKENS * 2
    assert len(LlmcLoader(f"{house.to}/small_val_*.bin", 4, 32).paths) == 1
    start = 0
    batches = loader.batches()
    for tokens in loader.file_tokens:
        ids = house.expected("train")[start : start + tokens]
        for first in range(0, tokens - 128, 128):
            inputs, targets = next(batches)
            assert np.array_equal(inputs, ids[first : first + 128])
            assert np.array_equal(targets, ids[first + 1 : first + 129])
        start += tokens
    assert next(batches, None) is None


@pytest.mark.parametrize("file_tokens", [400, 700, 1_000])
def test_no_file_of_llmc_is_short_where_shards_are_as_large_as_files(
    house: House, monkeypatch: pytest.MonkeyPatch, file_tokens: int
) -> None:
    """As with data.shard_tokens = 100,000,000: llm.c gives up at a file that holds less than a batch of all ranks."""
    monkeypatch.setattr(module, "LLMC_TOKENS", file_tokens)
    house.export("llmc")
    loader = LlmcLoader(f"{house.to}/small_train_*.bin", 1, 32)
    assert min(loader.file_tokens) > file_tokens / 2
    assert np.array_equal(loader.stream(), house.expected("train"))


# Whole or not there


class Stopped(Exception):
    """What ends an export midway."""


@pytest.mark.parametrize("layout", ("nanogpt", "llmc"))
def test_an_export_that_ends_midway_leaves_nothing_and_runs_again(house: House, layout: str) -> None:
    whole = {path.name: path.read_bytes() for path in house.export(layout)}
    for stop in range(0, len(house.manifest.shard_ids), 3):
        to, remaining = house.to.with_name(f"stopped-{stop}"), iter(range(stop))

        def stop_midway(_: object, remaining: Iterator[int] = remaining) -> None:
            if next(remaining, None) is None:
                raise Stopped

        with pytest.raises(Stopped):
            house.export(layout, stop_midway, folder=to)
        assert not to.exists()
        house.export(layout, folder=to)
        assert {path.name: path.read_bytes() for path in to.iterdir()} == whole


@pytest.mark.parametrize("layout", ("nanogpt", "llmc"))
def test_what_a_killed_export_left_is_replaced(house: House, layout: str) -> None:
    unfinished = house.to.with_name(f".{house.to.name}.part")
    unfinished.mkdir(parents=True)
    (unfinished / "train.bin").write_bytes(b"of another version")
    (unfinished / "small_train_000099.bin").write_bytes(b"of another version")
    house.to.mkdir()  # an empty folder is as good as none
    house.export(layout)
    assert_whole(house, layout)
    assert [path.name for path in house.to.parent.iterdir()] == [house.to.name]


@pytest.mark.parametrize("layout", ("nanogpt", "llmc"))
def test_files_that_are_not_ours_are_not_replaced(house: House, layout: str) -> None:
    """As when nanoGPT's own prepare.py has been there."""
    name = {"nanogpt": "train.bin", "llmc": "small_train_000000.bin"}[layout]
    house.to.mkdir(parents=True)
    (house.to / name).write_bytes(b"hours of work")
    with pytest.raises(StoreUnusable, match=str(house.to)):
        house.export(layout)
    assert (house.to / name).read_bytes() == b"hours of work"


@pytest.mark.parametrize("layout", ("nanogpt", "llmc"))
def test_a_damaged_shard_ends_an_export(own_house: House, layout: str) -> None:
    row = list(own_house.manifest.rows("train"))[-1]
    key = DatasetKeys("small").shard(row.shard_id)
    body = bytearray(own_house.store.read(key).body)
    body[10] ^= 1
    overwrite(own_house.store, key, bytes(body))
    with pytest.raises(ShardCorrupt, match=row.shard_id):
        own_house.export(layout)
    assert not own_house.to.exists()


@pytest.mark.parametrize("place", ["a file", "below a file", "a full disk"])
def test_a_folder_that_cannot_be_written_is_named(house: House, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    house.to.parent.mkdir()
    to = house.to / "deeper" if place == "below a file" else house.to
    if place == "a full disk":

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(module.os, "fsync", full)
    else:
        house.to.write_text("taken")
    with pytest.raises(StoreUnusable, match=str(to)):
        house.export("nanogpt", folder=to)
    assert place != "a full disk" or not to.exists()

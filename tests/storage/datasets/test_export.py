"""An export is what nanoGPT and llm.c read: the tokens of the shards in order, whole or not there."""

import json
from collections.abc import Callable, Iterator
from glob import glob
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from storage.datasets import export as module
from storage.datasets.export import NOTE, export
from storage.datasets.manifest import Manifest
from storage.errors import ShardCorrupt, StoreUnusable
from storage.keys import DatasetKeys
from storage.sources import files as sources
from storage.stores.store import Store, overwrite
from tests.crawl import Crawl, crawled

FILE_TOKENS = 1_500  # of an llm.c file here: several shards each


class House(NamedTuple):
    """A dataset of 3 source files and about 15 shards, its newest version, and a folder to export to."""

    crawl: Crawl
    manifest: Manifest
    to: Path

    @property
    def store(self) -> Store:
        return self.crawl.store

    def export(self, layout: str, come: Callable[[Any], object] = lambda _: None, **other: Any) -> list[Path]:
        asked = {"store": self.store, "dataset": "small", "manifest": self.manifest, "folder": self.to} | other
        return export(**asked, layout=layout, come=come)  # type: ignore[arg-type]

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
        patch.setattr(sources, "REMEMBERED", folder / "digests")
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
    assert set(files_of(house.to)) == {"train.bin", "val.bin", NOTE}
    # get_batch of nanoGPT's train.py
    data: np.ndarray = np.memmap(house.to / "train.bin", dtype=np.uint16, mode="r")
    expected = house.expected("train").tolist()
    for start in np.random.default_rng(0).integers(len(data) - 32, size=20).tolist():
        assert data[start : start + 32].astype(np.int64).tolist() == expected[start : start + 32]


def test_llmc_reads_its_batches_from_files_of_about_one_size(house: House) -> None:
    written = house.export("llmc")
    assert_whole(house, "llmc")
    assert set(files_of(house.to)) == {path.name for path in written} | {NOTE}
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
def test_an_export_that_ends_midway_leaves_whole_files_and_goes_on(house: House, layout: str) -> None:
    whole = {path.name: path.read_bytes() for path in house.export(layout)}
    for stop in range(0, len(house.manifest.shard_ids), 3):
        to, left = house.to.with_name(f"stopped-{stop}"), stop

        def come(row: object) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Stopped

        with pytest.raises(Stopped):
            house.export(layout, come, folder=to)
        there = {path.name: path.read_bytes() for path in to.iterdir() if path.suffix != ".part"}
        assert there.pop(NOTE)  # says what the folder is to hold
        assert there == {name: body for name, body in whole.items() if name in there}
        house.export(layout, folder=to)
        assert {path.name: path.read_bytes() for path in to.glob("*.bin")} == whole
        assert set(files_of(to)) == {*whole, NOTE}


@pytest.mark.parametrize("layout", ("nanogpt", "llmc"))
def test_a_finished_export_writes_nothing_again(house: House, layout: str) -> None:
    written = house.export(layout)
    before = files_of(house.to)
    told: list[int] = []
    assert house.export(layout, told.append) == written
    assert sum(told) == sum(row.tokens for row in house.manifest.rows())
    assert files_of(house.to) == before


@pytest.mark.parametrize("layout", ("nanogpt", "llmc"))
def test_a_file_that_was_lost_since_is_written_again(house: House, layout: str) -> None:
    written = house.export(layout)
    written[0].unlink()
    house.export(layout)
    assert_whole(house, layout)


@pytest.mark.parametrize("other", ["dataset", "manifest", "format"])
def test_a_folder_that_holds_another_export_is_left_alone(own_house: House, other: str) -> None:
    own_house.export("nanogpt")
    before = files_of(own_house.to)
    own_house.crawl.write("file_2.parquet", None)
    asked: dict[str, dict[str, Any]] = {
        "dataset": {"dataset": "other"}, "manifest": {"manifest": own_house.crawl.build()}, "format": {}
    }  # fmt: skip
    with pytest.raises(StoreUnusable, match=str(own_house.to)):
        own_house.export("llmc" if other == "format" else "nanogpt", **asked[other])
    assert files_of(own_house.to) == before


def test_what_another_version_left_unfinished_is_not_taken_for_this_ones(own_house: House) -> None:
    own_house.crawl.write("file_3.parquet", [crawled(3, number) for number in range(40)])
    larger = own_house.crawl.build()

    def come(row: object) -> None:
        if (own_house.to / "small_val_000000.bin.part").exists():  # all of train is written
            raise Stopped

    with pytest.raises(Stopped):
        own_house.export("llmc", come, manifest=larger)
    try:
        own_house.export("llmc")
    except StoreUnusable:  # to refuse is as good
        return
    assert_whole(own_house, "llmc")


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
    tokens = sum(LlmcLoader._tokens(path) if layout == "llmc" else -1 for path in own_house.to.glob("*train*.bin"))
    assert 0 <= tokens < len(own_house.expected("train"))


@pytest.mark.parametrize("place", ["a file", "below a file", "taken names", "no JSON", "a full disk"])
def test_a_folder_that_cannot_be_written_is_said(house: House, place: str) -> None:
    house.to.parent.mkdir()
    to = house.to / "deeper" if place == "below a file" else house.to
    if place in ("a file", "below a file"):
        house.to.write_text("taken")
    elif place == "taken names":
        (to / "train.bin" / "inside").mkdir(parents=True)
    elif place == "no JSON":
        to.mkdir()
        (to / NOTE).write_text("{")
    else:
        to.mkdir()
        (to / "train.bin.part").symlink_to("/dev/full")
    with pytest.raises(StoreUnusable, match=str(to)):
        house.export("nanogpt", folder=to)


def test_the_note_says_what_the_folder_holds(house: House) -> None:
    house.export("nanogpt")
    note = json.loads((house.to / NOTE).read_text())
    assert note == {"dataset": "small", "manifest": house.manifest.digest, "format": "nanogpt"}

"""`gpt2 dataset verify` and `gpt2 dataset copy` as processes: exit codes, words that can be run as printed, kills."""

import json
import os
import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from model import tokenizer
from model.__main__ import run_job
from model.runs.job import put_job
from model.runs.run import pin_run, training_job
from storage import keys
from storage.datasets.manifest import Manifest, latest_manifest
from storage.inspection.verify import check_fully
from storage.keys import DatasetKeys
from storage.stores.opening import open_store
from storage.stores.store import Store, overwrite
from tests import servers
from tests.conftest import S3Url
from tests.flows.client import gpt2, poll, run_gpt2
from tests.making import build_dataset, document, tiny_config, write_parquet
from tests.model.training_runs import STEPS, final_weights, history
from tests.storage.store_kinds import SERVERS


class Built:
    """A working folder with a source, a store and a dataset; `words` ask for it."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder = folder
        for index in range(2):
            texts = [document(index * 40 + number) for number in range(40)]
            write_parquet(folder / "source" / f"file_{index}.parquet", texts)
        self.config = tiny_config(url, "source/*.parquet")
        with _inside(folder):
            self.manifest = build_dataset(self.config)
        self.store = open_store(url if url.startswith("s3") else str(folder / url))
        self.rows = list(self.manifest.rows())

    def words(self, url: str | None = None) -> list[str]:
        data = self.config.data
        values = {"store_url": url or self.config.store_url, "data.dataset": data.dataset, "data.source": data.source}
        values |= {"data.shard_tokens": data.shard_tokens, "data.val_shards": data.val_shards}
        return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]

    def verify(self, *words: str, url: str | None = None, api: str | None = None) -> tuple[int, str]:
        return run_gpt2("dataset", "verify", *words, *self.words(url), cwd=self.folder, api=api)

    def flip(self, place: int) -> str:
        """Rewrite a shard with another byte in it. Returns its name."""
        key = DatasetKeys("small").shard(self.rows[place].shard_id)
        body = bytearray(self.store.read(key).body)
        body[10] ^= 1
        overwrite(self.store, key, bytes(body))
        return self.rows[place].shard_id

    def records(self) -> set[str]:
        return {found.key for found in self.store.list(DatasetKeys("small").shards) if found.key.endswith(".json")}

    def times(self) -> dict[str, float]:
        return {found.key: found.modified for found in self.store.list(DatasetKeys("small").shards)}


class _inside:  # noqa: N801  # contextlib.chdir under the name of what it is for
    def __init__(self, folder: Path) -> None:
        self._folder, self._before = folder, Path.cwd()

    def __enter__(self) -> None:
        os.chdir(self._folder)

    def __exit__(self, *_: object) -> None:
        os.chdir(self._before)


@pytest.fixture
def built(tmp_path: Path) -> Built:
    return Built(tmp_path, "data")


# Verify


def test_a_whole_dataset_is_exit_code_0_at_every_depth(built: Built) -> None:
    total = len(built.rows)
    for words in ([], ["--quick"]):
        code, said = built.verify(*words)
        assert (code, f"{total} of {total} shards are whole" in said) == (0, True), said
    code, said = built.verify("--deep", "5", "--json")
    assert code == 0, said
    assert json.loads(said) == {
        "dataset": "small", "manifest": built.manifest.digest, "whole": total, "documents": 5, "damaged": [],
        "mend": None,
    }  # fmt: skip


def test_damage_is_exit_code_1_and_the_printed_command_mends_just_that(api: str, built: Built) -> None:
    name = built.flip(3)
    before = built.times()
    assert built.verify("--quick")[0] == 0  # a folder keeps no sums
    code, said = built.verify()
    assert (code, name in said, built.rows[2].shard_id in said) == (1, True, False)
    printed = said.partition("to mend")[2].strip()
    code, said = built.verify("--json")
    found = json.loads(said)
    assert code == 1
    assert [damage["name"] for damage in found["damaged"]] == [name]
    assert (found["whole"], found["mend"]) == (len(built.rows) - 1, printed)
    program, *words = shlex.split(printed)
    assert program == "gpt2"
    code, said = run_gpt2(*words, cwd=built.folder, api=api)
    assert code == 0, said
    assert latest_manifest(built.store, "small") == built.manifest
    after = built.times()
    assert after.keys() == before.keys()
    assert {key for key in after if after[key] != before[key]} == {
        DatasetKeys("small").shard(name),
        DatasetKeys("small").record(name),
    }
    assert built.verify()[0] == 0


@pytest.mark.full
@pytest.mark.parametrize("place", [0, 3])
def test_a_lost_record_is_damage_that_can_be_mended(api: str, built: Built, place: int) -> None:
    name = built.rows[place].shard_id
    built.store.delete(DatasetKeys("small").record(name))
    code, said = built.verify()
    assert (code, name in said) == (1, True), said
    assert built.verify("--repair", api=api)[0] == 0
    assert latest_manifest(built.store, "small") == built.manifest
    assert built.verify()[0] == 0


@pytest.mark.parametrize(
    "gone", ["all", "the file of the damaged shard", pytest.param("its rows", marks=pytest.mark.full)]
)
def test_a_repair_whose_source_is_gone_gives_nothing_up(api: str, built: Built, gone: str) -> None:
    name = built.flip(len(built.rows) - 1)
    before = built.records()
    path = built.folder / "source" / "file_1.parquet"
    if gone == "its rows":
        write_parquet(path, [document(number) for number in range(500, 530)])
    else:
        path.unlink()
    if gone == "all":
        (built.folder / "source" / "file_0.parquet").unlink()
    code, said = built.verify("--repair", api=api)
    assert (code, "Traceback" in said) == (2, False), said
    assert built.records() == before
    assert latest_manifest(built.store, "small") == built.manifest
    assert built.verify()[0] == 1
    assert name in built.verify()[1]


def test_what_cannot_be_checked_is_exit_code_2(built: Built) -> None:
    code, said = built.verify(url="nowhere")
    assert (code, "does not exist" in said) == (2, True)
    code, said = run_gpt2("dataset", "verify", "--set", "store_url=data", cwd=built.folder)
    assert (code, "never sealed" in said) == (2, True)
    for path in (built.folder / "source").iterdir():
        path.unlink()
    code, said = built.verify("--deep", "5")
    assert (code, "no such file" in said) == (2, True)
    assert built.verify()[0] == 0  # the source is not needed for the rest


def test_a_store_that_keeps_sums_shows_a_rewritten_shard_quickly(tmp_path: Path, s3_url: S3Url) -> None:
    built = Built(tmp_path, s3_url("seaweedfs"))
    name = built.flip(3)
    code, said = built.verify("--quick")
    assert (code, name in said) == (1, True)
    assert built.store.stat(DatasetKeys("small").shard(name)).sha256 in said


# Copy


def copy(built: Built, url: str, to: str) -> tuple[int, str]:
    return run_gpt2("dataset", "copy", to, *built.words(url), cwd=built.folder)


@pytest.fixture
def stops(s3_url: S3Url, tmp_path: Path) -> Iterator[list[str]]:
    """Two stores after the first one: of SeaweedFS, then a folder."""
    yield [s3_url("seaweedfs"), str(tmp_path / "back")]


def outcome(url: str, built: Built) -> tuple[object, bytes | bytearray | memoryview]:
    """What a training on this copy logs, and its weights."""
    store = open_store(url)
    config = tiny_config(url, built.config.data.source, f"train.max_steps={STEPS}")
    assert run_job(url, put_job(store, training_job(pin_run(store, config, built.manifest.digest, None)))) == 0
    return history(store, "tiny"), final_weights(store, "tiny")


def test_a_copy_of_a_copy_is_the_same_version_and_trains_to_the_same_losses(built: Built, stops: list[str]) -> None:
    with _inside(built.folder):
        write_parquet(built.folder / "source" / "file_2.parquet", [document(number) for number in range(80, 100)])
        built.manifest = build_dataset(built.config)  # a second version, whose parent is copied, too
    url = str(built.folder / "data")
    total = len(built.manifest.shard_ids)
    expected = outcome(url, built)
    for to in stops:
        code, said = copy(built, url, to)
        assert (code, f"{total} of {total} shards copied now" in said) == (0, True), said
        assert latest_manifest(open_store(to), "small") == built.manifest
        assert built.verify("--deep", "3", url=to)[0] == 0
        url = to
    assert outcome(stops[0], built) == expected
    code, said = copy(built, stops[0], stops[1])
    assert (code, f"0 of {total} shards copied now" in said) == (0, True), said


@pytest.mark.full
def test_a_copy_from_one_server_to_another_is_the_same_version(built: Built, s3_url: S3Url, tmp_path: Path) -> None:
    """Through a folder: a process talks to one server, AWS_ENDPOINT_URL_S3 names it."""
    assert "minio" in SERVERS, "make minio"
    url = str(built.folder / "data")
    for number, kind in enumerate(["seaweedfs", "minio"]):
        to, back = s3_url(kind), str(tmp_path / f"back-{number}")
        assert copy(built, url, to)[0] == 0
        assert built.verify(url=to)[0] == 0
        assert copy(built, to, back)[0] == 0
        assert latest_manifest(open_store(back), "small") == built.manifest
        url = back
    assert built.verify(url=url)[0] == 0


def sealed_in(url: str) -> Manifest | None:
    return latest_manifest(open_store(url), "small")


def test_a_killed_copy_is_just_unfinished_and_goes_on(tmp_path: Path, s3_url: S3Url) -> None:
    built = Built(tmp_path, "data")
    to = s3_url("seaweedfs")
    target = open_store(to, create=True)
    there = lambda: [found for found in target.list(DatasetKeys("small").shards) if found.key.endswith(".json")]  # noqa: E731
    process = gpt2("dataset", "copy", to, *built.words(), cwd=built.folder)
    poll(there)
    process.kill()
    process.communicate()
    assert sealed_in(to) in (None, built.manifest)
    _no_record_lacks_its_shard(target)
    done = len(there())
    code, said = copy(built, "data", to)
    assert code == 0, said
    copied = int(said.split()[1])
    assert len(built.rows) - copied in range(done, done + 5)  # a shard in flight may lack just its record
    assert sealed_in(to) == built.manifest
    for row in built.rows:
        assert check_fully(target, "small", row, tokenizer.EOT) is None


def _no_record_lacks_its_shard(store: Store) -> None:
    names = {found.key for found in store.list(DatasetKeys("small").shards)}
    assert {key.removesuffix(".json") + ".bin" for key in names if key.endswith(".json")} <= names


def test_another_dataset_of_that_name_is_left_alone(built: Built, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Built(tmp_path / "other", "data")
    with suppress(FileNotFoundError):
        (tmp_path / "other" / "source" / "file_0.parquet").unlink()
    with _inside(other.folder):
        changed = build_dataset(other.config)
    assert changed.digest != built.manifest.digest
    before = {found.key: found.modified for found in other.store.list(keys.DATASETS)}
    code, said = copy(built, "data", str(other.folder / "data"))
    assert (code, "another dataset of this name" in said, changed.digest in said) == (2, True, True), said
    assert {found.key: found.modified for found in other.store.list(keys.DATASETS)} == before


def test_a_damaged_shard_is_not_copied(built: Built, tmp_path: Path) -> None:
    name = built.flip(3)
    code, said = copy(built, "data", str(tmp_path / "to"))
    assert (code, name in said, "--repair" in said) == (2, True, True), said
    assert sealed_in(str(tmp_path / "to")) is None
    assert servers.SECRET not in said

"""`gpt2 dataset verify` and `gpt2 dataset copy`: exit codes, the printed repair command, kills."""

import json
import re
import shlex
from collections.abc import Iterator
from contextlib import chdir, suppress
from pathlib import Path

import pytest

from flows.platform import automations
from model import tokenizer
from model.__main__ import run_job
from model.runs.job import put_job
from model.runs.run import pin_run, training_job
from storage import keys
from storage.datasets.manifest import Manifest, latest_manifest
from storage.inspection.verify import check_fully
from storage.keys import DatasetKeys
from storage.stores.opening import open_store
from storage.stores.store import Store
from tests import servers
from tests.conftest import S3Url
from tests.damage import flip_bit
from tests.flows import client
from tests.flows.in_process import Gpt2, Outcome
from tests.making import build_dataset, document, tiny_config, write_parquet
from tests.model.training_runs import STEPS, final_weights, history
from tests.polling import poll
from tests.storage.store_kinds import SERVERS


class Built:
    """A folder with a source, a store and a dataset, and the arguments that name them."""

    def __init__(self, gpt2: Gpt2, folder: Path, url: str = "data") -> None:
        self._gpt2, self.folder = gpt2, folder
        for index in range(2):
            texts = [document(index * 40 + number) for number in range(40)]
            write_parquet(folder / "source" / f"file_{index}.parquet", texts)
        self.config = tiny_config(url, "source/*.parquet")
        self.manifest = self.build()
        self.store = open_store(url if url.startswith("s3") else str(folder / url))
        self.rows = list(self.manifest.rows())

    def build(self) -> Manifest:
        with chdir(self.folder):
            return build_dataset(self.config)

    def settings(self, url: str | None = None) -> list[str]:
        data = self.config.data
        values = {"store_url": url or self.config.store_url, "data.dataset": data.dataset, "data.source": data.source}
        values |= {"data.shard_tokens": data.shard_tokens, "data.val_shards": data.val_shards}
        return [argument for name, value in values.items() for argument in ("--set", f"{name}={value}")]

    def verify(self, *options: str, url: str | None = None) -> Outcome:
        return self._gpt2("dataset", "verify", *options, *self.settings(url), cwd=self.folder)

    def copy(self, url: str, to: str) -> Outcome:
        return self._gpt2("dataset", "copy", "--to", to, *self.settings(url), cwd=self.folder)

    def flip(self, place: int) -> str:
        """Damage a shard. Returns its id."""
        flip_bit(self.store, DatasetKeys("small").shard(self.rows[place].shard_id), 10)
        return self.rows[place].shard_id

    def records(self) -> set[str]:
        return {key for key in self.times() if key.endswith(".json")}

    def times(self) -> dict[str, float]:
        return {listed.key: listed.modified for listed in self.store.list(DatasetKeys("small").shards)}


@pytest.fixture
def built(gpt2: Gpt2, tmp_path: Path) -> Built:
    return Built(gpt2, tmp_path)


# Verify


def test_an_intact_dataset_is_exit_code_0_at_every_depth(built: Built) -> None:
    total = len(built.rows)
    for options in ([], ["--quick"]):
        outcome = built.verify(*options)
        assert (outcome.code, f"{total} of {total} shards match the manifest" in outcome.out) == (0, True), outcome
    [facts] = built.verify("--deep", "5", "--json").json_lines
    assert facts == {
        "dataset": "small", "manifest": built.manifest.digest, "whole": total, "documents": 5, "damaged": [],
        "uncompared": [],
        "repair": None,
    }  # fmt: skip


def test_damage_is_exit_code_1_and_the_printed_command_repairs_only_that(api: str, built: Built) -> None:
    """A real process prints the command, and another one runs it as printed."""
    shard_id = built.flip(3)
    before = built.times()
    assert built.verify("--quick").code == 0  # a folder keeps no checksums
    code, text = client.run_gpt2("dataset", "verify", *built.settings(), cwd=built.folder)
    assert (code, shard_id in text, built.rows[2].shard_id in text) == (1, True, False), text
    printed = text[text.rindex("gpt2 dataset verify small --repair") :].strip()
    outcome = built.verify("--json")
    facts = json.loads(outcome.out)
    assert outcome.code == 1
    assert [damage["name"] for damage in facts["damaged"]] == [shard_id]
    assert (facts["whole"], facts["repair"]) == (len(built.rows) - 1, printed)
    program, *argv = shlex.split(printed)
    assert program == "gpt2"
    code, text = client.run_gpt2(*argv, cwd=built.folder, api=api)
    assert code == 0, text
    [flow_run] = re.findall(r"^run +.*/flow-run/(\S+)", text, re.MULTILINE)
    assert client.call_api(api, f"/flow_runs/{flow_run}")["tags"] == [automations.TAG]  # found dead if its host dies
    assert latest_manifest(built.store, "small") == built.manifest
    after = built.times()
    assert after.keys() == before.keys()
    assert {key for key in after if after[key] != before[key]} == {
        DatasetKeys("small").shard(shard_id),
        DatasetKeys("small").record(shard_id),
    }
    assert built.verify().code == 0


@pytest.mark.full
@pytest.mark.parametrize("place", [0, 3])
def test_a_lost_record_is_damage_that_can_be_repaired(api: str, built: Built, place: int) -> None:
    shard_id = built.rows[place].shard_id
    built.store.delete(DatasetKeys("small").record(shard_id))
    outcome = built.verify()
    assert (outcome.code, shard_id in outcome.out) == (1, True), outcome
    assert built.verify("--repair").code == 0
    assert latest_manifest(built.store, "small") == built.manifest
    assert built.verify().code == 0


@pytest.mark.parametrize("gone", ["all", "the file of the damaged shard", "its rows"])
def test_a_repair_whose_source_is_gone_deletes_nothing(built: Built, gone: str) -> None:
    shard_id = built.flip(len(built.rows) - 1)
    before = built.records()
    path = built.folder / "source" / "file_1.parquet"
    if gone == "its rows":
        write_parquet(path, [document(number) for number in range(500, 530)])
    else:
        path.unlink()
    if gone == "all":
        (built.folder / "source" / "file_0.parquet").unlink()
    assert built.verify("--repair").code == 2
    assert built.records() == before
    assert latest_manifest(built.store, "small") == built.manifest
    outcome = built.verify()
    assert (outcome.code, shard_id in outcome.out) == (1, True)


def test_json_and_repair_together_are_exit_code_2(built: Built) -> None:
    outcome = built.verify("--json", "--repair")
    assert (outcome.code, outcome.out, "--json" in outcome.error) == (2, "", True)


def test_a_store_or_source_that_cannot_be_checked_is_exit_code_2(gpt2: Gpt2, built: Built) -> None:
    outcome = built.verify(url="nowhere")
    assert (outcome.code, "'nowhere'" in outcome.error) == (2, True)
    outcome = gpt2("dataset", "verify", "other", "--set", "store_url=data", cwd=built.folder)
    assert (outcome.code, "no sealed version" in outcome.error) == (2, True)
    for path in (built.folder / "source").iterdir():
        path.unlink()
    outcome = built.verify("--deep", "5")
    assert (outcome.code, "no readable file there" in outcome.error) == (2, True)
    assert built.verify().code == 0  # the source is not needed for the rest


def test_a_store_that_keeps_checksums_shows_a_rewritten_shard_quickly(
    gpt2: Gpt2, tmp_path: Path, s3_url: S3Url
) -> None:
    built = Built(gpt2, tmp_path, s3_url("seaweedfs"))
    shard_id = built.flip(3)
    outcome = built.verify("--quick")
    assert (outcome.code, shard_id in outcome.out) == (1, True)
    assert built.store.stat(DatasetKeys("small").shard(shard_id)).sha256 in outcome.out


# Copy


@pytest.fixture
def more_stores(s3_url: S3Url, tmp_path: Path) -> Iterator[list[str]]:
    """Two more stores: SeaweedFS, then a folder."""
    yield [s3_url("seaweedfs"), str(tmp_path / "back")]


def training_outcome(url: str, built: Built) -> tuple[object, bytes | bytearray | memoryview]:
    """The log and the final weights of a training on this copy."""
    store = open_store(url)
    config = tiny_config(url, built.config.data.source, f"train.max_steps={STEPS}")
    assert run_job(url, put_job(store, training_job(pin_run(store, config, built.manifest.digest, None)))) == 0
    return history(store, "tiny"), final_weights(store, "tiny")


def test_a_copy_of_a_copy_is_the_same_version_and_trains_to_the_same_losses(
    built: Built, more_stores: list[str]
) -> None:
    texts = [document(number) for number in range(80, 100)]
    write_parquet(built.folder / "source" / "file_2.parquet", texts)
    built.manifest = built.build()  # a second version, whose parent is copied too
    url = str(built.folder / "data")
    total = len(built.manifest.shard_ids)
    expected = training_outcome(url, built)
    for to in more_stores:
        outcome = built.copy(url, to)
        assert (outcome.code, f"{total} of {total} shards copied now" in outcome.out) == (0, True), outcome
        assert latest_manifest(open_store(to), "small") == built.manifest
        assert built.verify("--deep", "3", url=to).code == 0
        url = to
    assert training_outcome(more_stores[0], built) == expected
    outcome = built.copy(more_stores[0], more_stores[1])
    assert (outcome.code, f"0 of {total} shards copied now" in outcome.out) == (0, True), outcome


@pytest.mark.full
def test_a_copy_from_one_server_to_another_is_the_same_version(built: Built, s3_url: S3Url, tmp_path: Path) -> None:
    """Through a folder: a process uses one server, that of AWS_ENDPOINT_URL_S3."""
    assert "minio" in SERVERS, "make minio"
    url = str(built.folder / "data")
    for number, kind in enumerate(["seaweedfs", "minio"]):
        to, back = s3_url(kind), str(tmp_path / f"back-{number}")
        assert built.copy(url, to).code == 0
        assert built.verify(url=to).code == 0
        assert built.copy(to, back).code == 0
        assert latest_manifest(open_store(back), "small") == built.manifest
        url = back
    assert built.verify(url=url).code == 0


def sealed_in(url: str) -> Manifest | None:
    return latest_manifest(open_store(url), "small")


def test_a_killed_copy_is_resumed(built: Built, s3_url: S3Url) -> None:
    to = s3_url("seaweedfs")
    target = open_store(to, create=True)

    def copied_records() -> list[str]:
        listed_keys = (listed.key for listed in target.list(DatasetKeys("small").shards))
        return [key for key in listed_keys if key.endswith(".json")]

    process = client.gpt2("dataset", "copy", "--to", to, *built.settings(), cwd=built.folder)
    poll(copied_records)
    process.kill()
    process.communicate()
    assert sealed_in(to) in (None, built.manifest)
    _no_record_lacks_its_shard(target)
    done = len(copied_records())
    outcome = built.copy("data", to)
    assert outcome.code == 0, outcome
    copied = int(outcome.out.split()[1])
    assert len(built.rows) - copied in range(done, done + 5)  # a shard in flight may lack only its record
    assert sealed_in(to) == built.manifest
    for row in built.rows:
        assert check_fully(target, "small", row, tokenizer.EOT) is None


def _no_record_lacks_its_shard(store: Store) -> None:
    shard_keys = {listed.key for listed in store.list(DatasetKeys("small").shards)}
    assert {key.removesuffix(".json") + ".bin" for key in shard_keys if key.endswith(".json")} <= shard_keys


def test_another_dataset_of_the_same_name_is_not_overwritten(gpt2: Gpt2, built: Built, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    other = Built(gpt2, tmp_path / "other")
    with suppress(FileNotFoundError):
        (tmp_path / "other" / "source" / "file_0.parquet").unlink()
    changed = other.build()
    assert changed.digest != built.manifest.digest
    before = {listed.key: listed.modified for listed in other.store.list(keys.DATASETS)}
    outcome = built.copy("data", str(other.folder / "data"))
    assert (outcome.code, "another dataset" in outcome.error, changed.digest in outcome.error) == (2, True, True)
    assert {listed.key: listed.modified for listed in other.store.list(keys.DATASETS)} == before


def test_a_damaged_shard_is_not_copied(built: Built, tmp_path: Path) -> None:
    shard_id = built.flip(3)
    outcome = built.copy("data", str(tmp_path / "to"))
    assert (outcome.code, shard_id in outcome.error, "--repair" in outcome.error) == (2, True, True), outcome
    assert sealed_in(str(tmp_path / "to")) is None
    assert servers.SECRET not in outcome.text

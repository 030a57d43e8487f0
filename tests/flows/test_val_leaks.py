"""data.drop_val_leaks: no document of val is in train, whoever builds, however often, whatever was killed or lost."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows import tokenise as stage
from flows.console.dataset import verify
from flows.download import download
from flows.pretrain import build_dataset
from flows.tokenise import tokenise
from model import tokenizer
from model.config import RunConfig
from storage.cache import host as host_cache
from storage.datasets import shards
from storage.datasets.manifest import Manifest, latest_manifest, read_manifest, seal
from storage.datasets.plan import plan_files
from storage.keys import DatasetKeys
from storage.sources import files as sources
from storage.sources import mirror
from storage.stores.opening import open_store
from storage.stores.store import Store, overwrite
from tests.flows.client import ask
from tests.flows.jobs import Jobs, counted
from tests.leaks import documents, leaks_of, one_word_other, shouted, story
from tests.making import tiny_config, words, write_parquet

pytestmark = pytest.mark.usefixtures("api")

DATASET = "leaky"
ALONE = 9  # a document that fills a shard
LEAKS = {1, 2, ALONE, 12}
SETTINGS = [f"data.dataset={DATASET}", "data.val_shards=3", "data.drop_val_leaks=true"]


def texts() -> list[str]:
    """Three shards of val, then train, in which some documents of val occur."""
    found = [story(number) for number in range(55)]
    found[ALONE] = story(ALONE, 450)
    found[40], found[41], found[43], found[44] = shouted(found[1]), f" {found[2]}", found[2], shouted(found[ALONE])
    found[4] = found[3]  # twice in val alone
    found[47] = found[12]
    found[45] = one_word_other(found[5])
    found[6], found[46] = "", "..."
    return found


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    with counted() as found:
        yield found


class Built(NamedTuple):
    """A dataset whose first build was killed: its settings, its version, the jobs of that build and of the next."""

    config: RunConfig
    digest: str
    first: list[str]
    second: list[str]


def forget_prefect(api: str) -> None:
    """Delete all that Prefect knows of builds of this dataset."""
    names = [f"{kind}-{DATASET}" for kind in ("build", "download", "tokenise")]
    for run in ask(api, "/flow_runs/filter", {"flow_runs": {"name": {"any_": names}}}):
        ask(api, f"/flow_runs/{run['id']}", method="DELETE")


def killed(*_: Any) -> None:
    raise RuntimeError("killed before the seal")


@pytest.fixture(scope="module")
def once(api: str, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """One worker is killed just before the seal, Prefect forgets all, three workers end it."""
    folder = tmp_path_factory.mktemp("once")
    with pytest.MonkeyPatch.context() as patch, counted() as jobs:
        for module, name in ((sources, "REMEMBERED"), (host_cache, "FOLDER"), (mirror, "FOLDER")):
            patch.setattr(module, name, folder / module.__name__)
        for number, part in enumerate((texts()[:30], texts()[30:])):
            write_parquet(folder / "source" / f"file_{number}.parquet", part)
        config = tiny_config(str(folder / "store"), str(folder / "source"), *SETTINGS, "resources.workers=1")
        with patch.context() as dying, pytest.raises(RuntimeError, match="killed"):
            dying.setattr(stage, "seal_dataset", killed)
            build_dataset(config)
        assert latest_manifest(open_store(config.store_url), DATASET) is None
        first = sorted(jobs.asked)
        forget_prefect(api)
        digest, second = jobs.made_by(
            tiny_config(config.store_url, config.data.source, *SETTINGS, "resources.workers=3")
        )
        return Built(config, digest, first, second)


def undisturbed(config: RunConfig, store: Store) -> Manifest:
    """The version as it must be, made without Prefect from what the texts are known to share."""
    data, identity = config.data, tokenizer.identity()
    shape = data.settings(identity["sha256"])
    found, _ = mirror.list_source(store, data.source, data.config, data.revision, "train")
    first = next(plan_files(store, DATASET, found.files, shape)).shard_ids
    left_out = {first[0]: [1, 2], first[1]: [ALONE], first[2]: [12]}
    jobs = [job for one in plan_files(store, DATASET, found.files, shape, left_out=left_out) for job in one.jobs()]
    for job in jobs:
        shards.build_shard(store, DATASET, job, tokenizer.encode, tokenizer.EOT)
    return seal(
        store, DATASET, [job.shard_id for job in jobs], recipe=shape.recipe(), tokenizer=identity,
        source=found.described(), binding=data.binding(identity["sha256"]), val_shards=data.val_shards,
        left_out=left_out,
    )  # fmt: skip


@pytest.fixture
def built(once: Built, tmp_path: Path) -> Built:
    """A copy of it, whose store and source may be changed."""
    store, source = (
        str(shutil.copytree(url, tmp_path / Path(url).name)) for url in (once.config.store_url, once.config.data.source)
    )
    data = once.config.data.model_copy(update={"source": source})
    config = once.config.model_copy(update={"store_url": store, "data": data})
    split = json.loads(open_store(store).read(DatasetKeys(DATASET).split).body)
    split["bound"]["source"] = source  # a name is bound to its source's address
    overwrite(open_store(store), DatasetKeys(DATASET).split, json.dumps(split).encode())
    return once._replace(config=config)


def opened(config: RunConfig) -> tuple[Store, Manifest]:
    store = open_store(config.store_url)
    manifest = latest_manifest(store, DATASET)
    assert manifest is not None
    return store, manifest


def test_a_val_split_that_is_all_in_train_is_refused(tmp_path: Path) -> None:
    """It would be empty, and stay so."""
    write_parquet(tmp_path / "source" / "a.parquet", [story(number) for number in range(10)] * 6)
    config = tiny_config(str(tmp_path / "store"), str(tmp_path / "source"), *SETTINGS)
    with pytest.raises(ValueError, match=r"data\.drop_val_leaks.*all of its \d+ documents.*data\.val_shards"):
        build_dataset(config)
    assert latest_manifest(open_store(config.store_url), DATASET) is None


def lose(store: Store, shard_id: str) -> bytes:
    """Delete a shard and its record. Returns what it held."""
    body = bytes(store.read(DatasetKeys(DATASET).shard(shard_id)).body)
    store.delete(DatasetKeys(DATASET).shard(shard_id))
    store.delete(DatasetKeys(DATASET).record(shard_id))
    return body


def lose_what_no_version_lists(store: Store, manifest: Manifest) -> int:
    """Delete the val shards as they were with their leaks, as `gpt2 gc` does. Returns how many there were."""
    known = (found.key.rpartition("/")[2] for found in store.list(DatasetKeys(DATASET).shards))
    names = {key.removesuffix(".json") for key in known if key.endswith(".json")} - set(manifest.shard_ids)
    dead = [name for name in names if shards.read_record(store, DATASET, name).tokens]
    return len([lose(store, name) for name in dead])


def test_val_lacks_what_train_holds_and_nothing_else_is_lost(once: Built) -> None:
    store, manifest = opened(once.config)
    found = documents(store, DATASET, manifest)
    assert [one.text for one in found] == [text for number, text in enumerate(texts()) if number not in LEAKS]
    assert leaks_of(found) == {}
    assert [row.split for row in manifest.rows()] == ["val"] * 2 + ["train"] * (len(manifest.shard_ids) - 2)
    assert manifest.totals["val"]["documents"] > len(LEAKS) + 10
    verify(overrides=words(once.config), deep=1_000)


def test_the_version_is_the_same_whoever_builds(once: Built, store: Store) -> None:
    expected = undisturbed(once.config, store)
    assert once.digest == expected.digest
    assert opened(once.config)[1] == expected
    assert once.second == []  # what the killed one made was found, the leaks were the same
    with_leaks = set(once.first) - set(expected.shard_ids)
    assert len(with_leaks) == 4  # three as they were first, and one of which nothing is left


def test_a_refresh_without_a_change_is_no_version_and_no_job(built: Built, api: str, jobs: Jobs) -> None:
    store, manifest = opened(built.config)
    assert lose_what_no_version_lists(store, manifest) == 3
    pointer = store.read(DatasetKeys(DATASET).latest)
    forget_prefect(api)
    assert jobs.made_by(built.config) == (built.digest, [])
    assert store.read(DatasetKeys(DATASET).latest) == pointer
    assert len(list(store.list(DatasetKeys(DATASET).manifests))) == 1


def test_a_file_that_comes_later_changes_no_val(built: Built, jobs: Jobs) -> None:
    store, before = opened(built.config)
    lost = before.shard_ids[0]
    body = lose(store, lost)
    more = [story(number) for number in range(900, 920)] + [shouted(texts()[0])]
    write_parquet(Path(built.config.data.source) / "file_9.parquet", more)
    digest, made = jobs.made_by(built.config)
    after = read_manifest(store, DATASET, digest)
    assert after.parent == before.digest
    assert list(after.rows("val")) == list(before.rows("val"))
    assert bytes(store.read(DatasetKeys(DATASET).shard(lost)).body) == body
    assert list(after.rows("train"))[: len(list(before.rows("train")))] == list(before.rows("train"))
    assert made == sorted({lost, *after.shard_ids} - (set(before.shard_ids) - {lost}))
    assert [one.text for one in documents(store, DATASET, after)][-len(more) :] == more


def test_a_builder_that_was_overtaken_adds_no_leak(built: Built, tmp_path: Path) -> None:
    """It planned before the split was pinned, and seals after another builder has."""
    planned = download(built.config.model_copy(update={"store_url": str(tmp_path / "nowhere")}))
    sealed = tokenise(built.config, planned).manifest
    store, manifest = opened(built.config)
    assert leaks_of(documents(store, DATASET, manifest)) == {}
    assert manifest.digest == sealed == built.digest


def test_repair_makes_the_same_val_again(built: Built, jobs: Jobs) -> None:
    store, manifest = opened(built.config)
    name = manifest.shard_ids[0]
    key = DatasetKeys(DATASET).shard(name)
    whole = bytes(store.read(key).body)
    overwrite(store, key, bytes([whole[0], whole[1], whole[2] ^ 1]) + whole[3:])
    verify(overrides=words(built.config), repair=True, verbose=True)
    assert jobs.asked == [name]
    assert bytes(store.read(key).body) == whole
    assert latest_manifest(store, DATASET) == manifest
    verify(overrides=words(built.config), deep=1_000)


def test_filters_skipped_documents_and_a_limit_shift_no_row(tmp_path: Path, jobs: Jobs) -> None:
    """Left out are rows of a file, found as documents of a shard: what lies between must be counted right."""
    rows: list[dict[str, Any]] = [{"text": text, "score": 3} for text in texts()]
    for place in (52, 42, 20, 11, 8, 5, 2, 1, 0):
        rows.insert(place, {"text": f"{story(place)} filtered", "score": 1})
        rows.insert(place, {"text": None, "score": 5})
        rows.insert(place, {"text": "short", "score": 4})
    rows = [row | {"token_count": len(tokenizer.encode(row["text"] or ""))} for row in rows]
    limit = sum(row["token_count"] + 1 for row in rows[:-3] if row["score"] >= 2)
    border = next(number for number, row in enumerate(rows) if row["text"] == texts()[ALONE]) + 1
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:border]))
    pq.write_table(pa.Table.from_pylist(rows[border:]), tmp_path / "source" / "b.parquet", row_group_size=7)
    config = tiny_config(
        str(tmp_path / "store"), str(tmp_path / "source"), *SETTINGS,
        'data.filters=["score >= 2", "length != 5"]', "data.on_bad_document=skip", f"data.max_tokens={limit}",
        "resources.workers=1",
    )  # fmt: skip
    digest, _ = jobs.made_by(config)
    store, manifest = opened(config)
    found = [one.text for one in documents(store, DATASET, manifest)]
    assert found == [text for number, text in enumerate(texts()) if number not in LEAKS][:-3]
    verify(overrides=words(config), deep=1_000)
    lost = {row.shard_id: lose(store, row.shard_id) for row in manifest.rows("val")}
    assert {name[0] for name in lost} == {"a", "b"}
    assert lose_what_no_version_lists(store, manifest) == 3
    assert jobs.made_by(config) == (digest, sorted(lost))
    assert {name: bytes(store.read(DatasetKeys(DATASET).shard(name)).body) for name in lost} == lost

"""Building a dataset: which shards are missing, and which settings a name is bound to."""

import json
import re
from pathlib import Path

import pytest

from model import tokenizer
from model.config import RunConfig
from storage.datasets import building, shards
from storage.datasets.plan import FilePlan, plan_files, planner
from storage.datasets.recipe import DatasetSpec
from storage.errors import DatasetMismatch, ShardCorrupt
from storage.keys import DatasetKeys
from storage.sources.files import Listing
from storage.sources.mirror import list_source
from storage.stores.opening import open_store
from storage.stores.store import Store
from tests.damage import flip_bit
from tests.making import build_dataset, document, tiny_config, write_parquet


def plans_of(store: Store, spec: DatasetSpec, listing: Listing) -> list[FilePlan]:
    make_plan = planner(store, spec.settings, tokenizer.encode)
    return list(plan_files(store, spec.name, listing.files, spec.settings, make_plan))


def missing(config: RunConfig) -> frozenset[str]:
    """The shards that the next build would make."""
    store, spec = open_store(config.store_url), config.data.spec(tokenizer.identity())
    listing, _ = list_source(store, spec.source, spec.config, "main", "train")
    return building.start_build(store, spec, plans_of(store, spec, listing)).missing


@pytest.mark.parametrize("damage", ["record", "shard and record", "cut"])
def test_one_lost_shard_is_one_job(config: RunConfig, damage: str) -> None:
    manifest, store = build_dataset(config), open_store(config.store_url)
    assert missing(config) == set()
    shard_id = manifest.shard_ids[3]
    if damage == "cut":
        path = store.local_path(DatasetKeys("small").shard(shard_id))
        assert path is not None
        path.write_bytes(path.read_bytes()[:100])
    else:
        store.delete(DatasetKeys("small").record(shard_id))
        if damage != "record":
            store.delete(DatasetKeys("small").shard(shard_id))
    assert missing(config) == {shard_id}
    assert build_dataset(config) == manifest
    for row in manifest.rows():
        shards.read_shard(store, "small", row)


def test_the_remedy_for_a_wrong_record_works_before_the_first_version(config: RunConfig, tmp_path: Path) -> None:
    """`gpt2 dataset verify --repair` needs a version."""
    shard_id = build_dataset(config.model_copy(update={"store_url": str(tmp_path / "other")})).shard_ids[3]
    other, store = open_store(str(tmp_path / "other")), open_store(config.store_url, create=True)
    body = other.read(DatasetKeys("small").record(shard_id)).body
    wrong = json.loads(body) | {"sha256": "0" * 64}
    store.put_new(DatasetKeys("small").record(shard_id), json.dumps(wrong).encode())
    with pytest.raises(ShardCorrupt) as caught:
        build_dataset(config)
    follow(store, caught.value)
    assert build_dataset(config).shard_ids[3] == shard_id


def test_the_remedy_for_a_damaged_shard_works_for_an_older_version(config: RunConfig, source: str) -> None:
    """`gpt2 dataset verify --repair` reads the newest version."""
    first, store, file = build_dataset(config), open_store(config.store_url), Path(source).parent / "file_1.parquet"
    hidden = file.rename(file.with_suffix(".hidden"))
    write_parquet(file.with_name("file_2.parquet"), [document(900 + number) for number in range(40)])
    row = next(row for row in first.rows() if row.shard_id not in build_dataset(config).shard_ids)
    flip_bit(store, DatasetKeys("small").shard(row.shard_id), 10)
    with pytest.raises(ShardCorrupt) as caught:
        shards.read_shard(store, "small", row)
    hidden.rename(file)
    follow(store, caught.value)
    spec = config.data.spec(tokenizer.identity())
    plans = plans_of(store, spec, list_source(store, source, "", "main", "train")[0])
    split = building.val_split(store, spec, plans)
    assert building.lost_shards(store, "small", first, plans, split) == {row.shard_id}  # what gpt2 pretrain builds
    job = next(job for plan in plans for job in plan.jobs(split) if job.shard_id == row.shard_id)
    shards.build_shard(store, "small", job, tokenizer.encode, tokenizer.EOT)
    shards.read_shard(store, "small", row)


def follow(store: Store, error: Exception) -> None:
    """Delete the object that the error says to delete."""
    (key,) = re.findall(r"delete '([^']+)'", str(error))
    assert key in [listed.key for listed in store.list("datasets/")]
    store.delete(key)


def test_a_new_file_makes_only_its_own_shards(config: RunConfig, source: str) -> None:
    first = build_dataset(config)
    write_parquet(Path(source).parent / "file_9.parquet", [document(900 + number) for number in range(20)])
    new = missing(config)
    second = build_dataset(config)
    assert second.parent == first.digest
    assert set(second.shard_ids) - set(first.shard_ids) == new != set()


def test_a_name_is_bound_to_its_settings(config: RunConfig, source: str) -> None:
    build_dataset(config)
    with pytest.raises(DatasetMismatch, match="shard_tokens is 1000, requested 500"):
        build_dataset(tiny_config(config.store_url, source, "data.shard_tokens=500"))


def test_a_name_is_bound_to_its_filters_and_limits(tmp_path: Path, source: str) -> None:
    settings = [
        'data.filters=["token_count >= 60", "length < 9000"]', "data.max_tokens=3000", "data.on_bad_document=skip",
    ]  # fmt: skip
    config = tiny_config(str(tmp_path / "store"), source, *settings)
    manifest = build_dataset(config)
    assert missing(config) == set()
    assert build_dataset(config) == manifest
    assert 2_000 < manifest.tokens <= 3_000
    assert manifest.recipe.filters == ("token_count >= 60", "length < 9000")
    for setting in ("data.filters=[]", "data.max_tokens=0", "data.on_bad_document=fail"):
        name = setting.partition("=")[0].removeprefix("data.")
        with pytest.raises(DatasetMismatch, match=f"{name} is .*Choose another name"):
            build_dataset(tiny_config(config.store_url, source, *settings, setting))
    assert len(missing(tiny_config(config.store_url, source, "data.dataset=other"))) == 6


def test_a_copy_of_a_file_adds_nothing_and_is_listed(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        texts = [document(number) for number in range(40)]
        write_parquet(tmp_path / "twice" / f"{name}.parquet", texts if name != "c" else texts[:30])
    config = tiny_config(str(tmp_path / "store"), str(tmp_path / "twice"))
    manifest = build_dataset(config)
    assert manifest.source_files["name"] == ["a.parquet", "c.parquet"]
    assert len(set(manifest.shard_ids)) == len(manifest.shard_ids)
    listing, _ = list_source(open_store(config.store_url), config.data.source, "", "main", "train")
    assert listing.ignored == ("b.parquet: same content as a.parquet",)

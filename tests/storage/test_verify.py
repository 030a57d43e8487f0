"""Verifying finds each kind of damage, names it, and finds nothing in a whole dataset."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model import tokenizer
from storage import keys, shards, sources
from storage.canonical import canonical_json, sha256
from storage.layout import open_store
from storage.manifest import Manifest, ShardRow, read_manifest
from storage.shards import DTYPE
from storage.store import Store, overwrite
from storage.verify import Damage, check_documents, check_fully, check_quickly, check_versions
from tests.making import build_dataset, document, tiny_config, write_parquet

Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def store(url: str) -> Store:
    return open_store(url)


@pytest.fixture
def manifest(store: Store, source: str) -> Manifest:
    return build_dataset(tiny_config(store.url, source))


def row_of(manifest: Manifest, number: int = 3) -> ShardRow:
    return list(manifest.rows())[number]


def quickly(store: Store, manifest: Manifest) -> list[Damage]:
    return [found for row in manifest.rows() if (found := check_quickly(store, "small", row))]


def fully(store: Store, manifest: Manifest) -> list[Damage]:
    found = [found for row in manifest.rows() if (found := check_fully(store, "small", row, tokenizer.EOT))]
    return found + list(check_versions(store, "small", manifest))


def resealed(store: Store, manifest: Manifest, change: Change) -> Manifest:
    """A manifest that differs from another as `change` makes it, under its own name."""
    value = json.loads(store.read(keys.manifest("small", manifest.digest)).body)
    change(value)
    body = canonical_json(value)
    store.put_new(keys.manifest("small", sha256(body)), body)
    return read_manifest(store, "small", sha256(body))


def rewrite_record(store: Store, shard_id: str, **changed: Any) -> None:
    key = keys.record("small", shard_id)
    overwrite(store, key, canonical_json(json.loads(store.read(key).body) | changed))


def doctor(store: Store, manifest: Manifest, row: ShardRow, ids: np.ndarray) -> Manifest:
    """Other ids in a shard, with a record and a manifest that agree with them."""
    body = ids.astype(DTYPE).tobytes()
    overwrite(store, keys.shard("small", row.shard_id), body)
    rewrite_record(store, row.shard_id, sha256=sha256(body))
    number = manifest.shard_ids.index(row.shard_id)
    return resealed(store, manifest, lambda value: value["shards"]["sha256"].__setitem__(number, sha256(body)))


def ids_of(store: Store, row: ShardRow) -> np.ndarray:
    return np.frombuffer(store.read(keys.shard("small", row.shard_id)).body, DTYPE).copy()


def test_a_whole_dataset_has_nothing_wrong(store: Store, manifest: Manifest) -> None:
    assert quickly(store, manifest) == []
    assert fully(store, manifest) == []


def test_what_is_missing_or_of_another_size_is_found_at_once(store: Store, manifest: Manifest) -> None:
    lost, unrecorded, cut = (row_of(manifest, number) for number in (3, 4, 5))
    store.delete(keys.shard("small", lost.shard_id))
    store.delete(keys.record("small", unrecorded.shard_id))
    key = keys.shard("small", cut.shard_id)
    overwrite(store, key, store.read(key).body[:-20])
    expected = {lost.shard_id, unrecorded.shard_id, cut.shard_id}
    assert {found.name for found in quickly(store, manifest)} == expected
    assert {found.name for found in fully(store, manifest)} == expected


def test_other_bytes_of_the_right_size_are_found(store: Store, manifest: Manifest) -> None:
    row = row_of(manifest)
    ids = ids_of(store, row)
    ids[7] ^= 1
    overwrite(store, keys.shard("small", row.shard_id), ids.tobytes())
    found = fully(store, manifest)
    assert [damage.name for damage in found] == [row.shard_id]
    assert row.sha256 in found[0].wrong and sha256(ids.tobytes()) in found[0].wrong
    kept = store.stat(keys.shard("small", row.shard_id)).sha256  # a folder keeps no sums: only reading shows it
    assert len(quickly(store, manifest)) == (0 if kept is None else 1)


@pytest.mark.parametrize("name", ["tokens", "documents", "text_bytes", "sha256"])
def test_a_record_that_says_otherwise_is_found(store: Store, manifest: Manifest, name: str) -> None:
    row = row_of(manifest)
    rewrite_record(store, row.shard_id, **{name: "0" * 64 if name == "sha256" else 1})
    found = fully(store, manifest)
    assert [damage.name for damage in found] == [row.shard_id]
    assert name in found[0].wrong


def test_a_count_that_the_bytes_do_not_have_is_found(store: Store, manifest: Manifest) -> None:
    row = row_of(manifest)
    rewrite_record(store, row.shard_id, documents=row.documents + 1)
    wrong = resealed(store, manifest, lambda value: value["shards"]["documents"].__setitem__(3, row.documents + 1))
    assert [damage.name for damage in fully(store, wrong)] == [row.shard_id]


def test_an_id_beyond_the_vocabulary_is_found(store: Store, manifest: Manifest) -> None:
    row = row_of(manifest)
    ids = ids_of(store, row)
    ids[5] = 50_257
    found = fully(store, doctor(store, manifest, row, ids))
    assert [damage.name for damage in found] == [row.shard_id]
    assert "50,257" in found[0].wrong


def test_rows_in_both_splits_are_found(store: Store, manifest: Manifest) -> None:
    held = row_of(manifest, 0)
    assert held.split == "val"
    row = row_of(manifest, 2)
    recipe = shards.read_record(store, "small", held.shard_id).recipe
    rewrite_record(store, row.shard_id, recipe=recipe | {"row_from": recipe["row_to"] - 1, "row_to": recipe["row_to"]})
    found = fully(store, manifest)
    assert [damage.name for damage in found] == [row.shard_id]
    assert held.shard_id in found[0].wrong


def test_a_lost_or_damaged_ancestor_is_found(store: Store, manifest: Manifest) -> None:
    child = resealed(store, manifest, lambda value: value.update(parent=manifest.digest))
    assert fully(store, child) == []
    overwrite(store, keys.manifest("small", manifest.digest), b"{}")
    assert manifest.digest in fully(store, child)[0].name
    store.delete(keys.manifest("small", manifest.digest))
    assert manifest.digest in fully(store, child)[0].name


# Against the source


def deeply(store: Store, manifest: Manifest, source: str, count: int) -> list[Damage | None]:
    files = [sources.identify(path) for path in sources.find(source)]
    return list(check_documents(store, "small", manifest, files, tokenizer.encode, count=count, seed=4))


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_documents_of_the_source_are_found_where_they_should_be(store: Store, tmp_path: Path, suffix: str) -> None:
    texts = [document(number) for number in range(70)]
    path = tmp_path / "deep" / f"texts{suffix}"
    write_parquet(path, texts)
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    manifest = build_dataset(tiny_config(store.url, str(path)))
    assert deeply(store, manifest, str(path), 1000) == [None] * 70
    assert deeply(store, manifest, str(path), 9) == [None] * 9
    row = row_of(manifest, 2)
    ids = ids_of(store, row)
    ids[3] += 1
    doctored = doctor(store, manifest, row, ids)
    found = [damage for damage in deeply(store, doctored, str(path), 1000) if damage]
    assert fully(store, doctored) == []  # the lie is consistent: only the source shows it
    assert [damage.name for damage in found] == [row.shard_id]


def test_a_source_file_that_is_gone_is_named(store: Store, manifest: Manifest, source: str) -> None:
    found = [damage for damage in deeply(store, manifest, source.replace("*", "file_0"), 80) if damage]
    assert found and all("file_1" in damage.name and "file_1.parquet" in damage.wrong for damage in found)

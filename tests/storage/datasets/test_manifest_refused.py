"""Manifests that are refused: missing shards, other settings, damage."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from storage.datasets import records, sealing
from storage.datasets.manifest import Manifest, ShardRow, latest_manifest, read_manifest
from storage.datasets.recipe import DatasetSpec
from storage.datasets.sealing import check_binding, check_rebuilt
from storage.digests import canonical_json, sha256
from storage.errors import DatasetMismatch, ObjectCorrupt, ObjectMissing, ShardCorrupt, StoreUnusable
from storage.keys import DatasetKeys
from storage.stores.store import Store, overwrite
from tests.storage.sealing import NO_FILES, SPEC, built, manifests, pointer, seal, sealed, source_file

# Refused seals


@pytest.mark.parametrize("lost", ["shard", "record"])
def test_a_missing_shard_is_named_and_nothing_is_sealed(store: Store, files: list[Path], lost: str) -> None:
    planned = built(store, *files)
    store.delete(DatasetKeys("small").shard(planned[3]) if lost == "shard" else DatasetKeys("small").record(planned[3]))
    with pytest.raises(ObjectMissing, match=f"{planned[3]}.*same command again"):
        seal(store, "small", planned)
    assert manifests(store) == []
    assert latest_manifest(store, "small") is None


def test_a_failed_seal_does_not_bind_the_name(store: Store, tmp_path: Path, files: list[Path]) -> None:
    planned = built(store, *files)
    store.delete(DatasetKeys("small").record(planned[3]))
    with pytest.raises(ObjectMissing):
        seal(store, "small", planned)
    other = source_file(tmp_path / "other", 5)
    planned = built(store, other)
    assert seal(store, "small", planned, config="other").shard_ids == planned


def test_a_shard_of_the_wrong_size_is_not_done(store: Store, files: list[Path]) -> None:
    planned = built(store, *files)
    overwrite(store, DatasetKeys("small").shard(planned[1]), b"short")
    with pytest.raises(ObjectMissing, match=planned[1]):
        seal(store, "small", planned)


@pytest.mark.parametrize(
    ("spec", "facts"),
    [
        (replace(SPEC, source="other"), ["source", "*.parquet", "other"]),
        (replace(SPEC, settings=replace(SPEC.settings, shard_tokens=600)), ["shard_tokens", "500", "600"]),
        (replace(SPEC, settings=replace(SPEC.settings, filters=("score > 3",))), ["filters", "score > 3"]),
    ],
)
def test_a_name_bound_to_other_settings_names_the_field(
    store: Store, files: list[Path], spec: DatasetSpec, facts: list[str]
) -> None:
    first = sealed(store, *files)
    for access in (
        lambda: check_binding(store, spec),
        lambda: sealing.seal(store, spec, first.shard_ids, NO_FILES),
    ):
        with pytest.raises(DatasetMismatch) as caught:
            access()
        for fact in ["small", "data.dataset", *facts]:
            assert fact in str(caught.value)
    assert pointer(store)["sequence"] == 1


def test_the_same_settings_and_a_new_name_are_accepted(store: Store, files: list[Path]) -> None:
    sealed(store, *files)
    check_binding(store, SPEC)
    check_binding(store, replace(SPEC, name="unknown", source="other"))


# Refused reads


def damage(store: Store, manifest: Manifest) -> str:
    """Change one letter of the manifest. Returns the digest of the result."""
    path = store.local_path(DatasetKeys("small").manifest(manifest.digest))
    assert path is not None
    body = path.read_bytes().replace(b'"documents":', b'"Documents":', 1)
    path.write_bytes(body)
    return sha256(body)


def test_damaged_manifest_bytes_are_refused_with_both_digests(store: Store, files: list[Path]) -> None:
    first = sealed(store, *files)
    damaged_digest = damage(store, first)
    for access in (lambda: read_manifest(store, "small", first.digest), lambda: latest_manifest(store, "small")):
        with pytest.raises(ObjectCorrupt, match=f"{first.digest}.*{damaged_digest}"):
            access()


@pytest.mark.parametrize("versions", [1, 2])
def test_a_damaged_manifest_that_was_deleted_is_sealed_again(
    store: Store, tmp_path: Path, files: list[Path], versions: int
) -> None:
    """The remedy in the message about a damaged manifest works."""
    last = sealed(store, *files)
    if versions == 2:
        files.append(source_file(tmp_path / "source", 9))
        last = sealed(store, *files)
    damage(store, last)
    store.delete(DatasetKeys("small").manifest(last.digest))
    again = sealed(store, *files)
    assert again.columns == last.columns
    assert latest_manifest(store, "small") == again
    assert versions == 2 or again.digest == last.digest


@pytest.mark.parametrize("shards", [None, {}, {"name": ["a column of a later version"]}])
def test_a_manifest_of_a_higher_schema_is_refused(store: Store, files: list[Path], shards: object) -> None:
    def change(value: dict[str, Any]) -> None:
        value["schema"] = 9
        if shards is not None:
            value["shards"] = shards

    with pytest.raises(StoreUnusable, match="schema 9"):
        read_manifest(store, "small", crafted(store, files, change))


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("shard_id", "../../../etc/passwd"),
        ("shard_id", "a/b"),
        ("shard_id", ""),
        ("shard_id", 7),
        ("sha256", "../" + "0" * 61),
        ("sha256", None),
        ("tokens", 1 << 40),
        ("tokens", 0),
        ("tokens", -1),
        ("tokens", "many"),
        ("split", "test"),
    ],
)
def test_a_value_that_cannot_be_a_key_or_a_size_is_refused(
    store: Store, files: list[Path], column: str, value: object
) -> None:
    def put_in(manifest: dict[str, Any]) -> None:
        manifest["shards"][column][3] = value

    with pytest.raises(ObjectCorrupt, match="not a valid manifest"):
        read_manifest(store, "small", crafted(store, files, put_in))


DAMAGES: dict[str, Callable[[dict[str, Any], str], object]] = {
    "shorter": lambda value, column: value["shards"][column].pop(),
    "missing": lambda value, column: value["shards"].pop(column),
}


@pytest.mark.parametrize("column", sorted(set(ShardRow._fields) - {"in_val"}))  # which older versions lack
@pytest.mark.parametrize("how", DAMAGES)
def test_columns_of_different_lengths_are_refused(store: Store, files: list[Path], column: str, how: str) -> None:
    with pytest.raises(ObjectCorrupt, match="not a valid manifest"):
        read_manifest(store, "small", crafted(store, files, lambda value: DAMAGES[how](value, column)))


def test_a_manifest_from_before_in_val_was_counted_is_read(store: Store, files: list[Path]) -> None:
    older = read_manifest(store, "small", crafted(store, files, lambda value: value["shards"].pop("in_val")))
    assert {row.in_val for row in older.rows()} == {0}


@pytest.mark.parametrize("body", [b"", b"[]", b"{}", b'{"schema": 1}', b"\xff"])
def test_bytes_that_are_not_a_manifest_are_refused(store: Store, body: bytes) -> None:
    store.put_new(DatasetKeys("small").manifest(sha256(body)), body)
    with pytest.raises(ObjectCorrupt, match=sha256(body)):
        read_manifest(store, "small", sha256(body))


def crafted(store: Store, files: list[Path], change: Callable[[dict[str, Any]], object]) -> str:
    """Store a changed manifest under the digest of its bytes. Returns the digest."""
    value = json.loads(store.read(DatasetKeys("small").manifest(sealed(store, *files).digest)).body)
    change(value)
    body = canonical_json(value)
    store.put_new(DatasetKeys("small").manifest(sha256(body)), body)
    return sha256(body)


def test_a_lost_val_shard_whose_source_is_gone_is_refused_with_a_remedy(store: Store, files: list[Path]) -> None:
    first = sealed(store, *files)
    records.delete_shard(store, "small", first.shard_ids[0])
    with pytest.raises(ObjectMissing, match=rf"{first.shard_ids[0]}.*restore that file"):
        seal(store, "small", built(store, *files[1:]))
    assert latest_manifest(store, "small") == first


def test_a_missing_manifest_is_named(store: Store) -> None:
    with pytest.raises(ObjectMissing, match="0" * 64):
        read_manifest(store, "small", "0" * 64)
    assert latest_manifest(store, "never-sealed") is None


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b"\xff"])
def test_a_damaged_pointer_is_named(store: Store, files: list[Path], body: bytes) -> None:
    planned = sealed(store, *files).shard_ids
    overwrite(store, DatasetKeys("small").latest, body)
    for access in (lambda: latest_manifest(store, "small"), lambda: seal(store, "small", planned)):
        with pytest.raises(ObjectCorrupt, match="latest"):
            access()


def test_a_rebuilt_shard_with_different_bytes_is_refused_with_both_digests(store: Store, files: list[Path]) -> None:
    first = sealed(store, *files)
    row = list(first.rows())[4]
    check_rebuilt(store, "small", first, {row.shard_id})
    key = DatasetKeys("small").record(row.shard_id)
    overwrite(store, key, store.read(key).body.replace(row.sha256.encode(), b"0" * 64))
    check_rebuilt(store, "small", first, set(first.shard_ids) - {row.shard_id})
    with pytest.raises(ShardCorrupt) as caught:
        check_rebuilt(store, "small", first, {row.shard_id})
    for fact in (row.shard_id, row.sha256, "0" * 64, "gpt2 dataset verify --repair"):
        assert fact in str(caught.value)

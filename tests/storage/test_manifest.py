"""Manifests: the same shards give the same version, val stays val, and what is damaged is refused."""

import json
import random
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from model import tokenizer
from storage import keys, shards, sources
from storage.canonical import canonical_json, sha256
from storage.errors import Conflict, DatasetMismatch, ObjectMissing, ShardCorrupt, StoreUnusable
from storage.layout import open_store
from storage.manifest import (
    Manifest,
    check_binding,
    check_rebuilt,
    latest_manifest,
    read_manifest,
    seal,
)
from storage.plan import ShardJob, plan
from storage.store import Store, overwrite, read_json
from tests.making import document, write_parquet

ROOT = Path(__file__).parents[2]
BINDING = {"source": "*.parquet", "shard_tokens": 500}
SETTINGS: dict[str, Any] = {
    "recipe": {"shard_tokens": 500},
    "tokenizer": tokenizer.identity(),
    "binding": BINDING,
    "val_shards": 2,
}


def source_file(folder: Path, number: int, documents: int = 20) -> Path:
    """A file of three to four shards."""
    return write_parquet(
        folder / f"file_{number}.parquet", [document(number * 1_000 + row) for row in range(documents)]
    )


def jobs_of(*paths: Path) -> list[ShardJob]:
    files = [sources.identify(path) for path in paths]
    return list(plan(files, shard_tokens=500, text_column="text", tokenizer_digest=tokenizer.identity()["sha256"]))


def built(
    store: Store, *paths: Path, dataset: str = "small", order: Callable[[list[ShardJob]], None] | None = None
) -> list[str]:
    """The planned shards of some files, made in any order."""
    jobs = jobs_of(*paths)
    planned = [job.shard_id for job in jobs]
    if order:
        order(jobs)
    for job in jobs:
        shards.build_shard(store, dataset, job, tokenizer.encode, tokenizer.EOT)
    return planned


def sealed(store: Store, *paths: Path) -> Manifest:
    return seal(store, "small", built(store, *paths), **SETTINGS)


def pointer(store: Store, dataset: str = "small") -> dict[str, Any]:
    found = read_json(store, keys.dataset_latest(dataset))
    assert found is not None
    return found


def manifests(store: Store, dataset: str = "small") -> list[str]:
    return [found.key for found in store.list(keys.dataset(dataset) + "manifests/")]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [source_file(tmp_path / "source", number) for number in range(3)]


# A pure function of the records


def test_the_digest_is_that_of_the_bytes_and_latest_points_to_it(store: Store, files: list[Path]) -> None:
    found = sealed(store, *files)
    body = store.read(keys.manifest("small", found.digest)).body
    assert sha256(body) == found.digest
    assert body == canonical_json(json.loads(body))
    assert (pointer(store)["manifest"], pointer(store)["sequence"]) == (found.digest, 1)
    assert len(store.read(keys.dataset_latest("small")).body) < 1024
    assert latest_manifest(store, "small") == found == read_manifest(store, "small", found.digest)


def test_the_digest_knows_no_store_no_place_no_order_and_no_name(tmp_path: Path, files: list[Path]) -> None:
    digests = set()
    for number, place in enumerate(("a", "deep/er/b", "c")):
        store = open_store(str(tmp_path / place), create=True)
        moved = [source_file(tmp_path / f"source_{number}", n) for n in range(3)]
        planned = built(store, *moved, dataset=f"name-{number}", order=random.Random(number).shuffle)
        digests.add(seal(store, f"name-{number}", planned, **SETTINGS).digest)
    assert len(digests) == 1


def test_threads_in_any_order_seal_what_one_seals(tmp_path: Path, store: Store, files: list[Path]) -> None:
    serial = sealed(store, *files)
    other = open_store(str(tmp_path / "other"), create=True)
    jobs = jobs_of(*files)
    planned = [job.shard_id for job in jobs]
    random.Random(4).shuffle(jobs)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda job: shards.build_shard(other, "small", job, tokenizer.encode, tokenizer.EOT), jobs))
    assert seal(other, "small", planned, **SETTINGS).digest == serial.digest


def test_sealing_again_changes_nothing(store: Store, files: list[Path]) -> None:
    first = sealed(store, *files)
    latest = store.read(keys.dataset_latest("small"))
    assert sealed(store, *files) == first
    assert store.read(keys.dataset_latest("small")) == latest
    assert len(manifests(store)) == 1


def test_a_shard_that_was_made_again_gives_no_new_version(store: Store, files: list[Path]) -> None:
    first = sealed(store, *files)
    for shard_id in first.shard_ids[::2]:
        shards.forget(store, "small", shard_id)
    assert sealed(store, *files) == first
    assert pointer(store)["sequence"] == 1


def test_columns_and_totals_are_those_of_the_records(store: Store, files: list[Path]) -> None:
    found = sealed(store, *files)
    rows = list(found.rows())
    assert found.shard_ids == [job.shard_id for job in jobs_of(*files)]
    for row in rows:
        record = shards.read_record(store, "small", row.shard_id)
        assert (row.tokens, row.documents, row.text_bytes, row.sha256) == (
            record.tokens, record.documents, record.text_bytes, record.sha256
        )  # fmt: skip
        assert sha256(store.read(keys.shard("small", row.shard_id)).body) == row.sha256
    for split in ("train", "val"):
        of_split = list(found.rows(split))
        assert found.totals[split] == {
            "shards": len(of_split),
            **{name: sum(getattr(row, name) for row in of_split) for name in ("tokens", "documents", "text_bytes")},
        }
    assert found.known_tokens == {row.shard_id: row.tokens for row in rows}


def test_the_first_shards_are_val_and_the_others_train(store: Store, files: list[Path]) -> None:
    found = sealed(store, *files)
    assert found.columns["split"] == ["val"] * 2 + ["train"] * (len(found.shard_ids) - 2)


# Refresh


def test_a_new_file_gives_a_new_version_with_only_new_train_shards(
    store: Store, tmp_path: Path, files: list[Path]
) -> None:
    first = sealed(store, *files)
    new = source_file(tmp_path / "source", 9)
    second = sealed(store, *files, new)
    assert (second.parent, first.parent) == (first.digest, None)
    assert list(second.rows())[: len(first.shard_ids)] == list(first.rows())
    assert {row.split for row in list(second.rows())[len(first.shard_ids) :]} == {"train"}
    assert (pointer(store)["manifest"], pointer(store)["sequence"]) == (second.digest, 2)
    assert read_manifest(store, "small", first.digest) == first


def test_a_new_file_before_the_others_leaves_val_as_it_was(store: Store, tmp_path: Path, files: list[Path]) -> None:
    first = sealed(store, *files)
    second = sealed(store, source_file(tmp_path / "source", 9), *files)
    assert list(second.rows("val")) == list(first.rows("val"))
    assert second.digest != first.digest


def test_the_val_shards_stay_when_their_file_is_removed(store: Store, files: list[Path]) -> None:
    first = sealed(store, *files)
    second = sealed(store, *files[1:])
    assert list(second.rows("val")) == list(first.rows("val"))
    gone = {job.shard_id for job in jobs_of(files[0])} - {row.shard_id for row in first.rows("val")}
    assert gone
    assert set(second.shard_ids) == set(first.shard_ids) - gone
    assert len(set(second.shard_ids)) == len(second.shard_ids)


def test_a_changed_file_changes_its_train_shards_only(store: Store, tmp_path: Path, files: list[Path]) -> None:
    first = sealed(store, *files)
    source_file(tmp_path / "source", 1, documents=25)
    second = sealed(store, *files)
    ours = {job.shard_id for job in jobs_of(files[1])}
    assert set(second.shard_ids) - ours == {name for name in first.shard_ids if not name.startswith("file_1-")}
    assert list(second.rows("val")) == list(first.rows("val"))


def test_a_refresh_reads_new_records_only(store: Store, tmp_path: Path, files: list[Path]) -> None:
    first = sealed(store, *files)
    planned = built(store, *files, source_file(tmp_path / "source", 9))
    counting = Spy(store)
    seal(counting, "small", planned, **SETTINGS)  # type: ignore[arg-type]
    known = {keys.record("small", shard_id) for shard_id in first.shard_ids}
    assert not known & set(counting.read_keys)


class Spy:
    """A store that notes what is read, and lets somebody else act just before the first swap."""

    def __init__(self, store: Store, before_swap: Callable[[], object] | None = None) -> None:
        self._store, self._act, self.read_keys = store, before_swap, []  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def read(self, key: str) -> Any:
        self.read_keys.append(key)
        return self._store.read(key)

    def swap(self, *arguments: Any) -> str:
        act, self._act = self._act, None
        if act:
            act()
        return self._store.swap(*arguments)


# At once


def test_of_two_builders_of_the_same_version_both_succeed(store: Store, files: list[Path]) -> None:
    planned = built(store, *files)
    seen: list[Manifest] = []
    ours = seal(
        Spy(store, lambda: seen.append(seal(store, "small", planned, **SETTINGS))), "small", planned, **SETTINGS
    )  # type: ignore[arg-type]
    assert seen == [ours]
    assert (pointer(store)["sequence"], len(manifests(store))) == (1, 1)


def test_of_two_builders_of_different_versions_one_is_told_to_run_again(
    store: Store, tmp_path: Path, files: list[Path]
) -> None:
    first = sealed(store, *files)
    theirs_planned = built(store, *files, source_file(tmp_path / "source", 8))
    ours_planned = built(store, *files, source_file(tmp_path / "source", 9))
    theirs: list[Manifest] = []
    late = Spy(store, lambda: theirs.append(seal(store, "small", theirs_planned, **SETTINGS)))
    with pytest.raises(Conflict) as told:
        seal(late, "small", ours_planned, **SETTINGS)  # type: ignore[arg-type]
    assert theirs[0].digest in str(told.value)
    assert latest_manifest(store, "small") == theirs[0]
    ours = seal(store, "small", ours_planned, **SETTINGS)
    assert (theirs[0].parent, ours.parent) == (first.digest, theirs[0].digest)
    assert (pointer(store)["manifest"], pointer(store)["sequence"]) == (ours.digest, 3)


SEAL = """
import json, sys
from storage.errors import Conflict
from storage.layout import open_store
from storage.manifest import seal
url, planned, settings = json.loads(sys.argv[1])
store = open_store(url)
print("ready", flush=True)
for dataset in sys.stdin:
    try:
        print(seal(store, dataset.strip(), planned, **settings).digest, flush=True)
    except Conflict:
        print("conflict", flush=True)
"""


def test_processes_that_seal_at_once_make_one_version(store: Store, files: list[Path]) -> None:
    names = [f"set-{number}" for number in range(10)]
    for name in names:
        planned = built(store, *files, dataset=name)
    asked = json.dumps([store.url, planned, SETTINGS])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", SEAL, asked], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    try:
        for process in started:
            assert process.stdout and process.stdout.readline() == "ready\n"
        for name in names:
            for process in started:
                assert process.stdin
                process.stdin.write(f"{name}\n")
                process.stdin.flush()
            answers = {process.stdout.readline().strip() for process in started if process.stdout}
            digest = seal(store, name, planned, **SETTINGS).digest
            assert answers - {"conflict"} == {digest}
            assert (pointer(store, name)["manifest"], pointer(store, name)["sequence"]) == (digest, 1)
            assert len(manifests(store, name)) == 1
    finally:
        for process in started:
            process.communicate()
    assert [process.returncode for process in started] == [0] * 3


# Refused


@pytest.mark.parametrize("lost", ["shard", "record"])
def test_a_missing_shard_is_named_and_nothing_is_sealed(store: Store, files: list[Path], lost: str) -> None:
    planned = built(store, *files)
    store.delete(keys.shard("small", planned[3]) if lost == "shard" else keys.record("small", planned[3]))
    with pytest.raises(ObjectMissing, match=f"{planned[3]}.*gpt2 dataset build"):
        seal(store, "small", planned, **SETTINGS)
    assert manifests(store) == []
    assert latest_manifest(store, "small") is None


def test_a_seal_that_failed_binds_the_name_to_nothing(store: Store, tmp_path: Path, files: list[Path]) -> None:
    planned = built(store, *files)
    store.delete(keys.record("small", planned[3]))
    with pytest.raises(ObjectMissing):
        seal(store, "small", planned, **SETTINGS)
    other = source_file(tmp_path / "other", 5)
    found = seal(store, "small", built(store, other), **SETTINGS | {"binding": {"source": "other"}})
    assert {row.shard_id.split("-")[0] for row in found.rows()} == {"file_5"}


def test_a_shard_of_another_size_is_not_done(store: Store, files: list[Path]) -> None:
    planned = built(store, *files)
    overwrite(store, keys.shard("small", planned[1]), b"short")
    with pytest.raises(ObjectMissing, match=planned[1]):
        seal(store, "small", planned, **SETTINGS)


@pytest.mark.parametrize(
    ("asked", "facts"),
    [
        ({"source": "other", "shard_tokens": 500}, ["source", "*.parquet", "other"]),
        ({"source": "*.parquet", "shard_tokens": 600}, ["shard_tokens", "500", "600"]),
        (BINDING | {"filters": ["score > 3"]}, ["filters", "score > 3"]),
        ({"source": "*.parquet"}, ["shard_tokens", "500"]),
    ],
)
def test_a_name_bound_to_other_settings_names_the_field(
    store: Store, files: list[Path], asked: dict[str, Any], facts: list[str]
) -> None:
    first = sealed(store, *files)
    for ask in (
        lambda: check_binding(store, "small", asked),
        lambda: seal(store, "small", first.shard_ids, **SETTINGS | {"binding": asked}),
    ):
        with pytest.raises(DatasetMismatch) as found:
            ask()
        for fact in ["small", "data.dataset", *facts]:
            assert fact in str(found.value)
    assert pointer(store)["sequence"] == 1


def test_the_same_settings_and_a_new_name_are_bound_freely(store: Store, files: list[Path]) -> None:
    sealed(store, *files)
    check_binding(store, "small", dict(BINDING))
    check_binding(store, "unknown", {"source": "other"})


def damage(store: Store, manifest: Manifest) -> str:
    """Change one digit of the manifest's bytes; returns their digest."""
    path = store.local_path(keys.manifest("small", manifest.digest))
    assert path is not None
    body = path.read_bytes().replace(b'"documents":', b'"Documents":', 1)
    path.write_bytes(body)
    return sha256(body)


def test_damaged_manifest_bytes_are_refused_with_both_digests(store: Store, files: list[Path]) -> None:
    first = sealed(store, *files)
    found = damage(store, first)
    for ask in (lambda: read_manifest(store, "small", first.digest), lambda: latest_manifest(store, "small")):
        with pytest.raises(StoreUnusable, match=f"{first.digest}.*{found}"):
            ask()


@pytest.mark.parametrize("versions", [1, 2])
def test_a_damaged_manifest_that_was_deleted_is_sealed_again(
    store: Store, tmp_path: Path, files: list[Path], versions: int
) -> None:
    """What the message of a damaged manifest tells people to do has to work."""
    last = sealed(store, *files)
    if versions == 2:
        files.append(source_file(tmp_path / "source", 9))
        last = sealed(store, *files)
    damage(store, last)
    store.delete(keys.manifest("small", last.digest))
    again = sealed(store, *files)
    assert again.columns == last.columns
    assert latest_manifest(store, "small") == again
    assert versions == 2 or again.digest == last.digest


def test_a_manifest_of_a_higher_schema_is_refused(store: Store, files: list[Path]) -> None:
    first = sealed(store, *files)
    body = canonical_json(json.loads(store.read(keys.manifest("small", first.digest)).body) | {"schema": 9})
    store.put_new(keys.manifest("small", sha256(body)), body)
    with pytest.raises(StoreUnusable, match="schema 9"):
        read_manifest(store, "small", sha256(body))


def test_a_manifest_that_is_not_there_is_named(store: Store) -> None:
    with pytest.raises(ObjectMissing, match="0" * 64):
        read_manifest(store, "small", "0" * 64)
    assert latest_manifest(store, "never-sealed") is None


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"{}", b"\xff"])
def test_a_damaged_pointer_is_named(store: Store, files: list[Path], body: bytes) -> None:
    planned = sealed(store, *files).shard_ids
    overwrite(store, keys.dataset_latest("small"), body)
    for ask in (lambda: latest_manifest(store, "small"), lambda: seal(store, "small", planned, **SETTINGS)):
        with pytest.raises(StoreUnusable, match="latest"):
            ask()


def test_a_rebuilt_shard_of_other_bytes_is_refused_with_both_digests(store: Store, files: list[Path]) -> None:
    first = sealed(store, *files)
    row = list(first.rows())[4]
    check_rebuilt(store, "small", first, {row.shard_id})
    key = keys.record("small", row.shard_id)
    overwrite(store, key, store.read(key).body.replace(row.sha256.encode(), b"0" * 64))
    check_rebuilt(store, "small", first, set(first.shard_ids) - {row.shard_id})
    with pytest.raises(ShardCorrupt) as found:
        check_rebuilt(store, "small", first, {row.shard_id})
    for fact in (row.shard_id, row.sha256, "0" * 64, "gpt2 dataset verify --repair"):
        assert fact in str(found.value)

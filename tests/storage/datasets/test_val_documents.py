"""The val split as a set of documents: whatever happens to the source files, train has none of them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model import tokenizer
from model.config import RunConfig
from storage.datasets import building, shards, val_documents
from storage.datasets.manifest import Manifest
from storage.datasets.plan import plan_files, planner
from storage.datasets.records import DTYPE, read_record
from storage.datasets.val_documents import HASH, ValDocuments, hashed, normalised
from storage.digests import canonical_json
from storage.errors import ObjectCorrupt, ObjectMissing, SourceInvalid
from storage.inspection.summary import summarise
from storage.inspection.verify import verify_dataset
from storage.keys import DatasetKeys
from storage.sources.mirror import list_source
from storage.stores.opening import open_store
from storage.stores.store import Store, overwrite
from tests.making import build_dataset, document, read_json, tiny_config, write_parquet
from tests.storage.source_files import write_jsonl

KEYS = DatasetKeys("small")
ROWS = 60  # of a source file: about four shards


def texts_of(store: Store, manifest: Manifest, split: str) -> list[bytes]:
    """The texts of a split, decoded from its shards."""
    texts = []
    for row in manifest.rows(split):
        ids = np.frombuffer(shards.read_shard(store, "small", row), DTYPE)
        for start, stop in zip(*shards.document_bounds(ids), strict=True):
            texts.append(tokenizer.decode_bytes(ids[start + 1 : stop].tolist()))
    return texts


def in_both(store: Store, manifest: Manifest) -> set[bytes]:
    return set(map(normalised, texts_of(store, manifest, "val"))) & set(
        map(normalised, texts_of(store, manifest, "train"))
    )


def texts(number: int) -> list[str]:
    return [document(number * 1_000 + row) for row in range(ROWS)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(2):
        write_parquet(tmp_path / "texts" / f"train-{number:05d}-of-00002.parquet", texts(number))
    return tmp_path / "texts"


@pytest.fixture
def config(tmp_path: Path, folder: Path) -> RunConfig:
    return tiny_config(str(tmp_path / "store"), str(folder))


def rename(folder: Path) -> None:
    (folder / "train-00000-of-00002.parquet").rename(folder / "zzz.parquet")


def renumber(folder: Path) -> None:
    """As the Hub does when it adds a file: every name and the cut between files change."""
    rows = [*texts(0), *texts(1), *texts(2)]
    for path in folder.iterdir():
        path.unlink()
    for number in range(3):
        write_parquet(folder / f"train-{number:05d}-of-00003.parquet", rows[number::3])


def append(folder: Path) -> None:
    write_parquet(folder / "train-00000-of-00002.parquet", [*texts(0), document(9_999)])


def prepend(folder: Path) -> None:
    write_parquet(folder / "train-00000-of-00002.parquet", [document(9_999), *texts(0)])


def change_format(folder: Path) -> None:
    """The same texts with other spaces, capitals and punctuation, as JSON lines."""
    (folder / "train-00000-of-00002.parquet").unlink()
    lines = (json.dumps({"text": f"  {text.upper().replace(' ', ' , ')}!\n"}) for text in texts(0))
    (folder / "again.jsonl").write_text("\n".join(lines))


def duplicate(folder: Path) -> None:
    write_parquet(folder / "more.parquet", [*texts(5), *texts(0)])


def lose(folder: Path) -> None:
    (folder / "train-00000-of-00002.parquet").unlink()


@pytest.mark.parametrize("change", [rename, renumber, append, prepend, change_format, duplicate, lose])
def test_no_val_document_is_ever_in_train(config: RunConfig, folder: Path, change: Callable[[Path], None]) -> None:
    store, first = open_store(config.store_url, create=True), build_dataset(config)
    change(folder)
    second = build_dataset(config)
    assert list(second.rows("val")) == list(first.rows("val"))
    assert in_both(store, first) == in_both(store, second) == set()
    assert verify_dataset(store, "small", second, eot=tokenizer.EOT, quick=False) == []


def test_a_renamed_file_keeps_its_shards(config: RunConfig, folder: Path) -> None:
    first = build_dataset(config)
    rename(folder)
    assert sorted(build_dataset(config).shard_ids) == sorted(first.shard_ids)


def test_documents_with_lone_surrogates_stay_in_val(config: RunConfig, folder: Path) -> None:
    """JSON may hold them; a shard holds U+FFFD instead."""
    odd = [f"\ud800{text} \udfff" for text in texts(0)]
    write_jsonl(folder / "a.jsonl", odd)
    build_dataset(config)
    write_jsonl(folder / "a.jsonl", [*odd, document(9_999)])
    manifest = build_dataset(config)
    assert in_both(open_store(config.store_url), manifest) == set()
    assert manifest.totals["train"]["in_val"] == manifest.totals["val"]["documents"]


def test_what_train_leaves_out_is_counted_for_each_refresh(config: RunConfig, folder: Path) -> None:
    """Every row is a document of its shard, or counted and listed as left out."""
    store, first = open_store(config.store_url, create=True), build_dataset(config)
    card = summarise(store, "small", first)
    assert (card.in_val, card.in_val_added) == (0, 0)
    duplicate(folder)
    second = build_dataset(config)
    card = summarise(store, "small", second)
    val = second.totals["val"]["documents"]
    assert card.in_val == card.in_val_added == second.totals["train"]["in_val"] == val > 10
    assert card.rows == sum(totals["documents"] for totals in second.totals.values()) + val
    write_parquet(folder / "last.parquet", texts(7))
    card = summarise(store, "small", build_dataset(config))
    assert (card.in_val, card.in_val_added) == (val, 0)
    for row in second.rows("train"):
        record = read_record(store, "small", row.shard_id)
        assert record.documents + record.in_val == record.recipe.row_to - record.recipe.row_from


def test_train_keeps_val_documents_if_configured(config: RunConfig, folder: Path) -> None:
    config = tiny_config(config.store_url, str(folder), "data.keep_val_duplicates=true")
    build_dataset(config)
    duplicate(folder)
    manifest = build_dataset(config)
    store = open_store(config.store_url)
    assert len(in_both(store, manifest)) == manifest.totals["val"]["documents"]
    assert not list(store.list(f"{KEYS.prefix}val/"))


@pytest.mark.parametrize("damage", ["lost", "cut", "changed"])
def test_damaged_hashes_are_written_again(config: RunConfig, folder: Path, damage: str) -> None:
    build_dataset(config)
    store = open_store(config.store_url)
    [stored] = list(store.list(f"{KEYS.prefix}val/"))
    body = bytes(store.read(stored.key).body)
    changed = {"lost": b"", "cut": body[:-3], "changed": body[:-8] + bytes(8)}[damage]
    overwrite(store, stored.key, changed)
    if damage == "lost":
        store.delete(stored.key)
    else:
        with pytest.raises(ObjectCorrupt, match=stored.key):
            val_documents.read(store, "small", stored.key.split("/")[-1].removesuffix(".bin"))
    duplicate(folder)
    assert in_both(store, build_dataset(config)) == set()
    assert store.read(stored.key).body == body


def test_a_dataset_from_before_the_set_keeps_val_and_makes_train_anew(config: RunConfig, folder: Path) -> None:
    """Version 0.1.0 named shards by file, and trained on whatever was not in a val shard."""
    store, first = open_store(config.store_url, create=True), build_dataset(config)
    split = read_json(store, KEYS.split)
    assert split is not None
    old_names = []
    for number, row in enumerate(first.rows("val")):
        old_names.append(f"train-00000-of-00002-{number:05d}-0123456789ab")
        store.put_new(KEYS.shard(old_names[-1]), store.read(KEYS.shard(row.shard_id)).body)
        record = json.loads(store.read(KEYS.record(row.shard_id)).body)
        del record["in_val_rows"]
        store.put_new(KEYS.record(old_names[-1]), canonical_json(record | {"shard_id": old_names[-1]}))
    overwrite(store, KEYS.split, canonical_json(split | {"val": old_names}))
    duplicate(folder)
    second = build_dataset(config)
    assert [row.shard_id for row in second.rows("val")] == old_names
    assert in_both(store, second) == set()
    assert second.totals["train"]["documents"] == 4 * ROWS - 2 * second.totals["val"]["documents"]


@pytest.mark.parametrize(
    ("split", "setting", "short"),
    [("val", 'data.filters=["length >= 1000"]', 400), ("train", 'data.filters=["length < 1000"]', 40)],
)
def test_a_split_without_documents_is_refused(tmp_path: Path, split: str, setting: str, short: int) -> None:
    """Before any shard is made, a plan only knows how long the documents of its sample are."""
    texts = [document(number, 60 if number < short else 300) for number in range(short + 300)]
    write_parquet(tmp_path / "texts" / "a.parquet", texts)
    config = tiny_config(str(tmp_path / "store"), str(tmp_path / "texts"), setting, "data.val_shards=6")
    with pytest.raises(SourceInvalid, match=f"split {split} .*length .* 1000.* dropped"):
        build_dataset(config)
    assert not list(open_store(config.store_url).list(KEYS.manifests))
    assert read_json(open_store(config.store_url), KEYS.split) is None


def test_a_source_of_which_no_row_is_left_is_refused(config: RunConfig) -> None:
    config = tiny_config(config.store_url, config.data.source, 'data.filters=["length < 0"]')
    with pytest.raises(SourceInvalid, match=r"no documents.*length < 0"):
        build_dataset(config)


def test_a_lost_split_is_not_chosen_anew(config: RunConfig, folder: Path) -> None:
    build_dataset(config)
    store = open_store(config.store_url)
    store.delete(KEYS.split)
    rename(folder)
    with pytest.raises(ObjectMissing, match=KEYS.split):
        build_dataset(config)


# Hashes

WORDS = st.lists(st.sampled_from(["a", "B", "the", "7", "żółć", "x" * 200, "東京"]), max_size=14)
GAPS = st.lists(st.sampled_from([" ", "  ", "\n", ", ", "!?", "-" * 300]), min_size=15, max_size=15)


def joined(words: list[str], gaps: list[str]) -> bytes:
    return "".join(gap + word for gap, word in zip(gaps, words, strict=False)).encode()


@given(WORDS, GAPS, GAPS)
def test_equal_words_are_equal_documents(words: list[str], gaps: list[str], others: list[str]) -> None:
    text, other = joined(words, gaps), joined([word.lower() for word in words], others)
    assert normalised(text) == normalised(other)
    assert hashed(text) == hashed(other) or not words
    assert other in ValDocuments(np.array([hashed(text)], HASH)) or not words


def test_other_words_are_other_documents() -> None:
    val = [document(number).encode() for number in range(200)]
    documents = ValDocuments(np.unique(np.array([hashed(text) for text in val], HASH)))
    assert all(text in documents for text in val)
    assert not any(document(number).encode() in documents for number in range(200, 400))
    assert not any(text + b" more" in documents for text in val)
    assert b"" not in documents


def test_texts_without_words_are_compared_as_they_are() -> None:
    documents = ValDocuments(np.array([hashed(b"!!!")], HASH))
    assert (b"!!!" in documents, b"..." in documents, b"" in documents) == (True, False, False)


def test_the_names_of_train_shards_are_known_before_val_is_made(config: RunConfig) -> None:
    """Else a stopped first build could not tell which files it still needs."""
    manifest = build_dataset(config)
    empty = tiny_config(config.store_url, config.data.source, "data.dataset=other")
    store, spec = open_store(config.store_url), empty.data.spec(tokenizer.identity())
    files = list_source(store, spec.source, "", "main", "train")[0].files
    make_plan = planner(store, spec.settings, tokenizer.encode)
    build = building.start_build(store, spec, list(plan_files(store, "other", files, spec.settings, make_plan)))
    assert build.planned == manifest.shard_ids

"""Columns: fields inside columns, names with other characters, and the folders of Hive partitions."""

import json
from datetime import date
from itertools import product
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.inspection import trace
from model import tokenizer
from model.config import RunConfig
from storage.datasets.manifest import Manifest
from storage.errors import SourceInvalid
from storage.inspection.verify import check_documents
from storage.sources.files import SourceFile, hive_columns
from storage.sources.mirror import list_source
from storage.stores.opening import open_store
from storage.stores.store import Store
from tests.corpora import encoded, write_files
from tests.hub import Hub
from tests.making import build_dataset, document, tiny_config
from tests.storage.source_files import rows, texts_of, write_lines

SMALL = ("data.shard_tokens=60", "data.val_shards=1", "data.keep_val_duplicates=true")
ITEMS: list[dict[str, Any]] = [
    {
        "doc": {"text": document(number, 20), "meta": {"score": number}},
        "my score": number,
        "day": f"2024-03-{number + 1:02d}",
        "doc.kind": "odd" if number % 2 else "even",
        "an.outer": {"n": number},
    }
    for number in range(20)
]
TEXTS = [item["doc"]["text"] for item in ITEMS]


def build(folder: Path, source: object, *settings: str, filters: tuple[str, ...] = ()) -> tuple[RunConfig, Manifest]:
    config = tiny_config(f"{folder}/store", str(source), *SMALL, *settings, f"data.filters={json.dumps(filters)}")
    return config, build_dataset(config)


def documents(manifest: Manifest) -> int:
    return sum(counts["documents"] for counts in manifest.totals.values())


def write_items(folder: Path, kind: str, items: list[dict[str, Any]]) -> Path:
    if kind == "jsonl":
        return write_lines(folder / "a.jsonl", *(json.dumps(item) for item in items))
    table = pa.Table.from_pylist([item | {"day": date.fromisoformat(item["day"])} for item in items])
    pq.write_table(table, folder / "a.parquet", row_group_size=3)
    return folder / "a.parquet"


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    ("condition", "kept"),
    [
        ("doc.meta.score >= 3", range(3, 20)),
        ('"my score" < 3', range(3)),
        ("an.outer.n < 3", range(3)),
        ("day >= '2024-03-11'", range(10, 20)),
        ("day in ['2024-03-02', '2024-03-05']", (1, 4)),
        ("doc.kind == 'odd'", range(1, 20, 2)),  # a column of that name, not a field
    ],
)
def test_conditions_on_fields_names_and_dates(tmp_path: Path, kind: str, condition: str, kept: Any) -> None:
    path = write_items(tmp_path, kind, ITEMS)
    counts = rows(path, "doc.text", condition).tokens
    assert [number for number, count in enumerate(counts) if count] == list(kept)
    _, manifest = build(tmp_path, path, "data.text_column=doc.text", "data.shard_tokens=30", filters=(condition,))
    assert documents(manifest) == len(list(kept))


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_text_inside_a_column_is_read_and_a_null_is_named(tmp_path: Path, kind: str) -> None:
    path = write_items(tmp_path, kind, ITEMS)
    assert texts_of(path, 0, 20, column="doc.text") == TEXTS
    for nothing in ({"text": None, "meta": {"score": 1}}, None):
        path = write_items(tmp_path, kind, [*ITEMS, ITEMS[0] | {"doc": nothing}])
        with pytest.raises(SourceInvalid, match=r"'doc\.text'.*null"):
            rows(path, "doc.text")
        assert texts_of(path, 0, 20, column="doc.text") == TEXTS


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    ("column", "meant"),
    [("text", "'doc.text'"), ("doc.txt", "'doc.text'"), ("Day", "'day'"), ("doc.text.x", "'doc.text'")],
)
def test_a_missing_column_names_what_is_there_and_what_may_be_meant(
    tmp_path: Path, kind: str, column: str, meant: str
) -> None:
    path = write_items(tmp_path, kind, ITEMS)
    with pytest.raises(SourceInvalid, match=r"my score.*doc\.text.*data\.text_column") as error:
        rows(path, column, strict=False)
    assert f"perhaps {meant}" in str(error.value)
    with pytest.raises(SourceInvalid, match=r"data\.filters.*day") as error:
        rows(path, "doc.text", f"{column} >= 3")
    assert meant in str(error.value)


@pytest.mark.parametrize("strict", [False, True])
def test_another_name_for_the_text_or_a_field_is_suggested(tmp_path: Path, strict: bool) -> None:
    path = write_lines(tmp_path / "a.jsonl", '{"id": 1, "content": "one", "meta": {"score": 1}}')
    with pytest.raises(SourceInvalid, match="perhaps 'content'"):
        rows(path, strict=strict)
    with pytest.raises(SourceInvalid, match=r"perhaps 'meta\.score'"):
        rows(path, "content", "meta.scor >= 1", strict=strict)


# Hive partitions


@pytest.mark.parametrize(("kind", "compression"), [("parquet", ""), ("jsonl", ".gz"), ("txt", "")])
@pytest.mark.parametrize(
    ("filters", "folders"),
    [((), 4), (("lang == 'en'",), 2), (("lang == 'en'", "year >= 2024"), 1), (("year in [2023, 2024]",), 4)],
)
def test_folders_are_columns(
    tmp_path: Path, kind: str, compression: str, filters: tuple[str, ...], folders: int
) -> None:
    for number, (lang, year) in enumerate(product(("en", "de"), (2023, 2024))):
        texts = [document(number * 100 + row, 20) for row in range(8)]
        write_files(tmp_path / f"source/lang={lang}/year={year}", encoded(texts, kind, compression, files=1))
    config, manifest = build(tmp_path, f"{tmp_path}/source/**/*.{kind}{compression}", filters=filters)
    assert documents(manifest) == folders * 8
    store = open_store(config.store_url)
    listing, _ = list_source(store, config.data.source, "", "", "", filters=config.data.filters)
    assert any("do not pass data.filters" in line for line in listing.ignored) == (folders < 4)
    checked = list(check_documents(store, "small", manifest, listing.files, tokenizer.encode, count=5, seed=1))
    assert checked == [None] * 5


def test_a_condition_on_a_folder_and_one_on_a_column_both_count(tmp_path: Path) -> None:
    for lang in ("en", "de"):
        texts = [lang * 9 + str(row) for row in range(50)]
        write_files(tmp_path / "source" / f"lang={lang}", encoded(texts, "jsonl", files=1, score=list(range(50))))
    _, manifest = build(tmp_path, f"{tmp_path}/source/**/*.jsonl", filters=("lang == 'en'", "score >= 10"))
    assert documents(manifest) == 40


def test_a_folder_of_null_passes_no_filter(tmp_path: Path) -> None:
    for lang in ("en", "__HIVE_DEFAULT_PARTITION__"):
        texts = [lang * 9 + str(row) for row in range(50)]
        write_files(tmp_path / "source" / f"lang={lang}", encoded(texts, "jsonl", files=1))
    for filters, kept in (((), 100), (("lang != 'de'",), 50)):
        name = f"data.dataset=kept-{kept}"
        assert documents(build(tmp_path, f"{tmp_path}/source/**/*.jsonl", name, filters=filters)[1]) == kept


def test_folders_that_a_filter_leaves_out_take_nothing_from_the_others(tmp_path: Path) -> None:
    texts = [{f"{half}/lang={lang}/{at:02d}.txt": f"{half} {at} {lang * same} text".encode() * 9 for at in range(20)}
             for half in "xy" for lang in ("de", "en") for same in [half == "x"]]  # fmt: skip
    files = {name: body for part in texts for name, body in part.items()}  # in y, both languages have the same texts
    source = write_files(tmp_path / "source", files)
    config, manifest = build(tmp_path, f"{source}/**/*.txt", filters=('lang == "en"',))
    assert documents(manifest) == 40
    store = open_store(config.store_url)
    found = {document.source for _, document in trace.windows(store, trace.trace_target(store, config), "train", 0, 4)}
    assert found <= files.keys()


def test_folders_of_a_hub_dataset_are_columns_and_are_traced(tmp_path: Path, hub: Hub) -> None:
    files = {
        f"data/lang={lang}/{name}": body
        for lang in ("de", "en")
        for name, body in encoded([f"{lang * 9} {row}" for row in range(50)], "parquet", files=1).items()
    }
    hub.dataset("org/web", files, configs={"default": {"train": "data/**"}})
    config, manifest = build(tmp_path, "org/web", "data.config=default", filters=("lang == 'en'",))
    assert documents(manifest) == 50
    store = open_store(config.store_url)
    found = [document for _, document in trace.windows(store, trace.trace_target(store, config), "train", 0, 4)]
    assert all(document.row is not None for document in found)


@pytest.mark.parametrize(
    ("source", "columns"), [("**/*.jsonl", {"lang": "en"}), ("lang=*/*.jsonl", {"lang": "en"}), ("lang=en", {})]
)
def test_folders_above_the_source_are_not_columns(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, source: str, columns: dict[str, str]
) -> None:
    write_files(tmp_path / "disk=1/lang=en", {"a.jsonl": b'{"text": "a"}'})
    monkeypatch.chdir(tmp_path / "disk=1")
    for path in (source, f"{tmp_path}/disk=1/{source}"):
        (file,) = list_source(store, path, "", "", "")[0].files
        assert file.columns == columns


def test_the_values_of_folders_are_unquoted_and_null_is_none() -> None:
    assert hive_columns("/data/city=New%20York/day=__HIVE_DEFAULT_PARTITION__/x=/a=b=c/part=1.parquet") == {
        "city": "New York",
        "day": None,
        "a": "b=c",
    }
    file = SourceFile("a.parquet", 1, "0", "/lang=en/a.parquet", {"lang": "en"})
    assert file == SourceFile("a.parquet", 1, "0", "/lang=en/a.parquet")


# Which shards are val


def test_val_shards_are_spread_over_the_source(tmp_path: Path) -> None:
    texts = [document(number, 20) for number in range(100)]
    source = write_files(tmp_path / "source", encoded(texts, "jsonl", files=5))
    spread = ("data.shard_tokens=300", "data.val_shards=5", "data.val_choice=spread")
    _, manifest = build(tmp_path, source, *spread)
    splits = [row.split for row in manifest.rows()]
    every = len(splits) // 5
    assert [at for at, split in enumerate(splits) if split == "val"] == list(range(0, 5 * every, every))
    assert len({row.shard_id[:12] for row in manifest.rows("val")}) == 5  # of each file
    _, first = build(tmp_path, source, *spread[:2], "data.dataset=other")
    assert [row.split for row in first.rows()][:5] == ["val"] * 5
    assert "val_choice" not in json.dumps(first.to_json())
    assert build(tmp_path, source, *spread)[1] == manifest

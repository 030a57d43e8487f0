"""Converted files: made once, named by content, packed so that one more file changes little, and traced to the row."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows.inspection.garbage import collect
from model import tokenizer
from model.config import RunConfig
from storage import keys
from storage.cache.shards import ShardCache
from storage.datasets.manifest import Manifest
from storage.digests import digest
from storage.errors import SourceInvalid
from storage.inspection import lineage
from storage.inspection.verify import check_documents
from storage.sources import conversion, documents, mirror
from storage.sources.conversion import SMALL_BYTES, pack
from storage.sources.files import SourceFile
from storage.stores.opening import open_store
from storage.stores.store import Store
from tests.corpora import COMPRESS, encoded, write_files
from tests.damage import flip_bit
from tests.hub import Hub
from tests.making import build_dataset, document, tiny_config

TEXTS = [document(number, 20) for number in range(120)]
KEEP_ALL = "data.keep_val_duplicates=true"


@pytest.fixture
def converted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were converted, several separated by a space."""
    names = list[str]()
    write = conversion.write_parquet

    def count(files: tuple[SourceFile, ...], *rest: object) -> str:
        names.append(" ".join(file.name for file in files))
        return write(files, *rest)  # type: ignore[arg-type]  # what `convert` gives

    monkeypatch.setattr(conversion, "write_parquet", count)
    return names


def configured(folder: Path, *settings: str) -> RunConfig:
    return tiny_config(str(folder / "store"), str(folder / "source"), "data.shard_tokens=600", *settings)


def listed(config: RunConfig) -> tuple[SourceFile, ...]:
    store, data = open_store(config.store_url, create=True), config.data
    return mirror.list_source(store, data.source, data.config, "main", "train", filters=data.filters)[0].files


def converted_keys(store: Store) -> list[str]:
    return sorted(entry.key for entry in store.list(keys.CONVERTED))


def test_a_file_is_converted_once_whatever_its_name_and_its_dataset(tmp_path: Path, converted: list[str]) -> None:
    source = write_files(tmp_path / "source", encoded(TEXTS, "csv", ".gz", files=2, number=list(range(len(TEXTS)))))
    config = configured(tmp_path)
    first = build_dataset(config)
    assert converted == ["part-00000.csv.gz", "part-00001.csv.gz"]
    (source / "part-00001.csv.gz").rename(source / "renamed.csv.gz")
    assert build_dataset(config) == first
    again = build_dataset(configured(tmp_path, "data.dataset=other", "data.text_column=text", KEEP_ALL))
    assert len(converted) == 2
    assert again.tokens == first.tokens
    (source / "renamed.csv.gz").rename(source / "renamed.tsv.gz")  # the same bytes would be other rows
    assert {file.suffix.format for file in listed(config)} == {".csv", ".tsv"}
    with pytest.raises(SourceInvalid, match=r"renamed\.tsv\.gz: column 'text' should hold strings"):
        build_dataset(configured(tmp_path, "data.dataset=third"))


@pytest.mark.parametrize("others", ["csv", "jsonl"])  # beside JSON lines it is a member of a part
def test_a_file_with_a_corrected_suffix_is_read_anew(tmp_path: Path, others: str) -> None:
    source = write_files(tmp_path / "source", encoded(TEXTS, others, ".gz", files=2))
    array = json.dumps([{"text": f"{text} again"} for text in TEXTS]).encode()
    write_files(source, {"a.jsonl.gz": COMPRESS[".gz"](array)})
    config = configured(tmp_path, "data.on_bad_document=skip", KEEP_ALL)
    assert sum(counts["documents"] for counts in build_dataset(config).totals.values()) == len(TEXTS)
    (source / "a.jsonl.gz").rename(source / "a.json.gz")
    assert {document_.source for document_ in traced(config, build_dataset(config))} >= {"a.json.gz"}


@pytest.mark.parametrize("lost", ["file", "record", "both", "cut", "bit"])
def test_a_lost_or_damaged_copy_is_made_again_or_named(tmp_path: Path, converted: list[str], lost: str) -> None:
    write_files(tmp_path / "source", encoded(TEXTS, "jsonl", ".gz", files=1))
    config = configured(tmp_path)
    manifest, store = build_dataset(config), open_store(config.store_url)
    record, parquet = sorted(converted_keys(store), key=lambda key: key.endswith(".parquet"))
    for key in [parquet] * (lost in ("file", "both")) + [record] * (lost in ("record", "both")):
        store.delete(key)
    path = store.local_path(parquet)
    assert path is not None
    if lost == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    if lost == "bit":
        flip_bit(store, parquet)
    other = configured(tmp_path, "data.dataset=other")
    if lost == "bit":
        with pytest.raises(SourceInvalid, match=r"sources/converted/.*Delete this damaged copy"):
            build_dataset(other)
        store.delete(parquet)
    assert build_dataset(other).columns == manifest.columns
    assert len(converted) == 2
    assert converted_keys(store) == sorted([record, parquet])


def test_a_killed_conversion_leaves_nothing_that_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path / "source", encoded(TEXTS, "json array", ".xz", files=1))
    config = configured(tmp_path)
    with monkeypatch.context() as killed:
        killed.setattr(conversion, "put_named_by_content", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            build_dataset(config)
    store = open_store(config.store_url)
    (record,) = converted_keys(store)
    assert list(mirror.FOLDER.iterdir()) == []
    build_dataset(config)
    assert len(converted_keys(store)) == 2
    assert [item.name for item in collect(store, -60, remove=False) if item.kind == "source"] == []
    store.delete(record)
    assert [item.kind for item in collect(store, -60, remove=False)].count("source") == 1
    assert list(collect(store, 3600)) == []


def test_garbage_collection_keeps_what_a_conversion_reuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path / "source", encoded(TEXTS, "csv", files=1))
    config, put = configured(tmp_path), conversion.put_named_by_content
    manifest, store = build_dataset(config), open_store(config.store_url)
    record, parquet = sorted(converted_keys(store), key=lambda key: key.endswith(".parquet"))
    store.delete(record)
    os.utime(tmp_path / "store" / parquet, (0, 0))

    def put_and_collect(*arguments: Any) -> None:
        put(*arguments)
        assert list(collect(store, 3600)) == []

    monkeypatch.setattr(conversion, "put_named_by_content", put_and_collect)
    assert build_dataset(configured(tmp_path, "data.dataset=other")).columns == manifest.columns


def test_a_file_that_changes_while_it_is_converted_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_files(tmp_path / "source", encoded(TEXTS, "csv", files=1))
    body, write = (source / "part-00000.csv").read_bytes(), conversion.write_parquet

    def write_changed(files: Any, opened: Any, output: Any) -> None:
        @contextmanager
        def changed(file: SourceFile) -> Iterator[Any]:
            with opened(file) as stream:
                (source / "part-00000.csv").write_bytes(body + b"more\n")
                yield stream

        write(files, changed, output)

    monkeypatch.setattr(conversion, "write_parquet", write_changed)
    with pytest.raises(SourceInvalid, match=r"part-00000\.csv: changed since the plan"):
        build_dataset(configured(tmp_path))
    assert converted_keys(open_store(configured(tmp_path).store_url)) == []


def test_a_shard_whose_file_is_not_converted_is_refused(tmp_path: Path) -> None:
    write_files(tmp_path / "source", encoded(TEXTS, "txt"))
    with pytest.raises(SourceInvalid, match=r"not yet converted.*gpt2 dataset build"):
        documents.rows(listed(configured(tmp_path))[0], "text")


FILES = st.lists(
    st.tuples(st.integers(1, SMALL_BYTES * 2), st.sampled_from([".txt", ".md", ".json", ".jsonl.gz", ".csv", ".jsonl"]))
)


def files_of(sizes: list[tuple[int, str]]) -> list[SourceFile]:
    return [
        SourceFile(f"{number:04d}{suffix}", size, digest([number, size]), f"/{number:04d}{suffix}")
        for number, (size, suffix) in enumerate(sizes)
    ]


@given(
    sizes=FILES, at=st.integers(0, 50), size=st.integers(1, SMALL_BYTES), suffix=st.sampled_from([".txt", ".jsonl.gz"])
)
def test_one_more_file_changes_at_most_two_parts(sizes: list[tuple[int, str]], at: int, size: int, suffix: str) -> None:
    files = files_of(sizes)
    parts = list(pack(files))
    assert [member for part in parts for member in part.members or (part,)] == files
    for part in parts:
        assert all(member.size_bytes < SMALL_BYTES for member in part.members)
        assert {member.suffix.format in (".txt", ".md") for member in part.members} != {True, False}
        assert not part.members or part.size_bytes == sum(member.size_bytes for member in part.members)
    same_kind = [
        file for file in files if file.suffix.format in ((".txt", ".md") if suffix == ".txt" else (".json", ".jsonl"))
    ]
    if len(same_kind) == len(files):  # else it may also part two neighbours of another kind
        more = SourceFile(f"new{suffix}", size, digest(["new", size]), f"/new{suffix}")
        with_more = list(pack([*files[:at], more, *files[at:]]))
        assert len({part.digest for part in with_more} - {part.digest for part in parts}) <= 2


def test_files_of_different_folders_share_no_part() -> None:
    files = [replace(file, columns={"dump": "ab"[at // 2]}) for at, file in enumerate(files_of([(9, ".txt")] * 4))]
    assert [part.columns for part in pack(files)] == [{"dump": "a"}, {"dump": "b"}]


def test_many_small_files_are_a_few_parts_of_about_64_mb() -> None:
    parts = list(pack(files_of([(64_000, ".txt")] * 20_000)))
    assert 10 < len(parts) < 40


def traced(config: RunConfig, manifest: Manifest) -> Iterator[lineage.Traced]:
    store, files = open_store(config.store_url), {file.digest: file for file in listed(config)}
    for row in manifest.rows():
        ids = ShardCache(store, config.data.dataset).open(row)
        yield from (
            document for _, document in lineage.trace(store, config.data.dataset, row, ids, [(0, len(ids))], files)
        )


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv"])
def test_every_document_is_traced_to_its_own_file_and_row(tmp_path: Path, kind: str) -> None:
    files = encoded(TEXTS, kind, ".gz", files=5)
    write_files(tmp_path / "source", files)
    config = configured(tmp_path, KEEP_ALL)
    rows = len(TEXTS) // len(files)
    for number, document_ in enumerate(traced(config, build_dataset(config))):
        assert (document_.source, document_.row) == (list(files)[number // rows], number % rows)
        assert tokenizer.decode(document_.ids[1:].tolist()) == TEXTS[number]


@pytest.mark.parametrize("filters", ["", "lang == 'en'"])
def test_documents_of_a_part_that_is_packed_anew_are_traced(tmp_path: Path, filters: str) -> None:
    write_files(tmp_path / "source" / "lang=en", encoded(TEXTS, "txt"))
    settings = [f"data.source={tmp_path}/source/*/*", *([f'data.filters=["{filters}"]'] if filters else [])]
    config = configured(tmp_path, KEEP_ALL, *settings)
    before = build_dataset(config)
    expected = list(map(str, traced(config, before)))
    write_files(tmp_path / "source" / "lang=en", {"part-00007b.txt": b"One more."})
    assert list(map(str, traced(config, before))) == expected
    store, files = open_store(config.store_url), listed(config)
    checked = list(check_documents(store, "small", before, files, tokenizer.encode, count=20, seed=1))
    assert checked == [None] * 20
    row = next(before.rows())
    for _, document_ in lineage.trace(store, "small", row, ShardCache(store, "small").open(row), [(0, 9)], {}):
        assert (document_.row is None) == bool(document_.why) == bool(filters)


def test_a_bad_row_of_a_packed_file_is_named_by_its_file(tmp_path: Path) -> None:
    files = encoded(TEXTS, "jsonl", ".zst", files=4)
    files["part-00002.jsonl.zst"] = COMPRESS[".zst"](b'{"text": "good"}\n{"text": 1}\n')
    write_files(tmp_path / "source", files)
    with pytest.raises(SourceInvalid, match=r": part-00002\.jsonl\.zst: row 1\b|^part-00002\.jsonl\.zst: row 1\b"):
        build_dataset(configured(tmp_path))


@pytest.mark.parametrize("compression", ["", ".gz"])
def test_a_column_of_the_source_may_be_named_as_that_of_a_part(tmp_path: Path, compression: str) -> None:
    lines = [{"text": text, "packed_file": "theirs", "packed_row": "x"} for text in TEXTS]
    body = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    source = write_files(tmp_path / "source", {f"a.jsonl{compression}": COMPRESS[compression](body)})
    config = configured(tmp_path, KEEP_ALL)
    assert {document_.source for document_ in traced(config, build_dataset(config))} == {f"a.jsonl{compression}"}
    body += b'{"text": null, "packed_file": "theirs"}'
    write_files(source, {f"a.jsonl{compression}": COMPRESS[compression](body)})
    with pytest.raises(SourceInvalid, match=rf"a\.jsonl{compression}: row 120: column 'text' should hold text"):
        build_dataset(config)


def test_hub_files_are_converted_from_the_download_and_not_kept_beside(
    tmp_path: Path, hub: Hub, converted: list[str]
) -> None:
    files = encoded(TEXTS, "jsonl", ".zst", files=3)
    hub.dataset("org/web", {f"data/{name}": body for name, body in files.items()})
    config = tiny_config(str(tmp_path / "store"), "org/web", "data.config=default", "data.shard_tokens=600", KEEP_ALL)
    from_hub = build_dataset(config)
    store = open_store(config.store_url)
    assert len(converted) == 1
    assert {entry.key.split("/")[1] for entry in store.list("sources/")} == {"listings", "converted"}
    assert list(mirror.FOLDER.iterdir()) == []
    write_files(tmp_path / "source", files)
    local = build_dataset(configured(tmp_path, "data.dataset=local", KEEP_ALL))
    assert local.columns == from_hub.columns  # named by content, wherever it lies
    assert build_dataset(config) == from_hub
    assert len(converted) == 1
    assert [document_.source for document_ in traced(config, from_hub)][-1] == "data/part-00002.jsonl.zst"

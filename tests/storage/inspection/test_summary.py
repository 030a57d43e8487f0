"""A dataset's summary equals a count of the rows of its source files."""

from collections import Counter
from pathlib import Path

import pytest

from storage.datasets.manifest import Manifest
from storage.digests import canonical_json
from storage.errors import ObjectMissing
from storage.inspection.leaks import LeakReport
from storage.inspection.summary import DatasetSummary, summarise
from storage.keys import DatasetKeys
from storage.stores.store import overwrite
from tests.crawl import GOOD, LONG, SKIPPING, Crawl, Kept


def histogram(kept: list[Kept]) -> list[int]:
    """How many documents have 1, 2 to 3, 4 to 7, … tokens, counted by halving."""
    counts: Counter[int] = Counter()
    for document in kept:
        power, left = 0, len(document.ids)
        while left > 1:
            power, left = power + 1, left // 2
        counts[power] += 1
    return [counts[power] for power in range(max(counts) + 1)]


def added_up(manifest: Manifest) -> dict[str, int]:
    """The manifest's totals over both splits."""
    names = ("shards", "tokens", "documents", "skipped", "text_bytes")
    return {name: sum(sums[name] for sums in manifest.totals.values()) for name in names}


def check_totals(summary: DatasetSummary, crawl: Crawl, manifest: Manifest) -> None:
    """Compare the summary's sums with the rows of the source files and with the manifest's totals."""
    total = sum(map(len, crawl.rows.values()))
    kept, skipped = crawl.kept(), crawl.skipped()
    assert (summary.rows, summary.filtered) == (total, total - len(kept) - len(skipped))
    assert summary.filtered_share == pytest.approx(summary.filtered / total)
    sums = {name: sum(getattr(file, name) for file in summary.files) for name in added_up(manifest)}
    assert sums == added_up(manifest)
    assert sums["skipped"] == len(skipped)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("settings", [(), (GOOD, SKIPPING)], ids=["all", "chosen"])
def test_a_summary_counts_what_the_source_files_hold(tmp_path: Path, kind: str, settings: tuple[str, ...]) -> None:
    crawl = Crawl(tmp_path, *settings, kind=kind, bad=bool(settings))
    manifest = crawl.build()
    summary = summarise(crawl.store, "small", manifest)
    check_totals(summary, crawl, manifest)
    kept = crawl.kept()
    assert bool(crawl.skipped()) == bool(settings)
    assert summary.dumps == Counter(document.columns["dump"] for document in kept if document.columns["dump"])
    assert list(summary.dumps) == sorted(summary.dumps)
    assert summary.lengths == histogram(kept)
    assert len(summary.lengths) > 5
    assert [file.name for file in summary.files] == sorted(crawl.rows)
    for file in summary.files:
        documents = [document for document in kept if document.source == file.name]
        assert file.documents == len(documents)
        assert file.tokens == sum(len(document.ids) for document in documents)
        assert file.text_bytes == sum(len(document.text.encode()) for document in documents)
        assert file.skipped == sum(document.source == file.name for document in crawl.skipped())
        assert file.filtered == 40 - file.documents - file.skipped
    assert summary.model_dump(mode="json") == {
        "dataset": "small", "manifest": manifest.digest, "parent": None, "recipe": manifest.recipe.to_json(),
        "tokenizer": manifest.tokenizer, "totals": manifest.totals, "origin": {}, "audit": None,
        "files": [file.model_dump() for file in summary.files], "dumps": summary.dumps, "lengths": summary.lengths,
        "rows": summary.rows, "filtered": summary.filtered, "filtered_share": summary.filtered_share,
        "in_val": 0, "in_val_added": 0,
    }  # fmt: skip


@pytest.mark.parametrize("empty", ["filtered", "skipped"])
def test_rows_of_a_shard_without_documents_are_counted(tmp_path: Path, empty: str) -> None:
    filters = LONG if empty == "filtered" else "data.filters=[]"
    crawl = Crawl(tmp_path, filters, SKIPPING, kind="jsonl", names=("file_0", "file_1", "file_2"))
    last = crawl.rows["file_2.jsonl"] * 8  # more rows than a plan samples: only the job knows that all are short
    crawl.write("file_2.jsonl", [row | {"text": "short" if empty == "filtered" else None} for row in last])
    manifest = crawl.build()
    assert {document.source for document in crawl.kept()} == {"file_0.jsonl", "file_1.jsonl"}
    check_totals(summarise(crawl.store, "small", manifest), crawl, manifest)


def test_files_of_the_same_name_are_counted_separately(tmp_path: Path) -> None:
    crawl = Crawl(tmp_path, names=("2024/pages", "2025/pages"))
    manifest = crawl.build()
    summary = summarise(crawl.store, "small", manifest)
    check_totals(summary, crawl, manifest)
    assert [file.documents for file in summary.files] == [40, 40]


def test_a_refreshed_version_has_its_own_summary(tmp_path: Path) -> None:
    crawl = Crawl(tmp_path)
    first = crawl.build()
    before = summarise(crawl.store, "small", first)
    crawl.write("file_2.parquet", crawl.rows["file_1.parquet"][:30])
    second = crawl.build()
    summary = summarise(crawl.store, "small", second)
    check_totals(summary, crawl, second)
    assert summary.model_dump(mode="json")["parent"] == first.digest
    report = LeakReport(
        asked=None, dataset="small", documents={"train": 100, "val": 10}, duplicates={"train": 30, "val_in_train": 0},
        examples={"train": [], "val_in_train": []}, items=None, leaks=[], manifest=second.digest,
    )  # fmt: skip
    overwrite(crawl.store, DatasetKeys("small").leaks(second.digest), canonical_json(report.model_dump()))
    assert summarise(crawl.store, "small", second) == summary.model_copy(update={"audit": report})
    assert summarise(crawl.store, "small", first) == before


def test_a_lost_record_is_named(tmp_path: Path) -> None:
    crawl = Crawl(tmp_path)
    manifest = crawl.build()
    crawl.store.delete(DatasetKeys("small").record(manifest.shard_ids[3]))
    with pytest.raises(ObjectMissing, match=manifest.shard_ids[3]):
        summarise(crawl.store, "small", manifest)

"""A dataset's card says what counting the rows of the source files says."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from storage.datasets.manifest import Manifest
from storage.digests import canonical_json
from storage.errors import ObjectMissing
from storage.inspection.summary import card
from storage.keys import DatasetKeys
from storage.stores.store import overwrite
from tests.crawl import GOOD, LONG, SKIPPING, Crawl, Kept


def histogram(kept: list[Kept]) -> list[int]:
    """How many documents have 1, 2 to 3, 4 to 7, … tokens, counted by halving."""
    counts: Counter[int] = Counter()
    for one in kept:
        power, left = 0, len(one.ids)
        while left > 1:
            power, left = power + 1, left // 2
        counts[power] += 1
    return [counts[power] for power in range(max(counts) + 1)]


def added_up(manifest: Manifest) -> dict[str, int]:
    """The manifest's totals, both splits."""
    names = ("shards", "tokens", "documents", "skipped", "text_bytes")
    return {name: sum(sums[name] for sums in manifest.totals.values()) for name in names}


def check_totals(found: dict[str, Any], crawl: Crawl, manifest: Manifest) -> None:
    """The card's sums against the rows of the source files and the manifest's own."""
    total = sum(map(len, crawl.rows.values()))
    kept, skipped = crawl.kept(), crawl.skipped()
    assert (found["rows"], found["filtered"]) == (total, total - len(kept) - len(skipped))
    assert found["filtered_share"] == pytest.approx(found["filtered"] / total)
    sums = {name: sum(file[name] for file in found["files"]) for name in added_up(manifest)}
    assert sums == added_up(manifest)
    assert sums["skipped"] == len(skipped)


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize("settings", [(), (GOOD, SKIPPING)], ids=["all", "chosen"])
def test_a_card_counts_what_the_source_files_hold(tmp_path: Path, kind: str, settings: tuple[str, ...]) -> None:
    crawl = Crawl(tmp_path, *settings, kind=kind, bad=bool(settings))
    manifest = crawl.build()
    found = card(crawl.store, "small", manifest)
    check_totals(found, crawl, manifest)
    kept = crawl.kept()
    assert bool(crawl.skipped()) == bool(settings)
    assert found["dumps"] == Counter(one.columns["dump"] for one in kept if one.columns["dump"])
    assert list(found["dumps"]) == sorted(found["dumps"])
    assert found["lengths"] == histogram(kept)
    assert len(found["lengths"]) > 5
    assert [file["name"] for file in found["files"]] == sorted(crawl.rows)
    for file in found["files"]:
        ours = [one for one in kept if one.source == file["name"]]
        assert file["documents"] == len(ours)
        assert file["tokens"] == sum(len(one.ids) for one in ours)
        assert file["text_bytes"] == sum(len(one.text.encode()) for one in ours)
        assert file["skipped"] == sum(one.source == file["name"] for one in crawl.skipped())
        assert file["filtered"] == 40 - file["documents"] - file["skipped"]
    asked = {name: found[name] for name in ("dataset", "manifest", "parent", "recipe", "totals", "origin", "audit")}
    assert asked == {
        "dataset": "small", "manifest": manifest.digest, "parent": None, "recipe": manifest.recipe,
        "totals": manifest.totals, "origin": {}, "audit": None,
    }  # fmt: skip


@pytest.mark.parametrize("empty", ["shard", "shard of bad documents"])
def test_rows_of_a_shard_of_which_nothing_is_kept_are_counted(tmp_path: Path, empty: str) -> None:
    filters = LONG if empty == "shard" else "data.filters=[]"
    crawl = Crawl(tmp_path, filters, SKIPPING, kind="jsonl", names=("file_0", "file_1", "file_2"))
    last = crawl.rows["file_2.jsonl"][:4]
    crawl.write("file_2.jsonl", [row | {"text": "short" if empty == "shard" else None} for row in last])
    manifest = crawl.build()
    assert {one.source for one in crawl.kept()} == {"file_0.jsonl", "file_1.jsonl"}
    check_totals(card(crawl.store, "small", manifest), crawl, manifest)


def test_files_that_share_a_name_are_counted_apart(tmp_path: Path) -> None:
    crawl = Crawl(tmp_path, names=("2024/pages", "2025/pages"))
    manifest = crawl.build()
    found = card(crawl.store, "small", manifest)
    check_totals(found, crawl, manifest)
    assert [file["documents"] for file in found["files"]] == [40, 40]


def test_a_refreshed_version_has_a_card_of_its_own(tmp_path: Path) -> None:
    crawl = Crawl(tmp_path)
    first = crawl.build()
    before = card(crawl.store, "small", first)
    crawl.write("file_2.parquet", crawl.rows["file_1.parquet"][:30])
    second = crawl.build()
    found = card(crawl.store, "small", second)
    check_totals(found, crawl, second)
    assert found["parent"] == first.digest
    report = {"duplicates": {"train": 30, "val_in_train": 0}}
    overwrite(crawl.store, DatasetKeys("small").leaks(second.digest), canonical_json(report))
    assert card(crawl.store, "small", second) == found | {"audit": report}
    assert card(crawl.store, "small", first) == before


def test_a_lost_record_is_named(tmp_path: Path) -> None:
    crawl = Crawl(tmp_path)
    manifest = crawl.build()
    crawl.store.delete(DatasetKeys("small").record(manifest.shard_ids[3]))
    with pytest.raises(ObjectMissing, match=manifest.shard_ids[3]):
        card(crawl.store, "small", manifest)

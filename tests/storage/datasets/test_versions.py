"""The version history, and the difference of two versions, which adds up with their manifests."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from storage.datasets.manifest import Manifest, ShardRow
from storage.datasets.versions import difference, find_version, history, newest_version
from storage.errors import ObjectMissing
from storage.keys import DatasetKeys
from storage.stores.store import Store
from tests.crawl import Crawl, crawled
from tests.storage.sealing import built, seal, source_file

NO_CONFIGS: dict[str, list[str]] = {"added": [], "removed": []}


def rows_of(manifest: Manifest) -> dict[str, ShardRow]:
    return {row.shard_id: row for row in manifest.rows()}


def tokens(manifest: Manifest) -> int:
    return sum(row.tokens for row in manifest.rows())


def counted(old: Manifest, new: Manifest) -> dict[str, Any]:
    """Added and removed shards, documents and tokens, from the two lists of shards."""
    before, after = rows_of(old), rows_of(new)
    added = [after[name] for name in after.keys() - before.keys()]
    removed = [before[name] for name in before.keys() - after.keys()]
    return {
        "shards": {"added": len(added), "removed": len(removed)},
        "documents": {"added": sum(row.documents for row in added), "removed": sum(row.documents for row in removed)},
        "tokens": {"added": sum(row.tokens for row in added), "removed": sum(row.tokens for row in removed)},
    }


@pytest.fixture
def refreshed(tmp_path: Path) -> tuple[Crawl, list[Manifest]]:
    """A dataset of three versions. The second adds, changes and removes a file; the third equals the first."""
    crawl = Crawl(tmp_path, names=("file_0", "file_1", "file_2"))
    before = {name: list(rows) for name, rows in crawl.rows.items()}
    first = crawl.build()
    crawl.write("file_1.parquet", before["file_1.parquet"][:-1])
    crawl.write("file_2.parquet", None)
    crawl.write("file_3.parquet", [crawled(3, number) for number in range(40)])
    second = crawl.build()
    for name, rows in before.items():
        crawl.write(name, rows)
    crawl.write("file_3.parquet", None)
    return crawl, [first, second, crawl.build()]


def test_a_difference_counts_files_shards_documents_and_tokens(refreshed: tuple[Crawl, list[Manifest]]) -> None:
    _, (first, second, third) = refreshed
    files = {"added": ["file_3.parquet"], "changed": ["file_1.parquet"], "removed": ["file_2.parquet"]}
    change = difference(first, second).model_dump()
    assert change == counted(first, second) | {"files": files, "configs": NO_CONFIGS, "settings": []}
    assert all(change["shards"].values())
    assert tokens(first) + change["tokens"]["added"] - change["tokens"]["removed"] == tokens(second)
    reverse = difference(second, third).model_dump()
    files = {"added": ["file_2.parquet"], "changed": ["file_1.parquet"], "removed": ["file_3.parquet"]}
    assert reverse == counted(second, third) | {"files": files, "configs": NO_CONFIGS, "settings": []}
    no_change = {"added": 0, "removed": 0}
    for same in (difference(second, second).model_dump(), difference(first, third).model_dump()):
        assert [same[name] for name in ("shards", "documents", "tokens")] == [no_change] * 3
        assert same["files"] == {"added": [], "changed": [], "removed": []}


def test_the_history_goes_from_the_newest_version_to_the_first(refreshed: tuple[Crawl, list[Manifest]]) -> None:
    crawl, versions = refreshed
    assert list(history(crawl.store, "small")) == versions[::-1]
    assert newest_version(crawl.store, "small") == versions[-1]
    sealed = [crawl.store.stat(DatasetKeys("small").manifest(version.digest)).modified for version in versions[::-1]]
    assert sealed == sorted(sealed, reverse=True)


def test_settings_in_which_versions_differ_are_named(tmp_path: Path) -> None:
    first = Crawl(tmp_path / "one").build()
    second = Crawl(tmp_path / "other", "data.shard_tokens=700", 'data.filters=["int_score >= 2"]').build()
    assert difference(first, second).settings == difference(second, first).settings == ["filters", "shard_tokens"]


def test_a_changed_file_is_reported_when_files_share_a_name(tmp_path: Path) -> None:
    crawl = Crawl(tmp_path, names=("2024/pages", "2025/pages"))
    first = crawl.build()
    unseen = []
    for year in ("2024", "2025"):
        crawl.write(f"{year}/pages.parquet", [crawled(int(year), number) for number in range(40)])
        second = crawl.build()
        assert first.source_files["digest"] != second.source_files["digest"]
        change = difference(first, second)
        if not (change.files.added or change.files.changed or change.files.removed):
            unseen.append(year)
        first = second
    assert unseen == []


# Versions by a prefix of their digest


def test_a_version_is_found_by_any_unambiguous_prefix(store: Store, tmp_path: Path) -> None:
    planned = built(store, source_file(tmp_path, 0, documents=120))
    versions = [seal(store, "small", planned[:count]) for count in range(3, 3 + 17)]  # 17 share a digit
    assert find_version(store, "small", "latest") == versions[-1]
    sharing = defaultdict(list)
    for version in versions:
        sharing[version.digest[0]].append(version)
        assert (
            find_version(store, "small", version.digest) == find_version(store, "small", version.digest[:12]) == version
        )
    for digit, matching in sharing.items():
        if len(matching) == 1:
            assert find_version(store, "small", digit) == matching[0]
    digit, several = max(sharing.items(), key=lambda entry: len(entry[1]))
    assert len(several) > 1
    with pytest.raises(ValueError, match=f"'{digit}'") as caught:
        find_version(store, "small", digit)
    assert [version.digest for version in several if version.digest[:12] not in str(caught.value)] == []


def test_an_unknown_version_is_refused_and_the_versions_are_listed(refreshed: tuple[Crawl, list[Manifest]]) -> None:
    crawl, versions = refreshed
    with pytest.raises(ObjectMissing, match="'none-such'") as caught:
        find_version(crawl.store, "small", "none-such")
    for version in versions:
        assert version.digest[:12] in str(caught.value)


def test_a_dataset_that_was_never_sealed_has_no_version(store: Store) -> None:
    for access in (
        newest_version,
        lambda *arguments: list(history(*arguments)),
        lambda *arguments: find_version(*arguments, "latest"),
    ):
        with pytest.raises(ObjectMissing, match=r"'small'.*gpt2 dataset build"):
            access(store, "small")
    with pytest.raises(ObjectMissing, match="'small'"):
        find_version(store, "small", "0")

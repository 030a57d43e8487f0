"""The leak report equals a comparison of all pairs of documents, with any number of processes."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from model import tokenizer
from storage.datasets import shards
from storage.datasets.manifest import Manifest, ShardRow
from storage.digests import canonical_json
from storage.errors import ObjectCorrupt, ShardCorrupt
from storage.inspection import leaks as leaks_module
from storage.inspection.leaks import LeakReport, Repeats, find_repeats, read_leak_report
from storage.inspection.matching import ngrams
from storage.keys import DatasetKeys
from storage.stores.store import Store, overwrite
from tests.damage import flip_bit
from tests.leaks import documents, leaks_of, ngrams_of, repeats_of, restyled, reworded, story, words_of
from tests.making import write_parquet
from tests.storage.sealing import plans_of, seal

VAL_SHARDS = 3
EMPTY = ["", " ", "...", "\n\t--\n", "?!"]


def drawn_texts(seed: int, count: int) -> list[str]:
    """Documents that often repeat another: exactly, restyled, or except for one word. Some are empty."""
    drawn = random.Random(seed)
    disguises = [str, str, restyled, str.swapcase, reworded, lambda text: f"  {text}\n", lambda text: text + " ."]
    texts = [
        drawn.choice(disguises)(story(drawn.randrange(count // 2), drawn.choice([1, 5, 30]))) for _ in range(count)
    ]
    for place in range(0, count, 9):
        texts[place] = drawn.choice(EMPTY)
    return texts


def sealed(store: Store, folder: Path, texts: list[str], shard_tokens: int = 400) -> Manifest:
    """A version of these texts in two source files; the first shards are val."""
    half = len(texts) // 2
    paths = [
        write_parquet(folder / f"file_{number}.parquet", part)
        for number, part in enumerate((texts[:half], texts[half:]))
    ]
    jobs = [job for plan in plans_of(*paths, shard_tokens=shard_tokens) for job in plan.jobs()]
    for job in jobs:
        shards.build_shard(store, "small", job, tokenizer.encode, tokenizer.EOT)
    return seal(store, "small", [job.shard_id for job in jobs], val_shards=VAL_SHARDS)


def search(
    store: Store, rows: list[ShardRow], hashes: list[int] | None = None, workers: int = 1
) -> tuple[Repeats, list[int]]:
    """The repeated documents, and which of the hashes occur in train."""
    repeats, hits = find_repeats(
        store.url, "small", rows, tokenizer.decode_bytes, np.array(hashes or [], np.uint64), workers, lambda: None
    )
    return repeats, hits.tolist()


def test_the_report_equals_a_comparison_of_all_pairs_with_any_number_of_workers(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leaks_module, "SHARDS_AT_ONCE", 5)  # of more than 10 shards
    manifest = sealed(store, tmp_path, drawn_texts(seed=1, count=300))
    rows, everything = list(manifest.rows()), documents(store, "small", manifest)
    words = {
        split: [document.words for document in everything if document.split == split] for split in ("train", "val")
    }
    assert len(rows) > 10
    runs = {
        int(ngrams(b" ".join(run))[0]): run
        for text in [*words["train"][:40], *words["val"], words_of(story(10**6).encode())]
        for run in list(ngrams_of(text))[:3]
    }
    expected = sorted(value for value, run in runs.items() if any(run in ngrams_of(text) for text in words["train"]))
    repeats, leaks = repeats_of(everything), leaks_of(everything)
    assert min(len(repeats), len(leaks), len(expected), len(runs) - len(expected)) > 5  # or the test would prove little
    report, hits = search(store, rows, list(runs), workers=1)
    assert report.duplicates["train"] == len(repeats)
    assert report.leaks == sorted(leaks)
    assert dict(report.examples["train"]) == repeats
    assert dict(report.examples["val_in_train"]) == leaks
    assert sorted(hits) == expected
    assert search(store, rows, list(runs), workers=3) == (report, hits)


def test_planted_documents_are_reported_and_nothing_else(store: Store, tmp_path: Path) -> None:
    texts = [story(number) for number in range(40)]
    texts[21] = restyled(texts[20])  # twice in train
    texts[22] = restyled(texts[0])  # val in train
    texts[-1] = f" {texts[1]}"
    texts[-2] = reworded(texts[2])  # similar, not equal
    texts[-3] = texts[3] + " café"
    texts[4] = texts[3]  # twice in val alone
    texts[5], texts[-4], texts[-5] = "", "...", "!"  # without words: equal to nothing
    manifest = sealed(store, tmp_path, texts)
    stored = documents(store, "small", manifest)
    assert ([document.text for document in stored], stored[5].split, stored[20].split) == (texts, "val", "train")
    report, hits = search(store, list(manifest.rows()))
    assert report.leaks == [stored[0].name, stored[1].name]
    assert dict(report.examples["val_in_train"]) == {stored[0].name: stored[22].name, stored[1].name: stored[-1].name}
    assert (report.duplicates["train"], report.examples["train"]) == (1, [(stored[21].name, stored[20].name)])
    assert hits == []


def test_examples_are_limited_and_counts_are_not(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leaks_module, "EXAMPLES", 3)
    manifest = sealed(store, tmp_path, [story(number % 20) for number in range(100)])
    stored = documents(store, "small", manifest)
    report, _ = search(store, list(manifest.rows()))
    assert (report.duplicates["train"], len(report.leaks)) == (len(repeats_of(stored)), len(leaks_of(stored)))
    assert [len(pairs) for pairs in report.examples.values()] == [3, 3]
    assert set(report.examples["train"]) < set(repeats_of(stored).items())


def test_the_search_refuses_a_damaged_shard(store: Store, tmp_path: Path) -> None:
    rows = list(sealed(store, tmp_path, [story(number) for number in range(40)]).rows())
    flip_bit(store, DatasetKeys("small").shard(rows[-2].shard_id), 2)
    with pytest.raises(ShardCorrupt, match=rows[-2].shard_id):
        search(store, rows)


def test_a_version_without_shards_has_no_leaks(store: Store) -> None:
    """For example, if every document of its source was skipped."""
    kinds = ("train", "val_in_train")
    assert search(store, [], [1, 2]) == (Repeats(dict.fromkeys(kinds, 0), [], {kind: [] for kind in kinds}), [])


# The stored report

REPORT: dict[str, Any] = {
    "dataset": "small", "manifest": "m1", "asked": "sources/1/items.jsonl", "documents": {"train": 9, "val": 5},
    "duplicates": {"train": 3, "val_in_train": 1}, "leaks": [["v-1", 4]],
    "examples": {"train": [[["t-1", 0], ["t-0", 9]]], "val_in_train": [[["v-1", 4], ["t-0", 2]]]},
    "items": {"count": 4, "words": 13, "shorter": 1, "contexts": 2, "endings": 1,
              "numbers": {"contexts": [0, 2], "endings": [3]}},
}  # fmt: skip


def test_a_stored_report_is_read_back_unchanged(store: Store) -> None:
    assert read_leak_report(store, "small", "m1") is None
    for value in (REPORT, REPORT | {"asked": None, "items": None}):
        overwrite(store, DatasetKeys("small").leaks("m1"), canonical_json(value))
        report = read_leak_report(store, "small", "m1")
        assert report is not None
        assert report.model_dump(mode="json") == value
        assert LeakReport(**value) == report


DAMAGES: list[dict[str, Any]] = [{"examples": None}, {"leaks": [1]}, {"leaks": [[1]]}, {"items": {}}, {"duplicates": 1}]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_report_is_named(store: Store, damage: dict[str, Any]) -> None:
    overwrite(store, DatasetKeys("small").leaks("m1"), canonical_json(REPORT | damage))
    with pytest.raises(ObjectCorrupt, match=r"m1.*gpt2 dataset audit"):
        read_leak_report(store, "small", "m1")

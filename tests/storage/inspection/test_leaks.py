"""The leak report's counts are those of holding every document against every other, however many processes look."""

import random
from pathlib import Path

import numpy as np
import pytest

from model import tokenizer
from storage.datasets import shards
from storage.datasets.manifest import Manifest, ShardRow
from storage.errors import ShardCorrupt
from storage.inspection import leaks as audit_module
from storage.inspection.leaks import Repeated, find_repeats
from storage.inspection.matching import ngrams
from storage.keys import DatasetKeys
from storage.stores.store import Store, overwrite
from tests.leaks import documents, leaks_of, one_word_other, repeats_of, runs_of, shouted, story, words_of
from tests.making import write_parquet
from tests.storage.sealing import plans_of, seal

VAL_SHARDS = 3
EMPTY = ["", " ", "...", "\n\t--\n", "?!"]


def drawn_texts(seed: int, count: int) -> list[str]:
    """Documents of which many repeat another, in other clothes or with one other word; some are empty."""
    drawn = random.Random(seed)
    disguises = [str, str, shouted, str.swapcase, one_word_other, lambda text: f"  {text}\n", lambda text: text + " ."]
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
    jobs = [job for one in plans_of(*paths, shard_tokens=shard_tokens) for job in one.jobs()]
    for job in jobs:
        shards.build_shard(store, "small", job, tokenizer.encode, tokenizer.EOT)
    return seal(store, "small", [job.shard_id for job in jobs], val_shards=VAL_SHARDS)


def looked(
    store: Store, rows: list[ShardRow], grams: list[int] | None = None, workers: int = 1
) -> tuple[Repeated, list[int]]:
    found, hits = find_repeats(
        store.url, "small", rows, tokenizer.decode_bytes, np.array(grams or [], np.uint64), workers
    )
    return found, hits.tolist()


def test_the_report_is_that_of_all_pairs_with_any_number_of_workers(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_module, "WINDOW", 5)  # several of them
    manifest = sealed(store, tmp_path, drawn_texts(seed=1, count=300))
    rows, found = list(manifest.rows()), documents(store, "small", manifest)
    splits = {split: [one.words for one in found if one.split == split] for split in ("train", "val")}
    assert len(rows) > 10
    asked = {
        int(ngrams(b" ".join(run))[0]): run
        for words in [*splits["train"][:40], *splits["val"], words_of(story(10**6).encode())]
        for run in list(runs_of(words))[:3]
    }
    expected = sorted(value for value, run in asked.items() if any(run in runs_of(words) for words in splits["train"]))
    repeats, leaks = repeats_of(found), leaks_of(found)
    assert min(len(repeats), len(leaks), len(expected), len(asked) - len(expected)) > 5  # or it would prove little
    report, hits = looked(store, rows, list(asked), workers=1)
    assert report.train == len(repeats)
    assert report.leaks == sorted(leaks)
    assert dict(report.pairs["train"]) == repeats
    assert dict(report.pairs["val_in_train"]) == leaks
    assert sorted(hits) == expected
    assert looked(store, rows, list(asked), workers=3) == (report, hits)


def test_planted_documents_are_found_and_nothing_else(store: Store, tmp_path: Path) -> None:
    texts = [story(number) for number in range(40)]
    texts[21] = shouted(texts[20])  # twice in train
    texts[22] = shouted(texts[0])  # val in train
    texts[-1] = f" {texts[1]}"
    texts[-2] = one_word_other(texts[2])  # near is not equal
    texts[-3] = texts[3] + " café"
    texts[4] = texts[3]  # twice in val alone
    texts[5], texts[-4], texts[-5] = "", "...", "!"  # like no other
    manifest = sealed(store, tmp_path, texts)
    found = documents(store, "small", manifest)
    assert ([one.text for one in found], found[5].split, found[20].split) == (texts, "val", "train")
    report, hits = looked(store, list(manifest.rows()))
    assert report.leaks == [found[0].name, found[1].name]
    assert dict(report.pairs["val_in_train"]) == {found[0].name: found[22].name, found[1].name: found[-1].name}
    assert (report.train, report.pairs["train"]) == (1, [(found[21].name, found[20].name)])
    assert hits == []


def test_a_report_holds_so_many_examples_and_counts_them_all(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_module, "EXAMPLES", 3)
    manifest = sealed(store, tmp_path, [story(number % 20) for number in range(100)])
    found = documents(store, "small", manifest)
    report, _ = looked(store, list(manifest.rows()))
    assert (report.train, len(report.leaks)) == (len(repeats_of(found)), len(leaks_of(found)))
    assert [len(pairs) for pairs in report.pairs.values()] == [3, 3]
    assert set(report.pairs["train"]) < set(repeats_of(found).items())


def test_a_damaged_shard_ends_the_look(store: Store, tmp_path: Path) -> None:
    rows = list(sealed(store, tmp_path, [story(number) for number in range(40)]).rows())
    key = DatasetKeys("small").shard(rows[-2].shard_id)
    whole = bytes(store.read(key).body)
    overwrite(store, key, bytes([whole[0], whole[1], whole[2] ^ 1]) + whole[3:])
    with pytest.raises(ShardCorrupt, match=rows[-2].shard_id):
        looked(store, rows)


def test_a_version_without_a_shard_has_no_leak(store: Store) -> None:
    """As one of a source whose every document was skipped."""
    assert looked(store, [], [1, 2]) == (Repeated(0, [], {"train": [], "val_in_train": []}), [])

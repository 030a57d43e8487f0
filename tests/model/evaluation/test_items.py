"""The completion set: its true endings follow their contexts, and its false ones are from other documents."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from model import tokenizer
from model.evaluation.items import ENDING_TOKENS, ITEM_TOKENS, document_items
from storage.datasets.manifest import Manifest, ShardRow
from storage.digests import sha256
from storage.keys import DatasetKeys
from storage.stores.store import Store


def numbered_document(number: int, tokens: int = 100) -> list[int]:
    """Token ids that encode the document and the position in it."""
    return list(range(number * 1_000, number * 1_000 + tokens))


def sealed(store: Store, val: list[list[list[int]]], train: list[list[list[int]]] | None = None) -> Manifest:
    """A manifest of shards of documents, each after an `<|endoftext|>`."""
    columns: dict[str, list[Any]] = {name: [] for name in ShardRow._fields}
    splits = [("val", shard) for shard in val] + [("train", shard) for shard in train or []]
    for index, (split, documents) in enumerate(splits):
        ids = [token for document in documents for token in (tokenizer.EOT, *document)]
        body = np.array(ids, "<u2").tobytes()
        store.put_new(DatasetKeys("items").shard(f"shard-{index}"), body)
        row = (f"shard-{index}", len(ids), len(documents), 0, len(ids), sha256(body), split, 0)
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    return Manifest("0" * 64, {}, tokenizer.identity(), {}, {}, None, columns)


@pytest.fixture
def manifest(store: Store) -> Manifest:
    """Forty documents in two val shards, and train documents that must not be used."""
    documents = [numbered_document(number) for number in range(40)]
    return sealed(store, [documents[:25], documents[25:]], [[numbered_document(number) for number in range(40, 50)]])


def document_of(ids: list[int]) -> int:
    (number,) = {token // 1_000 for token in ids}
    return number


def test_the_true_ending_follows_its_context_and_the_others_come_from_other_documents(
    store: Store, manifest: Manifest
) -> None:
    items = document_items(store, "items", manifest, 1_000, seed=1)
    assert sorted(document_of(item.context) for item in items) == list(range(40))
    for item in items:
        number = document_of(item.context)
        assert item.context + item.endings[item.label] == numbered_document(number, ITEM_TOKENS)
        sources = [document_of(ending) for ending in item.endings]
        assert len(set(sources)) == 4
        assert all(len(ending) == ENDING_TOKENS for ending in item.endings)
        assert all(source < 40 for source in sources)


def test_labels_are_spread_over_all_four_positions(store: Store, manifest: Manifest) -> None:
    labels = Counter(item.label for seed in range(10) for item in document_items(store, "items", manifest, 40, seed))
    assert set(labels) == {0, 1, 2, 3}
    assert min(labels.values()) > 60  # of 400


def test_a_seed_gives_the_same_items_every_time(store: Store, manifest: Manifest) -> None:
    first, repeated, other = (document_items(store, "items", manifest, 20, seed=seed) for seed in (1, 1, 2))
    assert first == repeated
    assert first != other


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (7, 7), (40, 40), (41, 40)])
def test_at_most_the_requested_number_of_items_is_built(
    store: Store, manifest: Manifest, count: int, expected: int
) -> None:
    assert len(document_items(store, "items", manifest, count, seed=0)) == expected


def test_documents_that_are_too_short_are_left_out(store: Store) -> None:
    lengths = [ITEM_TOKENS, ITEM_TOKENS - 1, ITEM_TOKENS + 1, 0, 500, ITEM_TOKENS, 3]
    manifest = sealed(store, [[numbered_document(number, length) for number, length in enumerate(lengths)]])
    items = document_items(store, "items", manifest, 10, seed=0)
    assert sorted(document_of(item.context) for item in items) == [0, 2, 4, 5]


def test_too_few_documents_are_refused_with_a_remedy(store: Store) -> None:
    short = numbered_document(3, ITEM_TOKENS - 1)
    manifest = sealed(store, [[*(numbered_document(number) for number in range(3)), short]])
    with pytest.raises(ValueError, match=r"\b3\b.*val_shards"):
        document_items(store, "items", manifest, 1, seed=0)

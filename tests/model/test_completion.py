"""Items with four endings: a HellaSwag file is read or its bad line named; a set made of documents is honest."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from model import tokenizer
from model.completion import CONTEXT_TOKENS, ENDING_TOKENS, Item, document_items, hellaswag_items
from storage import keys
from storage.canonical import sha256
from storage.errors import SourceInvalid
from storage.manifest import COLUMNS, Manifest
from storage.store import Store

WHOLE = CONTEXT_TOKENS + ENDING_TOKENS
GOOD = {
    "ctx": "A man sits on a roof. He",
    "endings": ["is", "starts pulling up roofing", "rips", "is holding"],
    "label": 3,
}
GOOD_TOO = {"ind": 4, "ctx": "Café", "endings": ["un", "deux mots", "trois", "quatre"], "label": "0", "split": "val"}


def lines(*values: Any) -> bytes:
    return "\n".join(json.dumps(value) for value in values).encode()


# A file of HellaSwag items


def test_items_are_read_with_a_space_before_each_ending() -> None:
    assert hellaswag_items(lines(GOOD, GOOD_TOO), "val.jsonl") == [
        Item(
            tokenizer.encode(GOOD["ctx"]).tolist(),
            [tokenizer.encode(f" {ending}").tolist() for ending in GOOD["endings"]],
            3,
        ),
        Item(
            tokenizer.encode("Café").tolist(),
            [tokenizer.encode(f" {ending}").tolist() for ending in ("un", "deux mots", "trois", "quatre")],
            0,
        ),
    ]


def test_empty_lines_are_passed_over_and_still_counted() -> None:
    assert len(hellaswag_items(b"\n" + lines(GOOD) + b"\n \n" + lines(GOOD_TOO) + b"\r\n\n", "val.jsonl")) == 2
    with pytest.raises(SourceInvalid, match=r"line 4\b"):
        hellaswag_items(b"\n" + lines(GOOD) + b"\n \n{}\n", "val.jsonl")


@pytest.mark.parametrize(
    "line",
    [
        pytest.param(b"no json", id="no JSON"),
        pytest.param(b"\xff\xfe{}", id="no UTF-8"),
        pytest.param(lines(GOOD)[:-5], id="cut in half"),
        pytest.param(lines([1, 2]), id="a list"),
        pytest.param(lines("text"), id="a string"),
        pytest.param(lines({"ctx": "x", "endings": list("abcd")}), id="no label"),
        pytest.param(lines({"ctx": "x", "label": 1}), id="no endings"),
        pytest.param(lines({"endings": list("abcd"), "label": 1}), id="no context"),
        pytest.param(lines(GOOD | {"endings": list("abc")}), id="three endings"),
        pytest.param(lines(GOOD | {"endings": list("abcde")}), id="five endings"),
        pytest.param(lines(GOOD | {"endings": None}), id="null for endings"),
        pytest.param(lines(GOOD | {"endings": "abcd"}), id="a string for endings"),
        pytest.param(lines(GOOD | {"endings": ["a", "b", "", "d"]}), id="an empty ending"),
        pytest.param(lines(GOOD | {"endings": ["a", "b", 3, "d"]}), id="a number for an ending"),
        pytest.param(lines(GOOD | {"ctx": ""}), id="an empty context"),
        pytest.param(lines(GOOD | {"ctx": 5}), id="a number for a context"),
        pytest.param(lines(GOOD | {"ctx": ["a"]}), id="a list for a context"),
        pytest.param(lines(GOOD | {"label": 4}), id="label 4"),
        pytest.param(lines(GOOD | {"label": -1}), id="label -1"),
        pytest.param(lines(GOOD | {"label": 1.5}), id="label 1.5"),
        pytest.param(lines(GOOD | {"label": "x"}), id="label x"),
        pytest.param(lines(GOOD | {"label": ""}), id="the empty label of the test split"),
        pytest.param(lines(GOOD | {"label": None}), id="null for a label"),
    ],
)
def test_a_malformed_line_is_named(line: bytes) -> None:
    with pytest.raises(SourceInvalid, match=r"val\.jsonl.*line 2\b"):
        hellaswag_items(lines(GOOD) + b"\n" + line + b"\n" + lines(GOOD), "val.jsonl")


@pytest.mark.parametrize("body", [b"", b"\n\n"])
def test_a_file_without_items_is_refused(body: bytes) -> None:
    with pytest.raises(SourceInvalid, match=r"val\.jsonl"):
        hellaswag_items(body, "val.jsonl")


# Items made of documents


def made_document(number: int, tokens: int = 100) -> list[int]:
    """Token ids that say which document they are of, and where in it they stand."""
    return list(range(number * 1_000, number * 1_000 + tokens))


def sealed(store: Store, val: list[list[list[int]]], train: list[list[list[int]]] | None = None) -> Manifest:
    """A dataset of shards of documents, `<|endoftext|>` before each."""
    columns: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    splits = [("val", shard) for shard in val] + [("train", shard) for shard in train or []]
    for index, (split, documents) in enumerate(splits):
        ids = [token for document in documents for token in (tokenizer.EOT, *document)]
        body = np.array(ids, "<u2").tobytes()
        store.put_new(keys.shard("made", f"shard-{index}"), body)
        row = (f"shard-{index}", len(ids), len(documents), 0, len(ids), sha256(body), split)
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
    return Manifest("0" * 64, {}, tokenizer.identity(), {}, {}, None, columns)


@pytest.fixture
def forty(store: Store) -> Manifest:
    """Forty documents in two val shards, and train documents that must never be seen."""
    documents = [made_document(number) for number in range(40)]
    return sealed(store, [documents[:25], documents[25:]], [[made_document(number) for number in range(40, 50)]])


def document_of(ids: list[int]) -> int:
    (number,) = {token // 1_000 for token in ids}
    return number


def test_the_true_ending_follows_its_context_and_the_others_come_from_other_documents(
    store: Store, forty: Manifest
) -> None:
    items = document_items(store, "made", forty, 1_000, seed=1)
    assert sorted(document_of(item.context) for item in items) == list(range(40))
    for item in items:
        number = document_of(item.context)
        assert item.context + item.endings[item.label] == made_document(number, WHOLE)
        sources = [document_of(ending) for ending in item.endings]
        assert len(set(sources)) == 4
        assert all(len(ending) == ENDING_TOKENS for ending in item.endings)
        assert all(source < 40 for source in sources)


def test_labels_are_spread_over_all_four_places(store: Store, forty: Manifest) -> None:
    found = Counter(item.label for seed in range(10) for item in document_items(store, "made", forty, 40, seed))
    assert set(found) == {0, 1, 2, 3}
    assert min(found.values()) > 60  # of 400


def test_a_seed_gives_the_same_items_every_time(store: Store, forty: Manifest) -> None:
    assert document_items(store, "made", forty, 20, seed=1) == document_items(store, "made", forty, 20, seed=1)
    assert document_items(store, "made", forty, 20, seed=1) != document_items(store, "made", forty, 20, seed=2)


@pytest.mark.parametrize(("count", "found"), [(1, 1), (7, 7), (40, 40), (41, 40)])
def test_no_more_items_are_made_than_asked_for(store: Store, forty: Manifest, count: int, found: int) -> None:
    assert len(document_items(store, "made", forty, count, seed=0)) == found


def test_documents_that_are_too_short_are_left_out(store: Store) -> None:
    lengths = [WHOLE, WHOLE - 1, WHOLE + 1, 0, 500, WHOLE, 3]
    manifest = sealed(store, [[made_document(number, length) for number, length in enumerate(lengths)]])
    items = document_items(store, "made", manifest, 10, seed=0)
    assert sorted(document_of(item.context) for item in items) == [0, 2, 4, 5]


def test_too_few_documents_are_refused_with_a_remedy(store: Store) -> None:
    manifest = sealed(store, [[made_document(number) for number in range(3)] + [made_document(3, WHOLE - 1)]])
    with pytest.raises(ValueError, match=r"\b3\b.*val_shards"):
        document_items(store, "made", manifest, 1, seed=0)

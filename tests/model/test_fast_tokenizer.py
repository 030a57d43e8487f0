"""riptoken's ids are tiktoken's, whatever the text; where they are not, a compared document says so."""

import random
import sys
import sysconfig
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest

from model import fast_tokenizer, tokenizer
from model.fast_tokenizer import COMPARED, Differs

STRINGS = 100_000
PIECES = [
    " ", "  ", "\t", "\n", "\r\n", "\r", "\x0b", "\x0c", "\x85", "\u00a0", "\u2003", "\u3000", "\u200b", "\ufeff",
    "\u2028", "\u2029", "\u1680", "\x1c", "'s", "'S", "’s", "'t", "'re", "'RE", "'ll", "'d", "'m", "'ve", "'", "''",
    "don't", "I'm", " '", "'ſ", "<|endoftext|>", "<|endoftext", "|>", "a", "A", "ß", "İ", "ﬁ", "ǅ", "the", " The", "0",
    "123", "١٢٣", "४५", "Ⅻ", "½", "²", "五", "漢字", "한국", "e\u0301", "\u0301", "\u0e33", "ก็", "़", "🙂", "👩\u200d💻",
    "👨\u200d👩\u200d👧\u200d👦", "🏳️\u200d🌈", "🇩🇪", "❤\ufe0f", "\u200d", "\x00", "\x1b", "\x7f", "\u202e", "\ufffd",
    "\uffff", "\U0010ffff", "\ue000", "𝒳", "...", "—", "#!", "/**/", "=====", "\\n", "$", "_", "ــ",
]  # fmt: skip
RUNS = ["a", " ", "\u00a0", "\n", ".", "7", "=", "-", "—", "漢", "\u0301", "🙂", "ha", "!?", "!\x1c", " a", "ab\n"]
SURROGATES = ["\ud800", "\udfff", "\ude42\ud83d", "\ud83d"]


def by_category() -> dict[str, list[str]]:
    """Some characters of each Unicode category."""
    found: dict[str, list[str]] = {}
    for code in range(sys.maxunicode + 1):
        if not 0xD800 <= code < 0xE000:
            found.setdefault(unicodedata.category(chr(code)), []).append(chr(code))
    return {name: characters[:: max(len(characters) // 300, 1)] for name, characters in found.items()}


def generated(count: int) -> Iterator[str]:
    """Short strings of all that the pattern tells apart, and of what it might confuse; now and then a long run."""
    drawn = random.Random(7)
    categories = list(by_category().values())
    anything: list[Callable[[], str]] = [
        lambda: drawn.choice(PIECES),
        lambda: drawn.choice(PIECES) * drawn.randrange(2, 9),
        lambda: drawn.choice(drawn.choice(categories)),
        lambda: "".join(drawn.choice(drawn.choice(categories)) for _ in range(3)),
        lambda: "".join(drawn.choices("abcXYZ 019'\n", k=drawn.randrange(12))),
    ]
    for number in range(count):
        parts = [drawn.choice(anything)() for _ in range(drawn.randrange(1, 9))]
        if number % 50 == 0:
            parts.insert(drawn.randrange(len(parts)), drawn.choice(SURROGATES))
        if number % 200 == 1:
            one, other = drawn.choice(PIECES), drawn.choice(drawn.choice(categories))
            run = drawn.choices([one, one, other], k=drawn.randrange(100, 2_000)) if number % 400 == 1 else [one] * 900
            parts.insert(drawn.randrange(len(parts)), "".join(run))
        yield "".join(parts)


def differing(texts: Iterable[str], encode: Callable[[str], np.ndarray] | None = None) -> list[str]:
    """The beginnings of texts that have other ids than tiktoken's, compared or not."""
    encode = encode or fast_tokenizer.encoder()
    found = []
    for text in texts:
        try:
            same = np.array_equal(encode(text), tokenizer.encode(text))
        except Differs:
            same = False
        if not same:
            found.append(f"{len(text):,} characters: {text[:60]!a}")
    return found


def test_ids_are_tiktokens_for_what_nobody_writes() -> None:
    found = differing(generated(STRINGS))
    assert found == [], len(found)


def test_ids_are_tiktokens_for_what_people_write() -> None:
    """The language's help topics, and modules of the standard library with their documentation."""
    library = Path(sysconfig.get_path("stdlib"))
    texts = [*topics.values(), *(path.read_text("utf-8") for path in sorted(library.glob("*.py"))[::2])]
    assert len(texts) > 150
    assert differing(texts) == []


def test_a_long_run_of_one_kind_is_tiktokens_too() -> None:
    """As a line of a table, a number, or a language that sets no spaces."""
    runs = [one * (length_bytes // len(one.encode())) for one in RUNS for length_bytes in (501, 1_003, 20_001)]
    assert differing([*runs, *(f"x {run} x" for run in runs)]) == []


class Core:
    """riptoken, from some document on with another last id."""

    def __init__(self, wrong_from: int) -> None:
        self._whole, self._left = fast_tokenizer._core(), wrong_from

    def encode_ordinary(self, text: str) -> list[int]:
        self._left -= 1
        found = list(self._whole.encode_ordinary(text))
        return found if self._left >= 0 else [*found[:-1], found[-1] ^ 1]


@pytest.mark.parametrize("wrong_from", [0, 1, 2, 5, 63, 64, 100, 700])
def test_wrong_ids_are_noticed_at_the_next_compared_document(monkeypatch: pytest.MonkeyPatch, wrong_from: int) -> None:
    core = Core(wrong_from)
    monkeypatch.setattr(fast_tokenizer, "_core", lambda: core)
    encode = fast_tokenizer.encoder()
    with pytest.raises(Differs):
        for number in range(wrong_from + COMPARED):
            encode(f"document {number}")
    assert number >= wrong_from


@pytest.mark.parametrize("wrong", [[], [1, 2], [1, 2, 3, 4]])
def test_ids_of_another_number_are_noticed(monkeypatch: pytest.MonkeyPatch, wrong: list[int]) -> None:
    monkeypatch.setattr(fast_tokenizer, "_core", type("Core", (), {"encode_ordinary": lambda *_: wrong}))
    with pytest.raises(Differs):
        fast_tokenizer.encoder()("one two three")


class PanicException(BaseException):
    """As Rust's panics arrive."""


@pytest.mark.parametrize("error", [PanicException("too much"), UnicodeEncodeError("utf-8", "x", 0, 1, "")])
def test_what_riptoken_cannot_take_is_tiktokens(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    failing = type("Core", (), {"encode_ordinary": lambda *_: (_ for _ in ()).throw(error)})()
    monkeypatch.setattr(fast_tokenizer, "_core", lambda: failing)
    assert fast_tokenizer.encoder()("hello world").tolist() == [31373, 995]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), MemoryError()])
def test_what_ends_a_process_is_let_through(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    failing = type("Core", (), {"encode_ordinary": lambda *_: (_ for _ in ()).throw(error)})()
    monkeypatch.setattr(fast_tokenizer, "_core", lambda: failing)
    with pytest.raises(type(error)):
        fast_tokenizer.encoder()("x")


def test_without_riptoken_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_tokenizer, "_core", fast_tokenizer._core.__wrapped__)
    monkeypatch.setitem(sys.modules, "riptoken", None)
    with pytest.raises(ValueError, match=r"\.\[fast\]"):
        fast_tokenizer.encoder()

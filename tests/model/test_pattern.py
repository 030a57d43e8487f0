"""The two patterns give the same ids as the published one for any text."""

import random
import sys
import sysconfig
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import tiktoken

from model import tokenizer
from tests.making import published

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
    characters_of: dict[str, list[str]] = {}
    for code in range(sys.maxunicode + 1):
        if not 0xD800 <= code < 0xE000:
            characters_of.setdefault(unicodedata.category(chr(code)), []).append(chr(code))
    return {name: characters[:: max(len(characters) // 300, 1)] for name, characters in characters_of.items()}


def generated(count: int) -> Iterator[str]:
    """Short strings of everything that the pattern distinguishes or might confuse, and some long repetitions."""
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
            piece, other = drawn.choice(PIECES), drawn.choice(drawn.choice(categories))
            mixed = number % 400 == 1
            run = drawn.choices([piece, piece, other], k=drawn.randrange(100, 2_000)) if mixed else [piece] * 900
            parts.insert(drawn.randrange(len(parts)), "".join(run))
        yield "".join(parts)


def differing(texts: Iterable[str]) -> list[str]:
    """The beginnings of texts whose ids differ from those of the published pattern."""
    return [
        f"{len(text):,} characters: {text[:60]!a}"
        for text in texts
        if tokenizer.encode(text).tolist() != published().encode_ordinary(text)
    ]


def test_ids_are_the_same_for_random_strings() -> None:
    different = differing(generated(STRINGS))
    assert different == [], len(different)


def test_ids_are_the_same_for_real_text() -> None:
    """Python's help topics, and modules of the standard library with their docstrings."""
    library = Path(sysconfig.get_path("stdlib"))
    texts = [*topics.values(), *(path.read_text("utf-8") for path in sorted(library.glob("*.py"))[::2])]
    assert len(texts) > 150
    assert differing(texts) == []


def test_ids_are_the_same_for_long_repetitions() -> None:
    """Such as a table's rule, a number, or a language without spaces."""
    runs = [piece * (length_bytes // len(piece.encode())) for piece in RUNS for length_bytes in (501, 1_003, 20_001)]
    assert differing([*runs, *(f"x {run} x" for run in runs)]) == []


@pytest.mark.parametrize("white", [" ", "\n", "\u3000"])
def test_the_same_texts_overflow_both_regexes(white: str) -> None:
    """fancy-regex's stack holds a million white-space characters before a word; at the end of a text it needs none."""
    run = white * 1_100_000
    assert differing([f"x{run}", f"{run[:900_000]}x"]) == []
    for encode in (tokenizer.encode, published().encode):
        with pytest.raises(ValueError, match="stack size exceeded"):
            encode(f"{run}x")


def test_every_thread_has_its_own_encoding() -> None:
    """Threads that share an encoding's regex run one at a time."""
    with ThreadPoolExecutor(2) as pool:
        both = threading.Barrier(2)

        def own() -> tiktoken.Encoding:
            both.wait()
            assert tokenizer.encode("hello world").tolist() == [31373, 995]
            return tokenizer._encoding(tokenizer.PLAIN)

        first, second = (future.result() for future in [pool.submit(own), pool.submit(own)])
    assert len({first, second, tokenizer._encoding(tokenizer.PLAIN)}) == 3
    assert tokenizer._encoding(tokenizer.PLAIN) is tokenizer._encoding(tokenizer.PLAIN)

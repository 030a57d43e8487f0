"""The extra `fast`: riptoken's ids, faster than tiktoken's. In every shard some are compared with tiktoken's.

tiktoken decides: where one document differs, the whole shard is made with tiktoken.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from tiktoken_ext.openai_public import r50k_pat_str

from model import tokenizer

# riptoken 0.2.4 merges pieces of more than 500 bytes in another order than tiktoken; a piece may begin with a space.
LONG_WORD, LONG_SPACE = b"x" * 499, b" " * 499
_WHITE = b" \t\n\r\x0b\x0c"
_WORDS = bytes(ord(" ") if byte in _WHITE else ord("x") for byte in range(256))
_SPACES = bytes(ord(" ") if byte in _WHITE or byte > 127 else ord("x") for byte in range(256))  # U+00A0 and others, too
COMPARED = 64  # of a shard: documents 1, 2, 4, 8, …, and every 64th: 3 % more work


class Differs(Exception):
    """riptoken gave other ids than tiktoken; the message says of which document."""


def encoder() -> Callable[[str], np.ndarray]:
    """A function that encodes the documents of one shard, one after the other, as `tokenizer.encode` does.

    It raises Differs. Raises ValueError when the extra is not installed.
    """
    core, number = _core(), 0

    def encode(text: str) -> np.ndarray:
        nonlocal number
        number += 1
        body = text.encode(errors="surrogatepass")
        if LONG_WORD in body.translate(_WORDS) or LONG_SPACE in body.translate(_SPACES):
            return tokenizer.encode(text)
        try:
            ids = np.array(core.encode_ordinary(text), np.uint32)
        except UnicodeEncodeError:  # a lone surrogate, which tiktoken takes
            return tokenizer.encode(text)
        except BaseException as error:
            if type(error).__name__ == "PanicException":  # what riptoken cannot take, tiktoken may
                return tokenizer.encode(text)
            raise
        if number.bit_count() == 1 or number % COMPARED == 0:
            expected = tokenizer.encode(text)
            if not np.array_equal(ids, expected):
                raise Differs(
                    f"document {number - 1:,}: {len(ids):,} ids of riptoken are not tiktoken's {len(expected):,}"
                )
        return ids

    return encode


@cache
def _core() -> Any:
    try:
        import riptoken  # an extra
    except ImportError as error:
        raise ValueError(
            "resources.fast_tokenizer was asked for, riptoken is not installed. Install the extra: "
            "pip install -e '.[fast]', or leave the setting out."
        ) from error
    return riptoken.CoreBPE(tokenizer.ranks(), {}, r50k_pat_str)

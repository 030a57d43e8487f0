"""Items with one true and three false endings: HellaSwag's, or a set made of a dataset's own val documents.

Completion convention: context and ending are tokenised apart, the ending with a space before it, and an ending's loss
is that of its own tokens; `acc` chooses by the sum, `acc_norm` by the mean a token. Knows no model.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from model import tokenizer
from storage.cache import ShardCache
from storage.errors import SourceInvalid
from storage.manifest import Manifest
from storage.store import Store

ENDINGS = 4
CONTEXT_TOKENS = 48  # of an item made of a document; its endings have half as many
ENDING_TOKENS = 24


@dataclass(frozen=True)
class Item:
    """A context, four endings (token ids each) and which of them is true."""

    context: list[int]
    endings: list[list[int]]
    label: int


def hellaswag_items(body: bytes | bytearray, name: str) -> list[Item]:
    """The items of a HellaSwag file, JSON lines or parquet as on the Hub. Raises SourceInvalid, naming the line."""
    items = []
    for number, line in _lines(body, name):
        try:
            found: dict[str, Any] = line if isinstance(line, dict) else json.loads(line)
            context, endings, label = found["ctx"], found["endings"], str(found["label"])
            texts = isinstance(endings, list) and all(isinstance(text, str) and text for text in [context, *endings])
            if not texts or len(endings) != ENDINGS or label not in {"0", "1", "2", "3"}:
                raise ValueError(f"context {context!r:.40}, endings {endings!r:.80}, label {label!r:.10}")
            ids = [tokenizer.encode(f" {ending}").tolist() for ending in endings]
            items.append(Item(tokenizer.encode(context).tolist(), ids, int(label)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SourceInvalid(
                f"{name}: line {number:,} should be a HellaSwag item (ctx, four endings, label 0 to 3), found "
                f"{type(error).__name__}: {error}. Mend evaluation.hellaswag, or leave it empty."
            ) from error
    if not items:
        raise SourceInvalid(f"{name}: HellaSwag items were asked for, found none. Mend evaluation.hellaswag.")
    return items


def _lines(body: bytes | bytearray, name: str) -> Iterator[tuple[int, Any]]:
    """Numbered from 1: lines that are not blank, or a parquet file's rows."""
    if not name.endswith(".parquet"):
        yield from ((number, line) for number, line in enumerate(bytes(body).splitlines(), 1) if line.strip())
        return
    try:
        rows = pq.read_table(pa.BufferReader(body)).to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceInvalid(
            f"{name}: a parquet file was asked for, found {error}. Mend evaluation.hellaswag."
        ) from error
    yield from enumerate(rows, 1)


def document_items(store: Store, dataset: str, manifest: Manifest, count: int, seed: int) -> list[Item]:
    """Up to `count` items made of val documents: the true ending against those of three others, seeded."""
    cache = ShardCache(store, dataset)
    whole = CONTEXT_TOKENS + ENDING_TOKENS
    pairs: list[tuple[list[int], list[int]]] = []
    for row in manifest.rows("val"):
        ids = cache.open(row)
        starts = np.flatnonzero(ids == tokenizer.EOT) + 1
        for start, end in zip(starts, [*(starts[1:] - 1), len(ids)], strict=True):
            if end - start >= whole:
                document = ids[start : start + whole].tolist()
                pairs.append((document[:CONTEXT_TOKENS], document[CONTEXT_TOKENS:]))
    if len(pairs) < ENDINGS:
        raise ValueError(
            f"dataset {dataset!r}: a completion set needs {ENDINGS} val documents of {whole} tokens or more, found "
            f"{len(pairs)}. Use more data.val_shards in a new dataset, or give evaluation.hellaswag a file."
        )
    generator = np.random.Generator(np.random.PCG64(seed))
    items = []
    for index in generator.permutation(len(pairs))[:count]:
        context, ending = pairs[index]
        others = [int(other) for other in generator.permutation(len(pairs))[:ENDINGS] if other != index][: ENDINGS - 1]
        label = int(generator.integers(ENDINGS))
        endings = [pairs[other][1] for other in others]
        endings.insert(label, ending)
        items.append(Item(context, endings, label))
    return items

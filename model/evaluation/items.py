"""Items with one true and three false endings: what they are, and a set of them made of a dataset's val documents.

Knows no model.
"""

from dataclasses import dataclass

import numpy as np

from model import tokenizer
from storage.cache.shards import LIMIT_BYTES, ShardCache
from storage.datasets.manifest import Manifest
from storage.stores.store import Store

ENDINGS = 4
CONTEXT_TOKENS = 48  # of an item made of a document; its endings have half as many
ENDING_TOKENS = 24


@dataclass(frozen=True)
class Item:
    """A context, four endings (token ids each), which of them is true, and what each one's loss is divided by."""

    context: list[int]
    endings: list[list[int]]
    label: int
    lengths: list[int]


def document_items(
    store: Store, dataset: str, manifest: Manifest, count: int, seed: int, cache_bytes: int = LIMIT_BYTES
) -> list[Item]:
    """Up to `count` items made of val documents: the true ending against those of three others, seeded.

    Raises ValueError when the val split has not enough documents of their length.
    """
    cache = ShardCache(store, dataset, cache_bytes)
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
        items.append(Item(context, endings, label, [ENDING_TOKENS] * ENDINGS))
    return items

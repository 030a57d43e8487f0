"""Items with one true and three false endings, and such items made from a dataset's val documents."""

from dataclasses import dataclass

import numpy as np

from storage.cache.shards import LIMIT_BYTES, ShardCache
from storage.datasets.manifest import Manifest
from storage.datasets.shards import document_bounds
from storage.stores.store import Store

ENDINGS = 4
CONTEXT_TOKENS = 48  # of an item made from a document
ENDING_TOKENS = 24
ITEM_TOKENS = CONTEXT_TOKENS + ENDING_TOKENS


@dataclass(frozen=True)
class Item:
    """A context and four endings as token ids, the index of the true ending, and the divisors of their losses."""

    context: list[int]
    endings: list[list[int]]
    label: int
    lengths: list[int]


def document_items(
    store: Store, dataset: str, manifest: Manifest, count: int, seed: int, cache_bytes: int = LIMIT_BYTES
) -> list[Item]:
    """Up to `count` items of val documents, with endings of others, seeded. Raises ValueError for too few documents."""
    openings = [  # the first ITEM_TOKENS tokens of each val document that is long enough
        ids[start + 1 : start + 1 + ITEM_TOKENS].tolist()
        for ids in map(ShardCache(store, dataset, cache_bytes).open, manifest.rows("val"))
        for start, end in zip(*document_bounds(ids), strict=True)
        if end - start > ITEM_TOKENS
    ]
    if len(openings) < ENDINGS:
        needed = f"a completion set needs {ENDINGS} val documents of at least {ITEM_TOKENS} tokens"
        remedy = "Set a larger data.val_shards in a new dataset, or evaluation.hellaswag to a file."
        raise ValueError(f"dataset {dataset!r}: {needed}, found {len(openings)}. {remedy}")
    generator = np.random.Generator(np.random.PCG64(seed))
    items = []
    for index in generator.permutation(len(openings))[:count]:
        candidates = generator.permutation(len(openings))[:ENDINGS]
        others = [other for other in candidates if other != index][: ENDINGS - 1]
        label = int(generator.integers(ENDINGS))
        endings = [openings[other][CONTEXT_TOKENS:] for other in others]
        endings.insert(label, openings[index][CONTEXT_TOKENS:])
        items.append(Item(openings[index][:CONTEXT_TOKENS], endings, label, [ENDING_TOKENS] * ENDINGS))
    return items

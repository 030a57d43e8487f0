"""Items with four endings, laid out for one forward pass: the context once, then its endings, blind to each other.

    tokens      c c c c a a b b b        positions   0 1 2 3 4 5 4 5 6
    a looks at the context and at a, b at the context and at b

Knows no model. Shapes: B rows, T time, N scored tokens, U places that a scored token is foretold at.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.evaluation.items import ENDINGS, Item

ROWS = 256  # of one forward pass, at most


@dataclass(frozen=True)
class Row:
    """Endings after one context: of the item `number` those from `first` on."""

    number: int
    first: int
    context: list[int]
    endings: list[list[int]]

    @property
    def tokens(self) -> int:
        """What the row feeds to the model: of each ending the last token is foretold alone."""
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings)


@dataclass(frozen=True)
class Batch:
    """Rows as tensors. Scored token n is `targets_N[n]`, of ending `slots_N[n]` (four an item), foretold at a place."""

    tokens_BT: Tensor
    positions_BT: Tensor
    mask_B1TT: Tensor
    places_U: Tensor  # in B*T
    place_of_N: Tensor  # in U
    targets_N: Tensor
    slots_N: Tensor


def pack_items(items: Sequence[Item], context_tokens: int) -> list[Row]:
    """A row an item, the longest first; one an ending where they do not fit together.

    What is too long for the model is cut on the left of the context, as lm-evaluation-harness does it: to the last
    `context_tokens` + 1 tokens of context and ending. Raises ValueError for an ending that leaves no room at all.
    """
    found = []
    for number, item in enumerate(items):
        longest = max(map(len, item.endings))
        if longest > context_tokens:
            raise ValueError(
                f"item {number + 1}: an ending of {longest} tokens was to be scored, the model's context "
                f"(model.context_tokens) is {context_tokens}. Leave that item out, or evaluate another model."
            )
        if len(item.context) + longest - 1 <= context_tokens:
            found.append(Row(number, 0, item.context, item.endings))
            continue
        for first, ending in enumerate(item.endings):
            found.append(Row(number, first, item.context[-(context_tokens + 1 - len(ending)) :], [ending]))
    return sorted(found, key=lambda row: -row.tokens)


def batch_rows(sorted_rows: Sequence[Row], most_tokens: int) -> Iterator[list[Row]]:
    """Neighbours together, of about the same length: with their padding `most_tokens` at once, or a single one."""
    batch: list[Row] = []
    for row in sorted_rows:
        if batch and (len(batch) == ROWS or (len(batch) + 1) * batch[0].tokens > most_tokens):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def to_tensors(batch: Sequence[Row], device: torch.device) -> Batch:
    """The rows as tensors on the device, padded on the right; nothing scored looks at padding, none of it is scored."""
    width = max(row.tokens for row in batch)
    tokens, positions, parts = ([[0] * width for _ in batch] for _ in range(3))
    places: list[int] = []
    place_of, targets, slots = [], [], []
    for index, row in enumerate(batch):
        fed = len(row.context)
        tokens[index][:fed], positions[index][:fed] = row.context, range(fed)
        places.append(index * width + fed - 1)  # every ending's first token is foretold at the context's last
        first = len(places) - 1
        for part, ending in enumerate(row.endings, 1):
            more = len(ending) - 1
            tokens[index][fed : fed + more] = ending[:-1]
            positions[index][fed : fed + more] = range(len(row.context), len(row.context) + more)
            parts[index][fed : fed + more] = [part] * more
            place_of += [first, *range(len(places), len(places) + more)]
            places += range(index * width + fed, index * width + fed + more)
            targets += ending
            slots += [row.number * ENDINGS + row.first + part - 1] * len(ending)
            fed += more
    parts_BT = torch.tensor(parts, device=device)
    earlier_TT = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    seen_BTT = (parts_BT[:, None, :] == 0) | (parts_BT[:, None, :] == parts_BT[:, :, None])
    return Batch(
        torch.tensor(tokens, device=device),
        torch.tensor(positions, device=device),
        (seen_BTT & earlier_TT)[:, None],
        *(torch.tensor(values, device=device) for values in (places, place_of, targets, slots)),
    )

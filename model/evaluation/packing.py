"""Lays out items with four endings for one forward pass: the context once, then its endings, masked from each other.

    tokens      c c c c a a b b b        positions   0 1 2 3 4 5 4 5 6
    ending a attends to the context and to a, ending b to the context and to b

Imports no model. Shapes: B rows, T time, N scored tokens, U positions that predict them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.evaluation.items import ENDINGS, Item

MAXIMUM_ROWS = 256  # of one forward pass


@dataclass(frozen=True)
class Row:
    """A context with one or all endings of item `item`. `first_ending` is the index of `endings[0]` in that item."""

    item: int
    first_ending: int
    context: list[int]
    endings: list[list[int]]

    @property
    def tokens(self) -> int:
        """Tokens that are fed to the model: the last one of each ending is only predicted."""
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings)


@dataclass(frozen=True)
class Batch:
    """Rows as tensors. Scored token n is `targets_N[n]`; its loss belongs to slot `slots_N[n]` = item * 4 + ending."""

    tokens_BT: Tensor
    positions_BT: Tensor
    mask_B1TT: Tensor
    predictors_U: Tensor  # indices into B*T of the positions whose output predicts scored tokens
    predictor_of_N: Tensor  # indices into U
    targets_N: Tensor
    slots_N: Tensor


def pack_items(items: Sequence[Item], context_tokens: int) -> list[Row]:
    """One row per item, the longest first; one row per ending if the item does not fit into one row.

    A context that is too long is cut on the left, as lm-evaluation-harness does: the last `context_tokens` + 1 tokens
    of context and ending stay. Raises ValueError for an ending that is longer than the model's context.
    """
    rows = []
    for number, item in enumerate(items):
        longest = max(map(len, item.endings))
        if longest > context_tokens:
            problem = f"item {number + 1}: its longest ending has {longest} tokens, more than the model's context"
            remedy = "Remove the item, or evaluate another model."
            raise ValueError(f"{problem} (model.context_tokens = {context_tokens}). {remedy}")
        if len(item.context) + longest - 1 <= context_tokens:
            rows.append(Row(number, 0, item.context, item.endings))
            continue
        for first, ending in enumerate(item.endings):
            rows.append(Row(number, first, item.context[-(context_tokens + 1 - len(ending)) :], [ending]))
    return sorted(rows, key=lambda row: -row.tokens)


def batch_rows(sorted_rows: Sequence[Row], maximum_tokens: int) -> Iterator[list[Row]]:
    """Batches of consecutive rows of similar length: up to `maximum_tokens` with padding, or a single longer row."""
    batch: list[Row] = []
    for row in sorted_rows:
        if batch and (len(batch) == MAXIMUM_ROWS or (len(batch) + 1) * batch[0].tokens > maximum_tokens):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def to_tensors(rows: Sequence[Row], device: torch.device) -> Batch:
    """The rows on the device, padded on the right. Padding is not scored, and no scored position attends to it."""
    width = max(row.tokens for row in rows)
    tokens, positions, parts = ([[0] * width for _ in rows] for _ in range(3))  # part 0: context, 1 to 4: endings
    predictors: list[int] = []
    predictor_of, targets, slots = [], [], []
    for index, row in enumerate(rows):
        end = len(row.context)
        tokens[index][:end], positions[index][:end] = row.context, range(end)
        context_predictor = len(predictors)  # the context's last token predicts the first token of every ending
        predictors.append(index * width + end - 1)
        for part, ending in enumerate(row.endings, 1):
            fed = len(ending) - 1
            tokens[index][end : end + fed] = ending[:-1]
            positions[index][end : end + fed] = range(len(row.context), len(row.context) + fed)
            parts[index][end : end + fed] = [part] * fed
            predictor_of += [context_predictor, *range(len(predictors), len(predictors) + fed)]
            predictors += range(index * width + end, index * width + end + fed)
            targets += ending
            slots += [row.item * ENDINGS + row.first_ending + part - 1] * len(ending)
            end += fed
    parts_BT = torch.tensor(parts, device=device)
    earlier_TT = torch.ones(width, width, dtype=torch.bool, device=device).tril()
    visible_BTT = (parts_BT[:, None, :] == 0) | (parts_BT[:, None, :] == parts_BT[:, :, None])
    mask_B1TT = (visible_BTT & earlier_TT)[:, None]
    scored = (torch.tensor(values, device=device) for values in (predictors, predictor_of, targets, slots))
    return Batch(torch.tensor(tokens, device=device), torch.tensor(positions, device=device), mask_B1TT, *scored)

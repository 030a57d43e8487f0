"""Losses equal those of a plain reference, for any batch size, padding and number of ranks."""

from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model import tokenizer
from model.config import RunConfig
from model.evaluation import evaluator, packing
from model.evaluation.evaluator import Evaluator, ValLoss
from model.evaluation.items import Item
from model.evaluation.packing import batch_rows, pack_items
from model.gpt import GPT
from storage.datasets.manifest import Manifest
from storage.keys import DatasetKeys
from storage.loading.windows import Windows
from storage.stores.store import Store
from tests.model.evaluation.small_models import (
    ALONE,
    CPU,
    SHAPE,
    SimulatedRank,
    T,
    small_model,
    unigram_model,
)


@pytest.fixture
def model() -> GPT:
    return small_model()


@pytest.fixture
def loader(store: Store, config: RunConfig, build: Callable[[RunConfig], Manifest]) -> Windows:
    return Windows(store, "small", build(config), "val", sequence_tokens=T, seed=0)


def plain_windows(store: Store, manifest: Manifest) -> np.ndarray:
    windows = []
    for row in manifest.rows("val"):
        ids = np.fromfile(str(store.local_path(DatasetKeys("small").shard(row.shard_id))), "<u2").astype(np.int64)
        windows += [ids[start : start + T + 1] for start in range(0, len(ids) - T, T)]
    return np.stack(windows)


@torch.no_grad()
def plain_loss(model: GPT, windows: np.ndarray) -> float:
    """The mean loss of the windows' tokens, one window at a time."""
    total = 0.0
    for window in torch.from_numpy(windows):
        logits_TV = model.logits(model.transformer(window[None, :-1]))[0]
        total += float(F.cross_entropy(logits_TV.double(), window[1:], reduction="sum"))
    return total / (len(windows) * T)


@torch.no_grad()
def plain_ending_loss(model: GPT, context: list[int], ending: list[int]) -> float:
    """The summed loss of one ending after one context, without other endings in the batch."""
    logits_TV = model.logits(model.transformer(torch.tensor([context + ending[:-1]])))[0]
    return float(F.cross_entropy(logits_TV[len(context) - 1 :], torch.tensor(ending), reduction="sum"))


def random_ids(count: int, seed: int) -> list[int]:
    return np.random.Generator(np.random.PCG64(seed)).integers(0, tokenizer.EOT, count).tolist()


def approximately(scored: ValLoss) -> object:
    return pytest.approx(asdict(scored), rel=1e-6)


# Loss on val windows


def test_val_loss_equals_a_plain_reference(
    model: GPT, store: Store, config: RunConfig, build: Callable[[RunConfig], Manifest]
) -> None:
    manifest = build(config)
    loader = Windows(store, "small", manifest, "val", sequence_tokens=T, seed=0)
    windows = plain_windows(store, manifest)
    scored = Evaluator(model, ALONE).val_loss(loader, 0)
    assert scored.loss == pytest.approx(plain_loss(model, windows), rel=1e-6)
    assert (scored.tokens, scored.left_out_tokens) == (len(windows) * T, 0)
    assert scored.unused_tokens == sum(row.tokens for row in manifest.rows("val")) - len(windows) * T


@pytest.mark.parametrize("sequences", [1, 3, 100])
def test_val_loss_does_not_depend_on_the_batch_size(
    model: GPT, loader: Windows, sequences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = approximately(Evaluator(model, ALONE).val_loss(loader, 0))
    monkeypatch.setattr(evaluator, "EVALUATION_SEQUENCES", sequences)
    assert asdict(Evaluator(model, ALONE).val_loss(loader, 0)) == expected


@pytest.mark.parametrize("ranks", [2, 3, 7])
@pytest.mark.parametrize("limit_tokens", [0, 5 * T])
def test_val_loss_does_not_depend_on_the_number_of_ranks(
    model: GPT, loader: Windows, ranks: int, limit_tokens: int
) -> None:
    """With 5 windows for 7 ranks, two of them have nothing to score."""
    simulated = [SimulatedRank(rank, ranks, CPU) for rank in range(ranks)]
    for ddp in simulated:
        Evaluator(model, ddp).val_loss(loader, limit_tokens)
    total = torch.stack([ddp.added[0] for ddp in simulated]).sum(0)
    expected = approximately(Evaluator(model, ALONE).val_loss(loader, limit_tokens))
    for ddp in simulated:
        ddp.total.append(total)
        assert asdict(Evaluator(model, ddp).val_loss(loader, limit_tokens)) == expected


@pytest.mark.parametrize(("limit_tokens", "windows"), [(5 * T, 5), (6 * T - 1, 5), (1, 1), (10**9, 58)])
def test_a_limit_scores_a_seeded_part_the_same_every_time(
    model: GPT, loader: Windows, limit_tokens: int, windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    take = loader.read_in_file_order

    def recording(indices: np.ndarray) -> np.ndarray:
        chosen.extend(indices.tolist())
        return take(indices)

    monkeypatch.setattr(loader, "read_in_file_order", recording)
    scored = Evaluator(model, ALONE).val_loss(loader, limit_tokens, seed=4)
    first = chosen.copy()
    assert scored.tokens == windows * T
    assert len(set(first)) == len(first) == windows
    assert scored.loss == pytest.approx(plain_loss(model, take(np.array(first)).astype(np.int64)), rel=1e-6)
    chosen.clear()
    assert Evaluator(model, ALONE).val_loss(loader, limit_tokens, seed=4) == scored
    assert chosen == first


def test_another_seed_scores_another_part(model: GPT, loader: Windows) -> None:
    losses = {Evaluator(model, ALONE).val_loss(loader, 5 * T, seed=seed).loss for seed in range(4)}
    assert len(losses) == 4


def test_evaluation_leaves_the_weights_unchanged_and_applies_no_dropout(loader: Windows) -> None:
    torch.manual_seed(0)
    model = GPT(SHAPE, dropout=0.5).train()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    first = Evaluator(model, ALONE).val_loss(loader, 0)
    assert Evaluator(model.train(), ALONE).val_loss(loader, 0) == first
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert all(weight.grad is None for weight in model.parameters())


# Endings


def losses_of(model: GPT, *items: Item) -> np.ndarray:
    return Evaluator(model, ALONE).ending_losses(items)


def item_of(context: list[int], endings: list[list[int]]) -> Item:
    return Item(context, endings, 0, [1] * 4)


def many_items() -> list[Item]:
    """Twenty items of many lengths, some too long for the model."""
    sizes = np.random.Generator(np.random.PCG64(1)).integers(1, 12, (20, 5)).tolist()
    return [
        item_of(random_ids(4 * first, 100 + number), [random_ids(size, 1_000 * number + size) for size in rest])
        for number, (first, *rest) in enumerate(sizes)
    ]


def test_ending_losses_equal_a_plain_reference(model: GPT) -> None:
    items = many_items()
    assert any(len(item.context) + max(map(len, item.endings)) > T + 1 for item in items)
    expected = [
        [plain_ending_loss(model, item.context[-(T + 1 - len(ending)) :], ending) for ending in item.endings]
        for item in items
    ]
    assert losses_of(model, *items) == pytest.approx(np.array(expected), rel=1e-5)


def test_an_ending_scores_the_same_beside_short_and_long_endings(model: GPT) -> None:
    context, ending = random_ids(6, 1), random_ids(4, 2)
    [short] = losses_of(model, item_of(context, [ending] * 4))
    [longer] = losses_of(model, item_of(context, [random_ids(20, 3), ending, random_ids(26, 4), ending]))
    assert [*short, longer[1], longer[3]] == pytest.approx([short[0]] * 6, rel=1e-5)


@pytest.mark.parametrize("longest", [2, 12, 31, 32])
def test_a_context_that_is_too_long_is_cut_on_the_left_for_each_ending(model: GPT, longest: int) -> None:
    context = random_ids(100, 5)
    endings = [random_ids(count, 10 + count) for count in (longest, 1, 2, 1)]
    expected = [plain_ending_loss(model, context[-(T + 1 - len(ending)) :], ending) for ending in endings]
    assert losses_of(model, item_of(context, endings))[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("longest", [33, 40, 200])
def test_an_ending_that_leaves_no_room_for_a_context_is_refused(model: GPT, longest: int) -> None:
    item = item_of(random_ids(20, 6), [random_ids(longest, 7), *(random_ids(3, 8) for _ in range(3))])
    with pytest.raises(ValueError, match=r"item 1: .*context_tokens"):
        losses_of(model, item)


@pytest.mark.parametrize("rows", [1, 3, 16])
def test_ending_losses_do_not_depend_on_the_batch_size(model: GPT, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = losses_of(model, *many_items())
    monkeypatch.setattr(packing, "MAXIMUM_ROWS", rows)
    assert losses_of(model, *many_items()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("ranks", [2, 3, 30])
def test_the_ranks_share_the_items(model: GPT, ranks: int) -> None:
    """Of 30 ranks some have nothing to score."""
    simulated = [SimulatedRank(rank, ranks, CPU) for rank in range(ranks)]
    for ddp in simulated:
        Evaluator(model, ddp).ending_losses(many_items())
    total = torch.stack([ddp.added[0] for ddp in simulated]).sum(0).numpy().reshape(-1, 4)
    assert total == pytest.approx(losses_of(model, *many_items()), rel=1e-5)
    assert all((ddp.added[0] != 0).sum() < total.size for ddp in simulated)


def test_a_logit_far_above_those_of_the_first_tokens_overflows_nothing() -> None:
    model = unigram_model({40_000: 1.0})
    with torch.no_grad():
        model.transformer.wte.weight[:40_000, 0] = -500
    assert losses_of(model, item_of([1], [[40_000], [7], [40_000, 7], [7, 9]]))[0] == pytest.approx(
        [0, 500, 500, 1_000]
    )


def test_each_context_is_computed_once_and_batches_hold_rows_of_similar_length() -> None:
    items = [item for item in many_items() if len(item.context) + max(map(len, item.endings)) <= T]
    rows = pack_items(items, T)
    assert sum(row.tokens for row in rows) == sum(
        len(item.context) + sum(len(ending) - 1 for ending in item.endings) for item in items
    )
    batches = list(batch_rows(rows, 300))
    assert all(len(batch) * batch[0].tokens <= 300 for batch in batches)
    assert len(batches) > 1
    assert [row for batch in batches for row in batch] == rows
    assert [row.tokens for row in rows] == sorted((row.tokens for row in rows), reverse=True)

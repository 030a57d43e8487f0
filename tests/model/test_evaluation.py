"""Scores are those of a plain reference, whatever the batch, the padding and the number of ranks."""

import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model import evaluation, scoring, tokenizer
from model.__main__ import run_job
from model.completion import Item
from model.config import ModelConfig, RunConfig
from model.distributed import DDPConfig
from model.evaluation import Evaluator
from model.gpt import GPT
from model.job import Job, ask, read_result
from model.loader import DataLoader
from model.run import evaluation_jobs, pin_run, training_job
from storage import keys
from storage.manifest import Manifest
from storage.store import Store, read_json
from tests.making import document, tiny_config, write_parquet

SHAPE = ModelConfig(layers=1, heads=2, width=16, context_tokens=32)
CPU = torch.device("cpu")
ALONE = DDPConfig(0, 1, CPU)
T = 32


@dataclass(frozen=True)
class OneOfMany(DDPConfig):
    """A rank that keeps what it would add, and is told the sum of all by the test."""

    mine: list[Tensor] = field(default_factory=list)
    told: list[Tensor] = field(default_factory=list)

    def sum(self, values: Tensor) -> Tensor:
        self.mine.append(values.clone())
        return self.told[0] if self.told else torch.ones_like(values)


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(11)
    model = GPT(SHAPE)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    return model


def unigram_model(chances: dict[int, float]) -> GPT:
    """A model that gives every token the same probability after any context."""
    model = GPT(SHAPE)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
        model.transformer.ln_f.bias[0] = 1
        model.transformer.wte.weight[:, 0] = -50
        for token, chance in chances.items():
            model.transformer.wte.weight[token, 0] = math.log(chance)
    return model


@pytest.fixture
def loader(store: Store, config: RunConfig, build: Callable[[RunConfig], Manifest]) -> DataLoader:
    return DataLoader(store, "small", build(config), "val", sequence_tokens=T, seed=0)


def plain_windows(store: Store, manifest: Manifest) -> np.ndarray:
    windows = []
    for row in manifest.rows("val"):
        ids = np.fromfile(str(store.local_path(keys.shard("small", row.shard_id))), "<u2").astype(np.int64)
        windows += [ids[start : start + T + 1] for start in range(0, len(ids) - T, T)]
    return np.stack(windows)


@torch.no_grad()
def plain_loss(model: GPT, windows: np.ndarray) -> float:
    """The mean loss of the windows' tokens, one window at a time."""
    total = 0.0
    for window in torch.from_numpy(windows):
        logits_TV = model.logits(model.hidden(window[None, :-1]))[0]
        total += float(F.cross_entropy(logits_TV.double(), window[1:], reduction="sum"))
    return total / (len(windows) * T)


@torch.no_grad()
def plain_ending_loss(model: GPT, context: list[int], ending: list[int]) -> float:
    """The summed loss of one ending after one context, with nothing beside it."""
    logits_TV = model.logits(model.hidden(torch.tensor([context + ending[:-1]])))[0]
    return float(F.cross_entropy(logits_TV[len(context) - 1 :], torch.tensor(ending), reduction="sum"))


def made_ids(count: int, seed: int) -> list[int]:
    return np.random.Generator(np.random.PCG64(seed)).integers(0, tokenizer.EOT, count).tolist()


# Loss on val windows


def test_val_loss_is_that_of_a_plain_reference(
    model: GPT, store: Store, config: RunConfig, build: Callable[[RunConfig], Manifest]
) -> None:
    manifest = build(config)
    loader = DataLoader(store, "small", manifest, "val", sequence_tokens=T, seed=0)
    windows = plain_windows(store, manifest)
    found = Evaluator(model, ALONE).val_loss(loader, 0)
    assert found["loss"] == pytest.approx(plain_loss(model, windows), rel=1e-6)
    assert found["tokens"] == len(windows) * T
    assert found["unused_tokens"] == sum(row.tokens for row in manifest.rows("val")) - len(windows) * T


@pytest.mark.parametrize("sequences", [1, 3, 100])
def test_val_loss_does_not_depend_on_the_batch_size(
    model: GPT, loader: DataLoader, sequences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = Evaluator(model, ALONE).val_loss(loader, 0)
    monkeypatch.setattr(evaluation, "EVALUATION_SEQUENCES", sequences)
    assert Evaluator(model, ALONE).val_loss(loader, 0) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("ranks", [2, 3, 7])
@pytest.mark.parametrize("limit_tokens", [0, 5 * T])
def test_val_loss_does_not_depend_on_the_number_of_ranks(
    model: GPT, loader: DataLoader, ranks: int, limit_tokens: int
) -> None:
    """With 5 windows for 7 ranks, two of them have nothing to score."""
    everyone = [OneOfMany(rank, ranks, CPU) for rank in range(ranks)]
    for ddp in everyone:
        Evaluator(model, ddp).val_loss(loader, limit_tokens)
    total = torch.stack([ddp.mine[0] for ddp in everyone]).sum(0)
    expected = pytest.approx(Evaluator(model, ALONE).val_loss(loader, limit_tokens), rel=1e-6)
    for ddp in everyone:
        ddp.told.append(total)
        assert Evaluator(model, ddp).val_loss(loader, limit_tokens) == expected


@pytest.mark.parametrize(("limit_tokens", "windows"), [(5 * T, 5), (6 * T - 1, 5), (1, 1), (10**9, 58)])
def test_a_limit_scores_a_seeded_part_the_same_every_time(
    model: GPT, loader: DataLoader, limit_tokens: int, windows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[int] = []
    take = loader.windows_in_file_order

    def watched(asked: np.ndarray) -> np.ndarray:
        chosen.extend(asked.tolist())
        return take(asked)

    monkeypatch.setattr(loader, "windows_in_file_order", watched)
    found = Evaluator(model, ALONE).val_loss(loader, limit_tokens, seed=4)
    first = chosen.copy()
    assert found["tokens"] == windows * T
    assert len(set(first)) == len(first) == windows
    assert found["loss"] == pytest.approx(plain_loss(model, take(np.array(first)).astype(np.int64)), rel=1e-6)
    chosen.clear()
    assert Evaluator(model, ALONE).val_loss(loader, limit_tokens, seed=4) == found
    assert chosen == first


def test_another_seed_scores_another_part(model: GPT, loader: DataLoader) -> None:
    found = {Evaluator(model, ALONE).val_loss(loader, 5 * T, seed=seed)["loss"] for seed in range(4)}
    assert len(found) == 4


def test_evaluation_leaves_the_model_as_it_is_and_drops_nothing_out(loader: DataLoader) -> None:
    torch.manual_seed(0)
    model = GPT(SHAPE, dropout=0.5).train()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    first = Evaluator(model, ALONE).val_loss(loader, 0)
    assert Evaluator(model.train(), ALONE).val_loss(loader, 0) == first
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert all(weight.grad is None for weight in model.parameters())


# Endings


def test_ending_losses_are_those_of_a_plain_reference(model: GPT) -> None:
    item = Item(made_ids(9, 0), [made_ids(count, count) for count in (5, 1, 12, 3)], 0)
    found = Evaluator(model, ALONE).ending_losses(item)
    assert [tokens for _, tokens in found] == [5, 1, 12, 3]
    expected = [plain_ending_loss(model, item.context, ending) for ending in item.endings]
    assert [loss for loss, _ in found] == pytest.approx(expected, rel=1e-5)


def test_an_ending_scores_the_same_beside_short_and_long_ones(model: GPT) -> None:
    context, ending = made_ids(6, 1), made_ids(4, 2)
    short = Evaluator(model, ALONE).ending_losses(Item(context, [ending] * 4, 0))
    longer = Evaluator(model, ALONE).ending_losses(Item(context, [made_ids(20, 3), ending, made_ids(26, 4), ending], 0))
    for loss, tokens in (*short, longer[1], longer[3]):
        assert tokens == 4
        assert loss == pytest.approx(short[0][0], rel=1e-5)


@pytest.mark.parametrize("longest", [2, 12, 31, 32])
def test_a_context_that_is_too_long_is_cut_on_the_left(model: GPT, longest: int) -> None:
    context = made_ids(100, 5)
    endings = [made_ids(count, 10 + count) for count in (longest, 1, 2, 1)]
    expected = [plain_ending_loss(model, context[-(T + 1 - longest) :], ending) for ending in endings]
    found = Evaluator(model, ALONE).ending_losses(Item(context, endings, 0))
    assert [loss for loss, _ in found] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("longest", [33, 40, 200])
def test_an_ending_that_leaves_no_room_for_a_context_is_refused(model: GPT, longest: int) -> None:
    item = Item(made_ids(20, 6), [made_ids(longest, 7), *(made_ids(3, 8) for _ in range(3))], 0)
    with pytest.raises(ValueError, match="context_tokens"):
        Evaluator(model, ALONE).ending_losses(item)


# Choices


def chosen_in(store: Store, model: GPT, lines: list[dict[str, Any]]) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The metrics and the rows of a HellaSwag job over these lines."""
    key = keys.source("0" * 64, "items.jsonl")
    store.put_new(key, "\n".join(json.dumps(line) for line in lines).encode())
    job = Job("scored", "hellaswag", {"items": key, "step": 1})
    found = scoring.hellaswag(store, job, Evaluator(model, ALONE))
    body = store.read(keys.evaluation_items("scored", 1, "hellaswag")).body
    return found["metrics"], pq.read_table(io.BytesIO(bytes(body))).to_pylist()


def test_a_model_without_an_opinion_chooses_the_first_of_equals(store: Store) -> None:
    model = GPT(SHAPE)
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
    labels = [0, 3, 1, 0, 2]
    lines = [{"ctx": "The sun", "endings": ["is red", "was a", "to the", "in one"], "label": label} for label in labels]
    metrics, rows = chosen_in(store, model, lines)
    assert metrics == {"hellaswag_completion_acc": 2 / 5, "hellaswag_completion_acc_norm": 2 / 5}
    assert [(row["choice"], row["choice_norm"]) for row in rows] == [(0, 0)] * 5


def test_the_sum_and_the_mean_a_token_choose_differently_in_three_items_made_by_hand(store: Store) -> None:
    """Losses a token: a 0.69, b 1.20, c 1.90, d 3.00; so 'a a a a' has the sum 2.77 and the mean 0.69."""
    chances = {"a": 0.5, "b": 0.3, "c": 0.15, "d": 0.05}
    ids = {letter: tokenizer.encode(f" {letter}").tolist() for letter in chances}
    assert {len(found) for found in ids.values()} == {1}
    model = unigram_model({ids[letter][0]: chance for letter, chance in chances.items()})
    items = [
        (["a a a a", "c", "d", "d d"], 0, 1, 0),  # endings, label, choice by sum, choice by mean
        (["d", "b b b", "c", "d d"], 1, 2, 1),
        (["b", "d d", "c c c", "a a"], 1, 0, 3),
    ]
    lines = [{"ctx": "Any context", "endings": endings, "label": label} for endings, label, _, _ in items]
    metrics, rows = chosen_in(store, model, lines)
    assert metrics == {"hellaswag_completion_acc": 0.0, "hellaswag_completion_acc_norm": 2 / 3}
    for row, (endings, label, by_sum, by_mean) in zip(rows, items, strict=True):
        assert (row["label"], row["choice"], row["choice_norm"]) == (label, by_sum, by_mean)
        words = [ending.split() for ending in endings]
        assert row["tokens"] == [len(ending) for ending in words]
        expected = [sum(-math.log(chances[letter]) for letter in ending) for ending in words]
        assert row["losses"] == pytest.approx(expected, rel=1e-5)


# Jobs


def test_each_evaluation_of_a_run_is_a_job_of_its_own_that_gives_the_same_again(
    store: Store, tmp_path: Path, build: Callable[[RunConfig], Manifest]
) -> None:
    source = write_parquet(tmp_path / "long" / "file.parquet", [document(number, words=100) for number in range(40)])
    config = tiny_config(store.url, str(source), "train.max_steps=1", "train.warmup_steps=0")
    run = pin_run(store, config, build(config).digest, None)
    assert run_job(store.url, ask(store, training_job(run))) == 0
    names = set()
    for job in evaluation_jobs(run, 1):
        assert run_job(store.url, ask(store, job)) == 0
        result = read_result(store, job)
        assert result is not None
        names |= set(result["metrics"])
        found = read_json(store, result["key"])
        store.delete(keys.result(run.name, job.job_id))
        assert run_job(store.url, job.key) == 0
        assert (read_result(store, job), read_json(store, result["key"])) == (result, found)
    assert names == {"val_loss_t32", "perplexity_t32", "completion_acc", "completion_acc_norm"}


def test_an_evaluation_of_a_checkpoint_that_is_not_there_says_so(
    store: Store, config: RunConfig, build: Callable[[RunConfig], Manifest], capsys: pytest.CaptureFixture[str]
) -> None:
    run = pin_run(store, config, build(config).digest, None)
    job = evaluation_jobs(run, 77)[0]
    assert run_job(store.url, ask(store, job)) == 2
    assert "77" in capsys.readouterr().err
    assert read_result(store, job) is None

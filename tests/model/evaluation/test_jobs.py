"""The evaluation jobs: which endings they choose, what they store, and that a second run gives the same results."""

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from model import tokenizer
from model.__main__ import run_job
from model.checkpoints.records import checkpoints
from model.config import RunConfig
from model.evaluation import jobs
from model.evaluation.evaluator import Evaluator
from model.evaluation.results import Evaluation, Measurement
from model.gpt import GPT
from model.runs.job import Job, put_job, read_result
from model.runs.run import evaluation_jobs, pin_run, training_job
from storage import keys
from storage.datasets.manifest import Manifest
from storage.keys import RunKeys
from storage.stores.store import Store
from tests.making import document, read_json, tiny_config, write_parquet
from tests.model.evaluation.small_models import ALONE, SHAPE, T, small_model, unigram_model


@pytest.fixture
def model() -> GPT:
    return small_model()


# Choices


QUESTION = {"ctx": "Any context", "activity_label": "Any", "ctx_a": "Any context", "ctx_b": ""}


def scored(store: Store, model: GPT, lines: list[dict[str, Any]]) -> tuple[Measurement, list[dict[str, Any]]]:
    """The measurement of a HellaSwag job over these lines, and its answers as rows."""
    key = keys.source("0" * 64, "items.jsonl")
    store.put_new(key, "\n".join(json.dumps(QUESTION | line) for line in lines).encode())
    job = Job("scored", "hellaswag", {"items": key, "step": 1})
    measurement = jobs.hellaswag(store, job, Evaluator(model, ALONE))
    assert measurement.answers is not None
    return measurement, pq.read_table(io.BytesIO(measurement.answers)).to_pylist()


def test_a_model_without_preference_chooses_the_first_ending(store: Store) -> None:
    model = GPT(SHAPE)
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
    labels = [number * 7 % 4 for number in range(50)]
    texts = ["is red", "was a", "to the", "in one or two of them", "by", "of the one", "unbelievably so"]
    lines = [
        {"endings": [texts[(number + place) % 7] for place in range(4)], "label": label}
        for number, label in enumerate(labels)
    ]
    measurement, rows = scored(store, model, lines)
    assert measurement.metrics["hellaswag_completion_acc_norm"] == labels.count(0) / 50
    assert {row["hellaswag_completion_acc_norm_choice"] for row in rows} == {0}
    assert {len(set(row["hellaswag_completion_lengths"])) for row in rows} > {1}


def test_normalising_by_tokens_by_characters_and_by_bytes_chooses_three_different_endings(store: Store) -> None:
    """Losses a token, a character, a byte: digits and letters 2.4, 2.4, 2.4; one long word 3, 0.2, 0.2; an ideogram,
    which has 3 bytes, 2.7 a token. Chosen by hand so that the three divisors choose three endings."""
    by_token, by_character, by_byte, never = "7x7x7x", "responsibility", "語語語語語語語語", "zq jv"
    ids = {text: tokenizer.encode(f" {text}").tolist() for text in (by_token, by_character, by_byte, never)}
    assert [len(tokens) for tokens in ids.values()][:2] == [6, 1]
    costs = dict.fromkeys(ids[by_byte], 0.22) | dict.fromkeys(ids[by_token], 0.2) | {ids[by_character][0]: 2.4}
    scale = 20  # keeps the sum of the probabilities below 1
    probabilities = {token: math.exp(-scale * cost / 2) for token, cost in costs.items()}
    probabilities[tokenizer.EOT] = 1 - sum(probabilities.values())
    model = unigram_model(probabilities)
    orders = ([0, 1, 2, 3], [2, 0, 3, 1], [3, 2, 1, 0])
    texts = [by_token, by_character, by_byte, never]
    lines = [{"endings": [texts[place] for place in order], "label": order.index(1)} for order in orders]
    measurement, rows = scored(store, model, lines)
    for row, line in zip(rows, lines, strict=True):
        ended = line["endings"]
        losses = np.array(row["hellaswag_harness_losses"])
        assert losses.tolist() == pytest.approx(row["hellaswag_completion_losses"], rel=1e-5)
        likely = [text for text in ended if text != never]
        expected = [sum(-math.log(probabilities[token]) for token in ids[text]) for text in likely]
        assert [losses[ended.index(text)] for text in likely] == pytest.approx(expected, rel=1e-4)
        size = np.array([len(text.encode()) for text in ended])
        choices = [ended[row["hellaswag_completion_acc_norm_choice"]], ended[row["hellaswag_harness_acc_norm_choice"]]]
        assert [*choices, ended[int((losses / size).argmin())]] == [by_token, by_character, by_byte]
        assert ended[row["hellaswag_harness_acc_choice"]] == ended[int(losses.argmin())]
    assert measurement.metrics["hellaswag_harness_acc_norm"] == 1.0
    assert measurement.metrics["hellaswag_completion_acc_norm"] == 0.0


def test_accuracies_have_a_standard_error_and_a_planted_duplicate_is_counted(store: Store, model: GPT) -> None:
    lines = [{"endings": ["is red", "was a", "to the", f"in {number}"], "label": number % 4} for number in range(9)]
    measurement, rows = scored(store, model, [*lines, lines[3]])
    assert (measurement.items, measurement.repeated_items) == (10, 1)
    assert rows[9]["hellaswag_harness_losses"] == pytest.approx(rows[3]["hellaswag_harness_losses"], rel=1e-6)
    names = {f"hellaswag_{style}_{metric}" for style in ("completion", "harness") for metric in ("acc", "acc_norm")}
    errors = measurement.standard_errors or {}
    assert set(measurement.metrics) == set(errors) == set(measurement.conventions) == names
    for name, share in measurement.metrics.items():
        right = [row["label"] == row[f"{name}_choice"] for row in rows]
        assert share == sum(right) / 10
        assert errors[name] == pytest.approx(np.std(right, ddof=1) / math.sqrt(10))


def test_diverged_weights_are_refused(store: Store, model: GPT) -> None:
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = math.nan
    with pytest.raises(ValueError, match=r"step 1 gives losses that are not finite \(nan\): its training diverged"):
        scored(store, model, [{"endings": ["a", "b", "c", "d"], "label": 0}])
    assert not list(store.list(RunKeys("scored").evaluations))


# Jobs


COMMON = {"name", "step", "job", "environment", "precision", "metrics", "conventions"}
FIELDS = {  # further fields of each kind
    "val_loss": {"data", "dataset", "tokens", "unused_tokens"},
    "completion": {"data", "dataset", "items", "standard_errors", "answers_sha256"},
    "samples": {"drawn", "samples"},
}


def test_each_evaluation_of_a_run_is_a_separate_repeatable_job(
    store: Store, tmp_path: Path, build: Callable[[RunConfig], Manifest]
) -> None:
    source = write_parquet(tmp_path / "long" / "file.parquet", [document(number, words=100) for number in range(40)])
    config = tiny_config(store.url, str(source), "train.max_steps=1", "train.warmup_steps=0")
    manifest = build(config)
    run = pin_run(store, config, manifest.digest, None)
    assert run_job(store.url, put_job(store, training_job(run))) == 0
    evaluations: dict[str, Evaluation] = {}
    for job in evaluation_jobs(config, checkpoints(store, run.name)[-1], manifest.digest, None):
        assert run_job(store.url, put_job(store, job)) == 0
        result = read_result(store, job)
        assert result is not None
        stored: dict[str, Any] = read_json(store, result["key"]) or {}
        evaluation = evaluations[job.kind] = Evaluation.model_validate(stored)
        assert evaluation.model_dump(exclude_none=True) == stored
        assert FIELDS[job.kind] | COMMON == set(stored)
        assert (evaluation.metrics, evaluation.job, evaluation.step) == (result["metrics"], job.job_id, 1)
        assert set(evaluation.conventions) == set(evaluation.metrics)
        store.delete(RunKeys(run.name).result(job.job_id))
        assert run_job(store.url, job.key) == 0
        assert (read_result(store, job), read_json(store, result["key"])) == (result, stored)
    assert set(evaluations) == set(FIELDS)
    metrics = evaluations["val_loss"].metrics
    assert set(metrics) == {"val_loss_t32", "perplexity_t32", "bits_per_byte_t32"}
    whole = manifest.totals["val"]
    bits = metrics["val_loss_t32"] / math.log(2) * whole["tokens"] / whole["text_bytes"]
    assert metrics["bits_per_byte_t32"] == pytest.approx(bits)
    assert metrics["perplexity_t32"] == pytest.approx(math.exp(metrics["val_loss_t32"]))


def test_a_loss_on_a_part_of_val_has_another_name(
    store: Store, config: RunConfig, build: Callable[[RunConfig], Manifest]
) -> None:
    manifest = build(config)
    recipe = {"dataset": "small", "manifest": manifest.digest, "sequence_tokens": T, "validation_tokens": 5 * T + 3}
    measurement = jobs.val_loss(store, Job("x", "val_loss", recipe), Evaluator(GPT(SHAPE), ALONE))
    assert set(measurement.metrics) == {f"{name}_t32_of_160" for name in ("val_loss", "perplexity", "bits_per_byte")}


def test_an_evaluation_of_a_missing_checkpoint_names_its_step(
    store: Store, config: RunConfig, build: Callable[[RunConfig], Manifest], capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = build(config)
    run = pin_run(store, config, manifest.digest, None)
    recipe = {"step": 77, "weights": "0" * 64, "model": {}, "precision": "fp32"}
    job = Job(run.name, "samples", recipe)
    assert run_job(store.url, put_job(store, job)) == 2
    assert "77" in capsys.readouterr().err
    assert read_result(store, job) is None

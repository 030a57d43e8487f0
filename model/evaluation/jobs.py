"""The evaluation jobs: one function for each kind, listed in KINDS.

A metric's name holds what its value depends on, so that values of one name are comparable. The ranks share the work.
"""

import io
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from model import tokenizer
from model.checkpoints.records import WEIGHTS, checkpoints
from model.checkpoints.weights import load_model
from model.config import EvaluationConfig
from model.evaluation.evaluator import Evaluator, ValLoss
from model.evaluation.generate import sample_texts
from model.evaluation.hellaswag import CONVENTIONS, questions
from model.evaluation.items import Item, document_items
from model.evaluation.results import Evaluation, Measurement
from model.processes.distributed import DDPConfig
from model.runs.job import EvaluationSummary, Job
from storage.datasets.manifest import read_manifest
from storage.digests import canonical_json, sha256
from storage.errors import ObjectMissing
from storage.keys import RunKeys
from storage.loading.mix import describe, weighted_mean
from storage.loading.windows import MixedWindows
from storage.stores.store import Store, overwrite


def val_loss(store: Store, job: Job, evaluator: Evaluator) -> Measurement:
    """Loss, perplexity and bits per byte of the val split or a part; of a mix: of each dataset, and the mean loss."""
    recipe, metrics = job.recipe, dict[str, float]()
    settings = {"sequence_tokens": recipe["sequence_tokens"], "seed": 0, "cache_bytes": job.how.resources.cache_bytes}
    splits = MixedWindows(store, job.mix, "val", **settings).splits
    scored = {dataset: evaluator.val_loss(split, recipe["validation_tokens"]) for dataset, split in splits.items()}
    for dataset, score in scored.items():
        with np.errstate(over="ignore"):
            perplexity = np.exp(score.loss)
        _check_finite(job, np.array(perplexity))
        # Bits of the whole split: unscored tokens are taken to cost as much as the scored ones, <|endoftext|> included
        val = splits[dataset].manifest.totals["val"]
        bits_per_byte = score.loss / math.log(2) * val["tokens"] / val["text_bytes"]
        suffix = (f"{dataset}_" if "mix" in recipe else "") + _suffix(recipe, score)
        values = {"val_loss": score.loss, "perplexity": float(perplexity), "bits_per_byte": bits_per_byte}
        metrics |= {f"{name}_{suffix}": value for name, value in values.items()}
    counts = [(score.tokens, score.left_out_tokens, score.unused_tokens) for score in scored.values()]
    losses = {dataset: score.loss for dataset, score in scored.items()}
    total = ValLoss(weighted_mean(losses, job.mix), *map(sum, zip(*counts, strict=True)))
    convention = f"token-weighted mean over windows of {recipe['sequence_tokens']} tokens of the val split"
    conventions, mix = dict.fromkeys(metrics, convention), None
    if "mix" in recipe:
        mean, mix = f"val_loss_mix_{_suffix(recipe, total)}", job.mix
        metrics[mean], conventions[mean] = total.loss, f"mean of the datasets' val losses by weight: {describe(mix)}"
    return Measurement(
        metrics=metrics, conventions=conventions, mix=mix, tokens=total.tokens, unused_tokens=total.unused_tokens
    )


def _suffix(recipe: dict[str, Any], scored: ValLoss) -> str:
    """The end of a metric's name: the window length, and the scored tokens if some were left out."""
    return f"t{recipe['sequence_tokens']}" + (f"_of_{scored.tokens}" if scored.left_out_tokens else "")


def completion(store: Store, job: Job, evaluator: Evaluator) -> Measurement:
    """Accuracy on items made from val documents."""
    recipe = job.recipe
    manifest = read_manifest(store, recipe["dataset"], recipe["manifest"])
    count, seed, cache_bytes = recipe["completion_items"], recipe["seed"], job.how.resources.cache_bytes
    items = document_items(store, recipe["dataset"], manifest, count, seed, cache_bytes)
    convention = "val documents, three endings of others, acc by the sum, acc_norm by the mean per token"
    return _choose(job, evaluator, {"completion": (items, convention)})


def hellaswag(store: Store, job: Job, evaluator: Evaluator) -> Measurement:
    """Accuracy on a file of HellaSwag items, in both conventions."""
    key = job.recipe["items"]
    lines = questions(store.read(key).body, key)
    sets = {f"hellaswag_{name}": ([*map(to_item, lines)], text) for name, (to_item, text) in CONVENTIONS.items()}
    measurement = _choose(job, evaluator, sets)
    repeated = len(lines) - len({(line.ctx, line.endings) for line in lines})
    return measurement.model_copy(update={"data": key.split("/")[1], "file": key, "repeated_items": repeated})


def samples(_store: Store, job: Job, evaluator: Evaluator) -> Measurement:
    """Texts that the model generates after each prompt."""
    seed, ddp = job.recipe["seed"], evaluator.ddp
    settings = EvaluationConfig.model_validate(job.recipe, extra="ignore")
    mine = range(ddp.rank, settings.samples, ddp.ranks)
    written = []
    for number, prompt in enumerate(settings.prompts, 1):
        texts = sample_texts(evaluator.model, prompt, settings, [seed + row for row in mine])
        # The ranks add up their rows; token id + 1, so that 0 is the padding
        shifted_NT = torch.zeros(settings.samples, settings.sample_tokens, dtype=torch.int64)
        for row, ids in zip(mine, texts, strict=True):
            shifted_NT[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64) + 1
        for shifted in ddp.sum(shifted_NT.to(ddp.device)).tolist():
            written.append({"prompt": prompt, "text": tokenizer.decode([value - 1 for value in shifted if value])})
        evaluator.show_progress(number, len(settings.prompts))
    drawn = f"temperature {settings.temperature}, top k {settings.top_k}, top p {settings.top_p}, seed {seed}"
    return Measurement(drawn=drawn, samples=written)


KINDS = {"val_loss": val_loss, "completion": completion, "hellaswag": hellaswag, "samples": samples}


def evaluate(store: Store, job: Job, ddp: DDPConfig) -> EvaluationSummary:
    """Run and store an evaluation. Raises ObjectMissing without its checkpoint, ValueError if losses are not finite."""
    step, weights = job.recipe["step"], job.recipe["weights"]
    saved = [record for record in checkpoints(store, job.run) if record.step == step]
    if not saved or saved[0].files[WEIGHTS].sha256 != weights:
        problem = f"the checkpoint of step {step:,} is gone"
        raise ObjectMissing(f"run {job.run!r}: {problem}. Evaluate another: gpt2 evaluate")
    model = load_model(store, job.run, saved[0]).to(ddp.device)
    evaluator = Evaluator(model, ddp, job.recipe.get("precision", "fp32"), job.kind)
    measurement = KINDS[job.kind](store, job, evaluator)
    answers = measurement.answers
    origin = {"name": job.kind, "step": step, "job": job.job_id, "environment": ddp.environment}
    origin |= {"data": job.recipe.get("manifest", measurement.data), "dataset": job.recipe.get("dataset")}
    digest = None if answers is None else sha256(answers)
    evaluation = Evaluation(**dict(measurement) | origin, precision=evaluator.precision, answers_sha256=digest)
    key = RunKeys(job.run).evaluation(step, job.kind)
    if ddp.is_main:
        if answers is not None:
            store.delete(key)  # a job with other settings may have written it, and its answers are overwritten next
            overwrite(store, RunKeys(job.run).evaluation_items(step, job.kind), answers)
        overwrite(store, key, canonical_json(evaluation.model_dump(exclude_none=True)))
    return EvaluationSummary(job.kind, step, evaluation.metrics, key)


def _choose(job: Job, evaluator: Evaluator, sets: dict[str, tuple[list[Item], str]]) -> Measurement:
    """Score the same items in each convention. Returns accuracies with standard errors, and the answers."""
    first_items, _ = next(iter(sets.values()))
    labels = np.array([item.label for item in first_items])
    columns = {"item": np.arange(len(labels)), "label": labels}
    metrics, conventions = {}, {}
    for name, (items, convention) in sets.items():
        losses = evaluator.ending_losses(items)
        _check_finite(job, losses)
        lengths = np.array([item.lengths for item in items])
        columns |= {f"{name}_losses": losses.tolist(), f"{name}_lengths": lengths.tolist()}
        with np.errstate(divide="ignore"):  # an ending of no characters is never chosen, as in the harness
            choices = {"acc": losses.argmin(1), "acc_norm": (losses / lengths).argmin(1)}  # a tie: the first ending
        for measure, chosen in choices.items():
            metric = f"{name}_{measure}"
            metrics[metric] = float((chosen == labels).mean())
            conventions[metric] = convention
            columns[f"{metric}_choice"] = chosen
    errors = {metric: math.sqrt(share * (1 - share) / max(len(labels) - 1, 1)) for metric, share in metrics.items()}
    answers = io.BytesIO()
    pq.write_table(pa.table(columns), answers)
    return Measurement(
        metrics=metrics, standard_errors=errors, conventions=conventions, items=len(labels), answers=answers.getvalue()
    )


def _check_finite(job: Job, losses: np.ndarray) -> None:
    """Raise ValueError for a loss that is NaN or infinite: argmin would choose the ending with NaN."""
    wrong = losses[~np.isfinite(losses)]
    if wrong.size:
        problem = f"the checkpoint of step {job.recipe['step']:,} gives losses that are not finite ({wrong.flat[0]})"
        remedy = "Evaluate an earlier checkpoint: --set evaluation.checkpoint=STEP"
        raise ValueError(f"{problem}: its training diverged. {remedy}")

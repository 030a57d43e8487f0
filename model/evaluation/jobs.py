"""The evaluation jobs, one function a kind: load the checkpoint, ask, and put what was found into the store.

Metric keys carry what they depend on (`val_loss_t512`, `hellaswag_harness_acc_norm`), so that nothing is compared with
what was measured otherwise. The ranks share the work; the first one writes.
"""

import io
import math
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from model import tokenizer
from model.checkpoints.records import WEIGHTS, checkpoints
from model.checkpoints.weights import load_weights
from model.config import ModelConfig, ResourcesConfig
from model.data.loader import DataLoader
from model.evaluation.evaluator import Evaluator
from model.evaluation.hellaswag import CONVENTIONS, questions
from model.evaluation.items import Item, document_items
from model.evaluation.sampling import SamplingSettings, sample_texts
from model.gpt import GPT
from model.processes.distributed import DDPConfig
from model.runs.job import Job
from storage.datasets.manifest import read_manifest
from storage.digests import canonical_json, sha256
from storage.errors import ObjectMissing
from storage.keys import RunKeys
from storage.stores.store import Store, overwrite

SAY_SECONDS = 5.0
Found = dict[str, Any]


def evaluate(store: Store, job: Job, ddp: DDPConfig) -> Found:
    """Do an evaluation job as this rank. Returns its result: name, step, metrics and the key of all that was found."""
    step = job.recipe["step"]
    key = RunKeys(job.run).evaluation(step, job.kind)
    evaluator = Evaluator(_model(store, job).to(ddp.device), ddp, job.recipe.get("precision", "fp32"))
    if ddp.is_main:
        evaluator.progress = partial(_say, job.kind, [time.monotonic()])
    found = KINDS[job.kind](store, job, evaluator)
    answers: bytes | None = found.pop("answers", None)
    if ddp.is_main:
        about = {"name": job.kind, "step": step, "job": job.job_id, "environment": ddp.environment}
        if answers is not None:
            store.delete(key)  # of a job with other settings it may be, whose answers are overwritten now
            overwrite(store, RunKeys(job.run).evaluation_items(step, job.kind), answers)
            about["answers_sha256"] = sha256(answers)
        overwrite(store, key, canonical_json(about | {"precision": evaluator.precision} | found))
    return {"name": job.kind, "step": step, "metrics": found["metrics"], "key": key}


def val_loss(store: Store, job: Job, evaluator: Evaluator) -> Found:
    """Mean loss of the val split or of a seeded part of it, its perplexity, and bits per byte of its text."""
    recipe = job.recipe
    manifest = read_manifest(store, recipe["dataset"], recipe["manifest"])
    loader = DataLoader(store, recipe["dataset"], manifest, "val", sequence_tokens=recipe["sequence_tokens"], seed=0,
                        cache_bytes=_cache_bytes(job))  # fmt: skip
    found = evaluator.val_loss(loader, recipe["validation_tokens"])
    with np.errstate(over="ignore"):
        perplexity = np.exp(found["loss"])
    _check_finite(job, np.array(perplexity))
    whole = manifest.totals["val"]
    part = f"_of_{found['tokens']}" if found["left_out_tokens"] else ""
    ending = f"t{recipe['sequence_tokens']}{part}"
    # Every token of the split is taken to cost as much as those scored, <|endoftext|> among them
    bits = found["loss"] / math.log(2) * whole["tokens"] / whole["text_bytes"]
    metrics = {"val_loss": found["loss"], "perplexity": float(perplexity), "bits_per_byte": bits}
    convention = f"token-weighted mean over windows of {recipe['sequence_tokens']} tokens of the val split"
    return {
        "metrics": {f"{name}_{ending}": value for name, value in metrics.items()},
        "conventions": {f"{name}_{ending}": convention for name in metrics},
        "data": recipe["manifest"],
        "dataset": recipe["dataset"],
        "tokens": found["tokens"],
        "unused_tokens": found["unused_tokens"],
    }


def completion(store: Store, job: Job, evaluator: Evaluator) -> Found:
    """Accuracy on the set made of val documents."""
    recipe = job.recipe
    manifest = read_manifest(store, recipe["dataset"], recipe["manifest"])
    items = document_items(
        store, recipe["dataset"], manifest, recipe["completion_items"], recipe["seed"], _cache_bytes(job)
    )
    how = "val documents, three endings of others, acc by the sum, acc_norm by the mean a token"
    return _choose(job, evaluator, {"completion": (items, how)}) | {
        "data": recipe["manifest"],
        "dataset": recipe["dataset"],
    }


def _cache_bytes(job: Job) -> int:
    return ResourcesConfig.model_validate(job.how.get("resources", {})).cache_bytes


def hellaswag(store: Store, job: Job, evaluator: Evaluator) -> Found:
    """Accuracy on a file of HellaSwag items, in both conventions."""
    key = job.recipe["items"]
    asked = questions(store.read(key).body, key)
    items = {f"hellaswag_{name}": ([style(one) for one in asked], how) for name, (style, how) in CONVENTIONS.items()}
    repeated = sum(count - 1 for count in Counter((one.ctx, one.endings) for one in asked).values())
    return _choose(job, evaluator, items) | {"data": key.split("/")[1], "file": key, "repeated_items": repeated}


def samples(_store: Store, job: Job, evaluator: Evaluator) -> Found:
    """What the model writes after each prompt."""
    recipe, ddp = job.recipe, evaluator.ddp
    drawing = SamplingSettings(recipe["temperature"], recipe["top_k"], recipe["top_p"])
    seeds = [recipe["seed"] + index for index in range(recipe["samples"])]
    written = []
    for number, prompt in enumerate(recipe["prompts"], 1):
        ids_NT = torch.zeros(len(seeds), recipe["sample_tokens"], dtype=torch.int64)  # id + 1; 0: none
        mine = range(ddp.rank, len(seeds), ddp.ranks)
        texts = sample_texts(evaluator.model, prompt, recipe["sample_tokens"], drawing, [seeds[row] for row in mine])
        for row, ids in zip(mine, texts, strict=True):
            ids_NT[row, : len(ids)] = torch.tensor(ids, dtype=torch.int64) + 1
        for ids in ddp.sum(ids_NT.to(ddp.device)).tolist():
            written.append({"prompt": prompt, "text": tokenizer.decode([one - 1 for one in ids if one])})
        evaluator.progress(number, len(recipe["prompts"]))
    how = f"temperature {drawing.temperature}, top k {drawing.top_k}, top p {drawing.top_p}, seed {recipe['seed']}"
    return {"metrics": {}, "conventions": {}, "drawn": how, "samples": written, "precision": "fp32"}


KINDS: dict[str, Callable[[Store, Job, Evaluator], Found]] = {
    "val_loss": val_loss,
    "completion": completion,
    "hellaswag": hellaswag,
    "samples": samples,
}


def _choose(job: Job, evaluator: Evaluator, sets: dict[str, tuple[list[Item], str]]) -> Found:
    """Score every item in each convention. Returns accuracies, their standard errors, and every answer as parquet."""
    columns: dict[str, Any] = {}
    metrics, errors, conventions = {}, {}, {}
    for name, (items, how) in sets.items():
        labels = np.array([item.label for item in items])
        losses = evaluator.ending_losses(items)
        _check_finite(job, losses)
        lengths = np.array([item.lengths for item in items])
        with np.errstate(divide="ignore"):  # an ending of no character is never chosen, as in the harness
            choices = {"acc": losses.argmin(1), "acc_norm": (losses / lengths).argmin(1)}  # the first of equals
        columns |= {"item": np.arange(len(items)), "label": labels, f"{name}_losses": losses.tolist()}
        columns |= {f"{name}_lengths": lengths.tolist()}
        for metric, chosen in choices.items():
            columns[f"{name}_{metric}_choice"] = chosen
            share = metrics[f"{name}_{metric}"] = float((chosen == labels).mean())
            errors[f"{name}_{metric}"] = math.sqrt(share * (1 - share) / max(len(items) - 1, 1))
            conventions[f"{name}_{metric}"] = how
    body = io.BytesIO()
    pq.write_table(pa.table(columns), body)
    found = {"metrics": metrics, "standard_errors": errors, "conventions": conventions, "items": len(items)}
    return found | {"answers": body.getvalue()}


def _check_finite(job: Job, losses: np.ndarray) -> None:
    """Raise ValueError for weights that say nothing: the least of losses that are no numbers is the first one."""
    wrong = losses[~np.isfinite(losses)]
    if wrong.size:
        raise ValueError(
            f"{job.kind} of step {job.recipe['step']:,}: finite losses were expected, found {wrong.flat[0]}: the "
            f"training has diverged. Evaluate a checkpoint before: --set evaluation.checkpoint=STEP"
        )


def _say(kind: str, said: list[float], done: int, total: int) -> None:
    if time.monotonic() - said[0] > SAY_SECONDS:
        said[0] = time.monotonic()
        print(f"{kind}: {done:,} of {total:,} scored", flush=True)


def _model(store: Store, job: Job) -> GPT:
    step, weights = job.recipe["step"], job.recipe["weights"]
    for record in checkpoints(store, job.run):
        if record.step == step and record.files[WEIGHTS]["sha256"] == weights:
            model = GPT(ModelConfig.model_validate(job.recipe["model"]))
            load_weights(store, job.run, record, model)
            return model
    raise ObjectMissing(
        f"run {job.run!r}: the checkpoint of step {step:,} with weights {weights[:12]} was to be evaluated, it is not "
        f"there any more. Ask again, and what is kept now is evaluated: gpt2 evaluate"
    )

"""The evaluation jobs, one function a kind: load the checkpoint, ask, and put what was found into the store.

Metric keys carry what they depend on (`val_loss_t512`, `hellaswag_completion_acc_norm`), so that nothing is compared
with what was measured otherwise.
"""

import io
import math
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from model import tokenizer
from model.checkpoint import load_weights
from model.completion import Item, document_items, hellaswag_items
from model.config import ModelConfig
from model.distributed import DDPConfig
from model.evaluation import Evaluator
from model.gpt import GPT
from model.history import checkpoints
from model.job import Job
from model.loader import DataLoader
from model.sampling import Drawing, sample
from storage import keys
from storage.canonical import canonical_json
from storage.errors import ObjectMissing
from storage.manifest import read_manifest
from storage.store import Store, overwrite


def evaluate(store: Store, job: Job, ddp: DDPConfig) -> dict[str, Any]:
    """Do an evaluation job. Returns its result: the name, the metrics and the key of all that was found."""
    model = _model(store, job).to(ddp.device)
    found = KINDS[job.kind](store, job, Evaluator(model, ddp))
    step = job.recipe["step"]
    key = keys.evaluation(job.run, step, job.kind)
    overwrite(store, key, canonical_json({"name": job.kind, "step": step} | found))
    return {"name": job.kind, "metrics": found["metrics"], "key": key}


def val_loss(store: Store, job: Job, evaluator: Evaluator) -> dict[str, Any]:
    """Mean loss of the val split, its perplexity, and how much of the split was scored."""
    recipe = job.recipe
    manifest = read_manifest(store, recipe["dataset"], recipe["manifest"])
    loader = DataLoader(store, recipe["dataset"], manifest, "val", sequence_tokens=recipe["sequence_tokens"], seed=0)
    found = evaluator.val_loss(loader, recipe["validation_tokens"])
    name = f"val_loss_t{recipe['sequence_tokens']}"
    return {
        "metrics": {name: found["loss"], f"perplexity_t{recipe['sequence_tokens']}": math.exp(found["loss"])},
        "convention": f"token-weighted mean over windows of {recipe['sequence_tokens']} tokens of the val split",
        "data": recipe["manifest"],
        "tokens": found["tokens"],
        "unused_tokens": found["unused_tokens"],
    }


def completion(store: Store, job: Job, evaluator: Evaluator) -> dict[str, Any]:
    """Accuracy on the set made of val documents."""
    recipe = job.recipe
    manifest = read_manifest(store, recipe["dataset"], recipe["manifest"])
    items = document_items(store, recipe["dataset"], manifest, recipe["completion_items"], recipe["seed"])
    found = _choose(store, job, evaluator, items, "completion")
    return found | {"data": recipe["manifest"]}


def hellaswag(store: Store, job: Job, evaluator: Evaluator) -> dict[str, Any]:
    """Accuracy on a file of HellaSwag items, completion convention."""
    key = job.recipe["items"]
    items = hellaswag_items(store.read(key).body, key)
    found = _choose(store, job, evaluator, items, "hellaswag_completion")
    return found | {"data": key.split("/")[1]}


def samples(_store: Store, job: Job, evaluator: Evaluator) -> dict[str, Any]:
    """What the model writes after each prompt."""
    recipe = job.recipe
    drawing = Drawing(recipe["temperature"], recipe["top_k"], recipe["top_p"])
    written = []
    for prompt in recipe["prompts"]:
        for index in range(recipe["samples"]):
            ids = list(sample(evaluator.model, prompt, recipe["sample_tokens"], drawing, recipe["seed"] + index))
            written.append({"prompt": prompt, "text": tokenizer.decode(ids)})
    convention = (
        f"temperature {drawing.temperature}, top k {drawing.top_k}, top p {drawing.top_p}, seed {recipe['seed']}"
    )
    return {"metrics": {}, "convention": convention, "data": recipe["manifest"], "samples": written}


KINDS: dict[str, Callable[[Store, Job, Evaluator], dict[str, Any]]] = {
    "val_loss": val_loss,
    "completion": completion,
    "hellaswag": hellaswag,
    "samples": samples,
}


def _choose(store: Store, job: Job, evaluator: Evaluator, items: list[Item], prefix: str) -> dict[str, Any]:
    """Score every item, keep each answer as a row, and return the accuracies."""
    rows = []
    for number, item in enumerate(items):
        losses = evaluator.ending_losses(item)
        sums = [loss for loss, _ in losses]
        means = [loss / tokens for loss, tokens in losses]
        rows.append(
            {
                "item": number,
                "label": item.label,
                "choice": sums.index(min(sums)),  # the first of equals
                "choice_norm": means.index(min(means)),
                "losses": sums,
                "tokens": [tokens for _, tokens in losses],
            }
        )
    body = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), body)
    overwrite(store, keys.evaluation_items(job.run, job.recipe["step"], job.kind), body.getvalue())
    right = sum(row["choice"] == row["label"] for row in rows)
    right_norm = sum(row["choice_norm"] == row["label"] for row in rows)
    return {
        "metrics": {f"{prefix}_acc": right / len(rows), f"{prefix}_acc_norm": right_norm / len(rows)},
        "convention": "completion style: raw context, ending tokenised apart, acc by sum, acc_norm by mean a token",
        "items": len(rows),
    }


def _model(store: Store, job: Job) -> GPT:
    step = job.recipe["step"]
    for record in checkpoints(store, job.run):
        if record.step == step:
            model = GPT(ModelConfig.model_validate(job.recipe["model"]))
            load_weights(store, job.run, record, model)
            return model
    raise ObjectMissing(f"run {job.run!r} has no checkpoint of step {step:,}. Train it first: gpt2 train")

"""What there is to tell about a run, from the store alone: training, evaluations, samples, lineage. Draws nothing."""

from dataclasses import dataclass
from typing import Any

from flows.pages.dataset_card import leak_line
from model.checkpoints.records import CheckpointRecord, checkpoints, read_metrics
from model.runs.job import read_result
from model.runs.run import Run, find_run, training_job
from storage.datasets.manifest import read_manifest
from storage.errors import ObjectMissing
from storage.keys import DatasetKeys, RunKeys
from storage.stores.store import Store, read_json

Facts = dict[str, Any]


@dataclass(frozen=True)
class Reference:
    """A published number, beside which the same metric of a run is shown, and no other one."""

    metric: str
    value: float
    what: str
    source: str = ""  # of the dataset, where the metric is about its val split


# OpenAI's GPT-2 124M, as karpathy/build-nanogpt measured it (hellaswag.py, play.ipynb) or quotes it of the harness
REFERENCES = (
    Reference("val_loss_t1024", 3.2924, "GPT-2 124M, first shard of FineWeb-Edu", "HuggingFaceFW/fineweb-edu"),
    Reference("hellaswag_completion_acc", 0.2859, "GPT-2 124M, completion style, 10,042 items"),
    Reference("hellaswag_completion_acc_norm", 0.2955, "GPT-2 124M, completion style, 10,042 items"),
    Reference("hellaswag_harness_acc", 0.2892, "GPT-2 124M, harness style, 10,042 items"),
    Reference("hellaswag_harness_acc_norm", 0.3114, "GPT-2 124M, harness style, 10,042 items"),
)


def run_facts(store: Store, name: str) -> Facts:
    """All that a report shows of a run. Raises ObjectMissing when there is neither a run nor a model of that name."""
    kept = checkpoints(store, name)
    run = find_run(store, name)
    if run is None and not kept:
        raise ObjectMissing(f"run {name!r}: a report was asked for, store {store.url!r} has no such run. gpt2 status")
    metrics = read_metrics(store, name)
    losses = [line["loss"] for line in metrics if line["loss"] is not None]  # a skipped step's may be no number
    evaluations = read_evaluations(store, name)
    config = run.config if run else {"model": kept[-1].model}
    dataset = _dataset(store, run, evaluations)
    return {
        "name": name,
        "code_version": run.code_version if run else None,
        "config": config,
        "dataset": dataset,
        "metrics": metrics,
        "training": {
            "steps": kept[-1].step if kept else 0,
            "max_steps": config["train"]["max_steps"] if run else 0,
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
        },
        "evaluations": [one for one in evaluations if one["metrics"]],
        "samples": [
            {"step": one["step"], "how": one["drawn"], "texts": one["samples"]}
            for one in reversed(evaluations)
            if "samples" in one
        ],
        "references": references(evaluations, dataset),
        "lineage": _lineage(run, kept, dataset, evaluations),
        "environment": _environment(store, run, evaluations),
    }


def read_evaluations(store: Store, run: str) -> list[Facts]:
    """The evaluations of a run that are there, by step and name."""
    listed = sorted(one.key for one in store.list(RunKeys(run).evaluations) if one.key.endswith(".json"))
    found = (read_json(store, key) for key in listed)  # one that is being made again may have gone meanwhile
    return [one for one in found if one is not None and "job" in one]


def newest(evaluations: list[Facts]) -> list[Facts]:
    """Those of the last step that each kind was asked about."""
    return list({one["name"]: one for one in evaluations}.values())


def references(evaluations: list[Facts], dataset: Facts | None) -> dict[str, Reference]:
    """The published numbers that are of the same metrics as the run's own."""
    own = {metric for one in evaluations for metric in one["metrics"]}
    source = dataset["source"] if dataset else ""
    return {one.metric: one for one in REFERENCES if one.metric in own and one.source in ("", source)}


def _dataset(store: Store, run: Run | None, evaluations: list[Facts]) -> Facts | None:
    """The version that the run is pinned to; of an imported model the last one that it was asked about."""
    asked = [(one["dataset"], one["data"]) for one in evaluations if "dataset" in one]
    if run is None and not asked:
        return None
    name, digest = (run.dataset, run.manifest) if run else asked[-1]
    manifest = read_manifest(store, name, digest)
    return {
        "name": name,
        "manifest": digest,
        "parent": manifest.parent,
        "source": run.config["data"]["source"] if run else manifest.source.get("dataset", ""),
        "origin": {name: value for name, value in manifest.source.items() if name != "files"},
        "totals": manifest.totals,
        "shards": len(manifest.shard_ids),
        "tokens": sum(sums["tokens"] for sums in manifest.totals.values()),
        "tokenizer": manifest.tokenizer,
        "leaks": leak_line(read_json(store, DatasetKeys(name).leaks(digest))),
    }


def _lineage(
    run: Run | None, kept: list[CheckpointRecord], dataset: Facts | None, evaluations: list[Facts]
) -> list[tuple[str, str]]:
    """What each thing was made of, from the source to the numbers, each by its digest."""
    lines = []
    if dataset:
        lines += [(f"source {name}", str(value)) for name, value in dataset["origin"].items()]
        lines += [(f"manifest of {dataset['name']}", dataset["manifest"])]
        lines += [("follows manifest", dataset["parent"])] if dataset["parent"] else []
    if run and run.start:
        lines.append(("began with", f"step {run.start['step']:,} of run {run.start['run']}"))
    if run:
        lines.append(("training job", training_job(run).job_id))
    lines += [(f"weights of step {one.step:,}", one.files["model.safetensors"]["sha256"]) for one in kept]
    lines += [
        (f"{one['name']} of step {one['step']:,}", f"{one['job']}, data {one.get('data', 'none')}")
        for one in evaluations
    ]
    return lines


def _environment(store: Store, run: Run | None, evaluations: list[Facts]) -> list[tuple[str, str]]:
    """Where it was trained, once the training is done, and where it was evaluated."""
    found: dict[str, list[str]] = {}
    trained = read_result(store, training_job(run)) if run else None
    if trained and "environment" in trained:
        found.setdefault(_words(trained["environment"]), []).append("training")
    for one in newest(evaluations):
        found.setdefault(f"{_words(one['environment'])}, {one['precision']}", []).append(one["name"])
    return [(", ".join(names), words) for words, names in found.items()]


def _words(environment: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in environment.items())

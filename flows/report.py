"""The last stage: one page for people about a run, made from what the store holds. Computes no metric."""

import json
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows.evaluate import Evaluated
from flows.pages import LINE, MARK, draw, render
from flows.progress import say
from flows.train import Trained
from model.config import RunConfig
from model.history import checkpoints, read_metrics
from model.run import Run, read_run
from storage import keys
from storage.layout import open_store
from storage.manifest import Manifest, read_manifest
from storage.store import Store, overwrite


@task(task_run_name="report-{run_name}", cache_policy=NO_CACHE)
def write_report(run_name: str, store_url: str) -> dict[str, Any]:
    """Write report.html and report.md of a run. Returns the facts they show."""
    store = open_store(store_url)
    run = read_run(store, run_name)
    facts = run_facts(store, run)
    curves = {
        "Loss": curve(facts["metrics"], "loss", "nats a token", "val_loss"),
        "Learning rate": curve(facts["metrics"], "learning_rate", "", None),
        "Speed": curve(facts["metrics"], "tokens_per_second", "tokens a second", None),
    }
    overwrite(store, keys.report(run_name, "html"), render("report.html", facts | {"curves": curves}))
    text = markdown(facts)
    overwrite(store, keys.report(run_name, "md"), text.encode())
    create_markdown_artifact(text, key="report", description=f"Report of {run_name}")
    return {name: facts[name] for name in ("name", "dataset", "training", "evaluations", "samples")} | {
        "report": keys.report(run_name, "html")
    }


@flow(name="report", flow_run_name="report-{config.name}", validate_parameters=False)
def report(config: RunConfig, after: Evaluated | Trained | None = None) -> dict[str, Any]:  # noqa: ARG001  # what it waits for
    """Write the run's report with whatever is there."""
    facts = write_report(config.name, config.store_url)
    say("report", f"written to {config.store_url.rstrip('/')}/{facts['report']}")
    return facts


def run_facts(store: Store, run: Run) -> dict[str, Any]:
    """All that a report shows, from the store alone."""
    manifest = read_manifest(store, run.dataset, run.manifest)
    metrics = read_metrics(store, run.name)
    losses = [line["loss"] for line in metrics if line["loss"] is not None]  # a skipped step's may be no number
    kept = checkpoints(store, run.name)
    found = read_evaluations(store, run.name, kept[-1].step) if kept else []
    return {
        "name": run.name,
        "code_version": run.code_version,
        "config": run.config,
        "dataset": _dataset_card(run, manifest),
        "metrics": metrics,
        "training": {
            "steps": kept[-1].step if kept else 0,
            "max_steps": run.config["train"]["max_steps"],
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
        },
        "evaluations": [evaluation for evaluation in found if evaluation["metrics"]],
        "samples": [written for evaluation in found for written in evaluation.get("samples", [])],
    }


def read_evaluations(store: Store, run: str, step: int) -> list[dict[str, Any]]:
    """The evaluations of one checkpoint that are there, sorted by name."""
    prefix = keys.evaluations(run, step)
    return [
        json.loads(store.read(listed.key).body) for listed in sorted(store.list(prefix)) if listed.key.endswith(".json")
    ]


def curve(metrics: list[dict[str, Any]], name: str, unit: str, points: str | None) -> str:
    """One number over the steps as an inline SVG, with the values of `points` marked where a step has them."""

    def plot(axes: Any) -> None:
        axes.plot(
            [line["step"] + 1 for line in metrics if line[name] is not None],
            [line[name] for line in metrics if line[name] is not None],
            color=LINE,
            linewidth=1.6,
            label="train",
        )
        marked = [line for line in metrics if points and points in line]
        if marked and points:
            places, heights = [line["step"] + 1 for line in marked], [line[points] for line in marked]
            axes.plot(places, heights, "o", color=MARK, markersize=5, label="val")
            axes.legend(frameon=False)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)

    return draw(name, plot)


def markdown(facts: dict[str, Any]) -> str:
    """The report as Markdown."""
    data, training = facts["dataset"], facts["training"]
    lines = [f"# Run {facts['name']}", ""]
    lines += [f"Dataset {data['name']}, manifest `{data['manifest']}`", ""]
    lines += ["| split | shards | documents | tokens |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| {split} | {sums['shards']:,} | {sums['documents']:,} | {sums['tokens']:,} |"
        for split, sums in data["totals"].items()
    ]
    lines += ["", f"{training['steps']:,} of {training['max_steps']:,} steps"]
    if training["last_loss"] is not None:
        lines[-1] += f", training loss {training['first_loss']:.4f} → {training['last_loss']:.4f}"
    lines += ["", "| metric | value | convention |", "| --- | ---: | --- |"]
    for evaluation in facts["evaluations"]:
        lines += [
            f"| {name} | {value:.4f} | {evaluation['convention']} |" for name, value in evaluation["metrics"].items()
        ]
    for written in facts["samples"]:
        quoted = (written["prompt"] + written["text"]).replace("\n", "\n> ")
        lines += ["", f"> {quoted}"]
    return "\n".join(lines) + "\n"


def _dataset_card(run: Run, manifest: Manifest) -> dict[str, Any]:
    return {
        "name": run.dataset,
        "manifest": manifest.digest,
        "source": run.config["data"]["source"],
        "totals": manifest.totals,
        "shards": len(manifest.shard_ids),
        "tokens": sum(sums["tokens"] for sums in manifest.totals.values()),
        "tokenizer": manifest.tokenizer,
    }

"""The last stage: pages for people about a run, or several side by side. Computes no metric, reads what is there."""

from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from flows.handoffs import Evaluated, Trained
from flows.inspection.facts import Facts, newest, run_facts
from flows.pages.curves import curves
from flows.pages.drawing import render
from flows.runtime.artifacts import Picture, show
from flows.runtime.progress import say
from model.config import RunConfig, differences
from storage.keys import RunKeys
from storage.stores.opening import open_store
from storage.stores.store import Store, overwrite


@task(task_run_name="report-{run_name}", cache_policy=NO_CACHE)
def write_report(run_name: str, store_url: str) -> dict[str, Any]:
    """Write report.html and report.md of a run, and show the same in Prefect's UI. Returns the facts they show."""
    facts, plots = keep_report(open_store(store_url), run_name)
    show(create_markdown_artifact, markdown=markdown([facts]), key="report", description=f"Report of {run_name}")
    for title, svg in plots.items():
        key = title.lower().replace(" ", "-").replace("_", "-")
        Picture(f"plot-{key}", f"{title}, {run_name}").show(svg)
    shown = {name: facts[name] for name in ("name", "dataset", "training")}
    return shown | {"samples": facts["samples"][:1], "report": RunKeys(run_name).report("html")}


@flow(name="report", flow_run_name="report-{config.name}", validate_parameters=False)
def report(config: RunConfig, after: Evaluated | Trained | None = None) -> dict[str, Any]:  # what it waits for
    """Write the run's report with whatever is there. Returns facts of it, and what the evaluations before answered."""
    facts = write_report(config.name, config.store_url)
    say("report", f"written to {config.store_url.rstrip('/')}/{facts['report']}")
    return facts | {"evaluations": after.results if isinstance(after, Evaluated) else []}


def keep_report(store: Store, run: str) -> tuple[Facts, dict[str, str]]:
    """Put the run's two pages into the store. Returns the facts and the plots that they show."""
    facts = run_facts(store, run)
    plots = curves([facts])
    overwrite(store, RunKeys(run).report("html"), page([facts], plots))
    overwrite(store, RunKeys(run).report("md"), markdown([facts]).encode())
    return facts, plots


def page(runs: list[Facts], plots: dict[str, str]) -> bytes:
    """One HTML page about these runs, with plots of them."""
    return render(
        "report.html", {"runs": runs, "curves": plots, "rows": metric_rows(runs), "differing": differing(runs)}
    )


def metric_rows(runs: list[Facts]) -> list[dict[str, Any]]:
    """A row a metric: each run's newest value with its step and standard error, the published one, the convention."""
    rows: dict[str, dict[str, Any]] = {}
    for place, run in enumerate(runs):
        for one in newest(run["evaluations"]):
            for metric, value in one["metrics"].items():
                row = rows.setdefault(
                    metric, {"metric": metric, "values": [""] * len(runs), "published": "", "scored": []}
                )
                error = one.get("standard_errors", {}).get(metric)
                row["values"][place] = f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")
                row["scored"].append((f"{run['name']}: " if len(runs) > 1 else "") + _scored(one))
                row["convention"] = "; ".join([one["conventions"][metric], *row["scored"]])
                if published := run["references"].get(metric):
                    row["published"] = f"{published.value:.4f} ({published.what})"
    return list(rows.values())


def _scored(one: Facts) -> str:
    repeated = f", {one['repeated_items']} of them repeated" if one.get("repeated_items") else ""
    scored = f"{one['items']:,} items{repeated}" if "items" in one else f"{one['tokens']:,} tokens"
    return f"{scored}, data {one['data'][:12]}, step {one['step']:,}, {one['precision']}"


def differing(runs: list[Facts]) -> list[str]:
    """The settings in which the runs differ from the first one, in words."""
    first = runs[0]["config"]
    return [
        f"{run['name']}: {line}"
        for run in runs[1:]
        for section in sorted(run["config"].keys() & first.keys() - {"evaluation"})  # each evaluation says what it was
        for line in differences(first[section], run["config"][section], f"{section}.")
    ]


def markdown(runs: list[Facts]) -> str:
    """The same as Markdown, without the plots."""
    lines = []
    for run in runs:
        data, training = run["dataset"], run["training"]
        lines += [f"# Run {run['name']}", ""]
        if training["max_steps"]:
            lines += [f"{training['steps']:,} of {training['max_steps']:,} steps"]
            if training["last_loss"] is not None:
                lines[-1] += f", training loss {training['first_loss']:.4f} → {training['last_loss']:.4f}"
        else:
            lines += ["A model that was imported"]
        if data:
            lines += ["", f"Dataset {data['name']}, manifest `{data['manifest']}`; leaks: {data['leaks']}", ""]
            lines += ["| split | shards | documents | tokens |", "| --- | ---: | ---: | ---: |"]
            lines += [
                f"| {split} | {sums['shards']:,} | {sums['documents']:,} | {sums['tokens']:,} |"
                for split, sums in data["totals"].items()
            ]
        lines.append("")
    names = " | ".join(run["name"] for run in runs)
    lines += [
        "## Evaluations",
        "",
        f"| metric | {names} | published | convention |",
        f"| --- |{' ---: |' * len(runs)} --- | --- |",
    ]
    lines += [
        f"| {row['metric']} | {' | '.join(row['values'])} | {row['published']} | {row['convention']} |"
        for row in metric_rows(runs)
    ]
    if lines_of := differing(runs):
        lines += ["", "## Settings that differ", "", *(f"- {line}" for line in lines_of)]
    for run in runs:
        for drawn in run["samples"]:
            lines += ["", f"## Samples of {run['name']}, step {drawn['step']:,}", "", drawn["how"]]
            for text in drawn["texts"]:
                quoted = (text["prompt"] + text["text"]).replace("\n", "\n> ")
                lines += ["", f"> {quoted}"]
        for title in ("environment", "lineage"):
            lines += [
                "",
                f"## {title.capitalize()} of {run['name']}",
                "",
                *(f"- {name}: `{value}`" for name, value in run[title]),
            ]
    return "\n".join(lines) + "\n"

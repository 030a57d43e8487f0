"""The report of one run, or of several side by side, as HTML and as Markdown. Computes no metric."""

from itertools import chain
from pathlib import Path
from typing import NamedTuple

from flows.inspection.facts import RunFacts, newest, run_facts
from flows.pages.curves import curves
from flows.pages.drawing import render, write_file
from model.config import differences
from model.evaluation.items import ENDINGS
from model.evaluation.results import Evaluation
from storage.keys import RunKeys
from storage.stores.store import Store, overwrite


class MetricRow(NamedTuple):
    """One metric in the table of evaluations."""

    metric: str
    values: list[str]  # of each run, with the standard error
    published: str
    chance: str  # of an accuracy: what guessing scores
    convention: str


def write_report(store: Store, run: str) -> RunFacts:
    """Put report.html and report.md of a run into the store. Returns the facts that they show."""
    facts = run_facts(store, run)
    overwrite(store, RunKeys(run).report("html"), page([facts]))
    overwrite(store, RunKeys(run).report("md"), markdown([facts]).encode())
    return facts


def page(runs: list[RunFacts]) -> bytes:
    """One HTML page about these runs, with charts."""
    values = {"rows": metric_rows(runs), "differing": differing(runs), "file": "-".join(run.name for run in runs)}
    return render("report.html", runs=runs, charts=curves(runs), **values).encode()


def markdown(runs: list[RunFacts]) -> str:
    """The report as Markdown, without charts."""
    return render("report.md.j2", runs=runs, rows=metric_rows(runs), differing=differing(runs))


def metric_rows(runs: list[RunFacts]) -> list[MetricRow]:
    """A row for each metric of any run."""
    newest_by_run = [{metric: one for one in newest(run.evaluations) for metric in one.metrics} for run in runs]
    rows = []
    for metric in dict.fromkeys(chain.from_iterable(newest_by_run)):
        values, provenance = [], []
        convention = published = ""
        for run, evaluations in zip(runs, newest_by_run, strict=True):
            if (evaluation := evaluations.get(metric)) is None:
                values.append("")
                continue
            error = (evaluation.standard_errors or {}).get(metric)
            values.append(f"{evaluation.metrics[metric]:.4f}" + ("" if error is None else f" ± {error:.4f}"))
            provenance.append((f"{run.name}: " if len(runs) > 1 else "") + _provenance(evaluation))
            convention = evaluation.conventions[metric]
            if reference := run.references.get(metric):
                published = f"{reference.value:.4f} ({reference.label})"
        chance = f"{1 / ENDINGS:.4f}" if "_acc" in metric else ""
        rows.append(MetricRow(metric, values, published, chance, "; ".join([convention, *provenance])))
    return rows


def differing(runs: list[RunFacts]) -> list[str]:
    """The settings in which the other runs differ from the first run."""
    first = runs[0].config
    return [
        f"{run.name}: {line}"
        for run in runs[1:]
        for section in sorted(run.config.keys() & first.keys() - {"evaluation"})  # an evaluation has its own settings
        for line in differences(first[section], run.config[section], section)
    ]


def _provenance(evaluation: Evaluation) -> str:
    repeated = f", {evaluation.repeated_items} of them repeated" if evaluation.repeated_items else ""
    scored = f"{evaluation.tokens:,} tokens" if evaluation.items is None else f"{evaluation.items:,} items{repeated}"
    mixed = [f"{dataset} {share.manifest[:12]}" for dataset, share in (evaluation.mix or {}).items()]
    data = " together with ".join(mixed) or (evaluation.data or "none")[:12]
    return f"{scored}, data {data}, step {evaluation.step:,}, {evaluation.precision}"


def write_page(store: Store, names: list[str], path: Path) -> None:
    """Write one .html or .md page about these runs. Raises ValueError for a bad path, ObjectMissing for a bad name."""
    if path.suffix not in (".html", ".md"):
        raise ValueError(f"--to {path}: give a file name that ends in .html or .md.")
    runs = [run_facts(store, name) for name in dict.fromkeys(names)]
    body = markdown(runs).encode() if path.suffix == ".md" else page(runs)
    write_file(path, body, "--to")

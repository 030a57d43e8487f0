"""The facts that a report shows about a run: training, dataset, evaluations, samples, lineage. Reads the store only."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from model.checkpoints.records import WEIGHTS, CheckpointRecord, StepMetrics, checkpoints, read_metrics
from model.evaluation.results import Evaluation
from model.runs.job import Job, read_result
from model.runs.run import Run, find_run, training_job
from storage.datasets.manifest import Manifest, read_manifest
from storage.errors import ObjectCorrupt, ObjectMissing
from storage.inspection.leaks import LeakReport, read_leak_report
from storage.keys import RunKeys
from storage.loading.mix import describe
from storage.stores.store import Store, read_as


@dataclass(frozen=True)
class Reference:
    """A published value of one metric, shown only beside the same metric of a run."""

    metric: str
    value: float
    label: str
    source: str = ""  # the dataset that the value belongs to, for metrics of a val split


# OpenAI's GPT-2 124M, as karpathy/build-nanogpt measured it (hellaswag.py, play.ipynb) or quotes it for the harness
REFERENCES = (
    Reference("val_loss_t1024", 3.2924, "GPT-2 124M, first shard of FineWeb-Edu", "HuggingFaceFW/fineweb-edu"),
    Reference("hellaswag_completion_acc", 0.2859, "GPT-2 124M, completion style, 10,042 items"),
    Reference("hellaswag_completion_acc_norm", 0.2955, "GPT-2 124M, completion style, 10,042 items"),
    Reference("hellaswag_harness_acc", 0.2892, "GPT-2 124M, harness style, 10,042 items"),
    Reference("hellaswag_harness_acc_norm", 0.3114, "GPT-2 124M, harness style, 10,042 items"),
)


@dataclass(frozen=True)
class TrainingFacts:
    """Steps and losses of a training run. For an imported model `max_steps` is 0 and the losses are None."""

    steps: int
    max_steps: int
    first_loss: float | None
    last_loss: float | None
    ended_early: bool = False  # after `patience_validations` without a new best


@dataclass(frozen=True)
class DatasetFacts:
    """The dataset version of a run, the source that the run names, and its leak report in one line."""

    name: str
    version: Manifest
    source: str
    leaks: str


@dataclass(frozen=True)
class RunFacts:
    """Everything that a report shows about a run."""

    name: str
    code_version: str | None
    config: dict[str, Any]
    dataset: DatasetFacts | None
    mix: str  # the datasets of a mixed run and their shares
    metrics: list[StepMetrics]
    training: TrainingFacts
    evaluations: list[Evaluation]  # with metrics, by step
    samples: list[Evaluation]  # with samples, the newest first
    references: dict[str, Reference]  # by metric
    lineage: list[tuple[str, str]]
    environment: list[tuple[str, str]]


def run_facts(store: Store, name: str) -> RunFacts:
    """The facts of a run or of an imported model. Raises ObjectMissing for an unknown name."""
    records = checkpoints(store, name)
    run = find_run(store, name)
    if run is None and not records:
        raise ObjectMissing(f"store {store.url!r} has no run {name!r} to report on. List its runs: gpt2 status")
    metrics = read_metrics(store, name)
    losses = [line.loss for line in metrics if line.loss is not None]  # None: NaN in a skipped step
    first_loss, last_loss = (losses[0], losses[-1]) if losses else (None, None)
    steps, max_steps = records[-1].step if records else 0, run.config["train"]["max_steps"] if run else 0
    listed_keys = sorted(listed.key for listed in store.list(RunKeys(name).evaluations) if listed.key.endswith(".json"))
    stored = (read_evaluation(store, key) for key in listed_keys)
    evaluations = [evaluation for evaluation in stored if evaluation is not None]  # None: deleted, its job runs again
    dataset, trained = _dataset(store, run, evaluations), read_result(store, training_job(run)) if run else None
    return RunFacts(
        name=name,
        code_version=run.code_version if run else None,
        config=run.config if run else {"model": records[-1].model},
        dataset=dataset,
        mix=describe(run.mix) if run else "",
        metrics=metrics,
        training=TrainingFacts(steps, max_steps, first_loss, last_loss, bool(trained and trained["step"] < max_steps)),
        evaluations=[evaluation for evaluation in evaluations if evaluation.metrics],
        samples=[evaluation for evaluation in reversed(evaluations) if evaluation.samples is not None],
        references=references(evaluations, dataset),
        lineage=list(_lineage(run, records, dataset, evaluations)),
        environment=_environment(trained, evaluations),
    )


def read_evaluation(store: Store, key: str) -> Evaluation | None:
    """The evaluation at a key. Raises ObjectCorrupt."""
    return read_as(store, key, Evaluation, _is_complete, "Run gpt2 evaluate again.")


def stored_result(store: Store, job: Job) -> dict[str, Any] | None:
    """The result of a job, unless its last checkpoint or its evaluation is lost, damaged or another job's."""
    if job.kind == "train":
        result = read_result(store, job)
        is_kept = result and any(record.step == result["step"] for record in checkpoints(store, job.run))
        return result if is_kept else None
    with suppress(ObjectCorrupt):
        evaluation = read_evaluation(store, RunKeys(job.run).evaluation(job.recipe["step"], job.kind))
        return read_result(store, job) if evaluation and evaluation.job == job.job_id else None
    return None


def _is_complete(evaluation: Evaluation) -> bool:
    """Whether it has what a report shows beside each metric."""
    is_scored = evaluation.items is not None or evaluation.tokens is not None or not evaluation.metrics
    is_shown = all({"prompt", "text"} <= sample.keys() for sample in evaluation.samples or [])
    return is_shown and is_scored and evaluation.metrics.keys() <= evaluation.conventions.keys()


def newest(evaluations: list[Evaluation]) -> list[Evaluation]:
    """The evaluation of the last step for each kind."""
    return list({evaluation.name: evaluation for evaluation in evaluations}.values())


def references(evaluations: list[Evaluation], dataset: DatasetFacts | None) -> dict[str, Reference]:
    """The published values of the run's metrics, by metric. A value of a val split needs the same source."""
    metrics = {metric for evaluation in evaluations for metric in evaluation.metrics}
    sources = ("", dataset.source if dataset else "")
    return {known.metric: known for known in REFERENCES if known.metric in metrics and known.source in sources}


def leak_line(report: LeakReport | None) -> str:
    """The result of a leak report in one line."""
    if report is None:
        return "not checked yet: gpt2 dataset audit"
    documents, duplicates, items = report.documents, report.duplicates, report.items
    line = f"{duplicates['val_in_train']:,} of {documents['val']:,} val documents are also in train, "
    line += f"{duplicates['train']:,} of {documents['train']:,} train documents repeat an earlier one"
    if items is not None:
        words = items.ngram_words
        line += f"; of {items.count:,} HellaSwag items, {items.contexts:,} share {words} consecutive words of their "
        line += f"context with train, {items.endings:,} share {words} that reach into an ending "
        line += f"({items.shorter:,} contexts have fewer than {words} words)"
    return line


def _dataset(store: Store, run: Run | None, evaluations: list[Evaluation]) -> DatasetFacts | None:
    """The version that the run is pinned to, or that an imported model was last evaluated on."""
    versions = [(run.dataset, run.manifest)] if run else [(one.dataset, one.data) for one in reversed(evaluations)]
    for name, digest in versions:
        if name and digest:  # not of an evaluation on a file, as HellaSwag
            version = read_manifest(store, name, digest)
            source = run.config["data"]["source"] if run else version.origin.get("dataset", "")
            return DatasetFacts(name, version, source, leak_line(read_leak_report(store, name, digest)))
    return None


def _lineage(
    run: Run | None, records: list[CheckpointRecord], dataset: DatasetFacts | None, evaluations: list[Evaluation]
) -> Iterator[tuple[str, str]]:
    if dataset:
        yield from ((f"source {field}", str(value)) for field, value in dataset.version.origin.items())
        yield f"manifest of {dataset.name}", dataset.version.digest
        if dataset.version.parent:
            yield "follows manifest", dataset.version.parent
    if run:
        for name, share in run.mix.items():
            yield f"mixed in: {name}", f"weight {share.weight}, manifest {share.manifest}"
        if run.start:
            yield "began with", f"step {run.start.step:,} of run {run.start.run}"
        yield "training job", training_job(run).job_id
    yield from ((f"weights of step {record.step:,}", record.files[WEIGHTS].sha256) for record in records)
    yield from ((f"{one.name} of step {one.step:,}", f"{one.job}, data {one.data or 'none'}") for one in evaluations)


def _environment(trained: dict[str, Any] | None, evaluations: list[Evaluation]) -> list[tuple[str, str]]:
    names_by_machine: dict[str, list[str]] = defaultdict(list)
    if trained:
        names_by_machine[_machine(trained["environment"])].append("training")
    for one in newest(evaluations):
        names_by_machine[f"{_machine(one.environment)}, {one.precision}"].append(one.name)
    return [(", ".join(names), machine) for machine, names in names_by_machine.items()]


def _machine(environment: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in environment.items())

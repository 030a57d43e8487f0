"""What is done, what is missing and what failed, read from the store alone, without Prefect."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from model.checkpoints.records import checkpoints
from model.runs.job import read_job, read_result
from model.runs.run import Run, find_run, training_job
from storage import keys
from storage.datasets import records
from storage.datasets.manifest import latest_manifest, read_manifest
from storage.errors import ObjectMissing, StorageError, StoreUnavailable
from storage.keys import RunKeys
from storage.loading.mix import describe
from storage.stores.store import Store, read_as

Evaluation = tuple[str, int]  # kind, step
EVALUATION = re.compile(r"([0-9]{6,18})/([^/]+)\.json")


class Line(NamedTuple):
    """One part of a run or dataset, its state, and the error of its last attempt if it failed."""

    what: str
    state: str
    error: str = ""
    damaged: bool = False


def store_status(store: Store) -> list[Line]:
    """The status of every run, then of every dataset. A damaged object costs only its own run or dataset the status."""
    lines = []
    for kind, names, status in (("run", run_names, run_status), ("dataset", dataset_names, dataset_status)):
        for name in names(store):
            try:
                lines += status(store, name)
            except StoreUnavailable:
                raise
            except (ValueError, StorageError) as error:
                lines.append(Line(f"{kind} {name}", "damaged", str(error), damaged=True))
    return lines


def run_names(store: Store, *, requested: bool = False) -> list[str]:
    """The runs that were started in this store, or only `requested`, and the models that were imported into it."""
    names = set()
    for listed in store.list(keys.RUNS):
        name = listed.key.removeprefix(keys.RUNS).split("/")[0]
        run = RunKeys(name)
        if listed.key in (run.config, requested and run.request) or listed.key.startswith(run.checkpoints):
            names.add(name)
    return sorted(names)


def dataset_names(store: Store) -> list[str]:
    """The datasets with at least one object in the store."""
    return sorted({listed.key.removeprefix(keys.DATASETS).split("/")[0] for listed in store.list(keys.DATASETS)})


def dataset_status(store: Store, dataset: str) -> list[Line]:
    """The dataset's newest version, and its failed shard jobs."""
    manifest = latest_manifest(store, dataset)
    failures = records.failures(store, dataset)
    state = "not sealed yet; continue with gpt2 dataset build"
    if manifest is not None:
        finished = records.finished_shards(store, dataset, manifest.shard_ids, manifest.rows_by_id)
        state = f"{len(finished):,} of {len(manifest.shard_ids):,} shards done, {manifest.tokens:,} tokens"
        state += f", manifest {manifest.digest[:12]}"
        failures = {shard_id: error for shard_id, error in failures.items() if shard_id not in finished}
    failed = [Line(f"  shard {shard_id}", "failed", error) for shard_id, error in failures.items()]
    return [Line(f"dataset {dataset}", state), *failed]


def run_status(store: Store, name: str) -> list[Line]:
    """Every part of a run: its dataset, training, evaluations and report. Raises ObjectMissing for an unknown run."""
    known_names = run_names(store)
    if name not in known_names:
        runs = ", ".join(known_names) or "none"
        raise ObjectMissing(f"store {store.url!r} has no run {name!r}; its runs: {runs}. Use one, or another store.")
    kept = checkpoints(store, name)
    step = kept[-1].step if kept else 0
    lines, kinds = [Line(f"run {name}", "an imported model")], ["samples"]
    if run := find_run(store, name):
        lines = list(_training_status(store, run, step))
        key = RunKeys(name).request
        request = read_as(store, key, dict[str, Any], lambda value: isinstance(value.get("evaluation"), dict))
        evaluation = (request or run.config)["evaluation"]
        kinds = ["val_loss", "hellaswag" if evaluation.get("hellaswag") else "completion", "samples"]
    report = "written" if any(store.list(RunKeys(name).report("html"))) else "missing"
    return [*lines, *_evaluation_status(store, name, step, kinds), Line("  report", report)]


def _training_status(store: Store, run: Run, step: int) -> Iterator[Line]:
    manifest = read_manifest(store, run.dataset, run.manifest)
    finished = records.finished_shards(store, run.dataset, manifest.shard_ids, manifest.rows_by_id)
    job, state, failure = training_job(run), "done", ""
    if read_result(store, job) is None:
        state = f"{step:,} of {run.config['train']['max_steps']:,} steps saved"
        failure = records.read_failure(store, keys.failure(RunKeys(run.name).result(job.job_id)))
    yield Line(f"run {run.name}", f"manifest {run.manifest[:12]} of dataset {run.dataset}")
    if run.mix:
        yield Line("  mix", describe(run.mix))
    yield Line("  tokenise", f"{len(finished):,} of {len(manifest.shard_ids):,} shards done")
    yield Line("  train", state, failure)


def _evaluation_status(store: Store, run: str, newest_step: int, kinds: list[str]) -> Iterator[Line]:
    """One line per kind: its state at the newest checkpoint, how many earlier checkpoints have it, and its errors."""
    prefix = RunKeys(run).evaluations
    matched = ((EVALUATION.fullmatch(stat.key.removeprefix(prefix)), stat.modified) for stat in store.list(prefix))
    written = {(match[2], int(match[1])): modified for match, modified in matched if match}
    errors = _failed_evaluations(store, run, written)
    for kind in dict.fromkeys([*kinds, *(kind for kind, _ in [*written, *errors])]):
        steps = {step for written_kind, step in written if written_kind == kind}
        state = "done" if newest_step in steps else "missing"
        if earlier := steps - {newest_step}:
            state += f", earlier checkpoints done: {len(earlier)}"
        yield Line(f"  {kind}", state, "; ".join(error for (failed, _), error in errors.items() if failed == kind))


def _failed_evaluations(store: Store, run: str, written: dict[Evaluation, float]) -> dict[Evaluation, str]:
    """The last error of each evaluation, unless a later job has written the evaluation."""
    errors = {}
    for listed in sorted(store.list(RunKeys(run).jobs), key=lambda listed: listed.modified):
        if (job_key := keys.failed_job(listed.key)) and (failure := records.read_failure(store, listed.key)):
            job = read_job(store, job_key)
            evaluation = job.kind, int(job.recipe.get("step", 0))
            if job.kind != "train" and listed.modified >= written.get(evaluation, 0):
                errors[evaluation] = failure
    return errors

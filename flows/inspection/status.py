"""What is done, what is missing and what failed, read from the store alone, without Prefect."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from model.checkpoints.records import checkpoints
from model.runs.job import read_job, read_result
from model.runs.run import Run, find_run, training_job
from storage import keys
from storage.datasets import records
from storage.datasets.manifest import latest_manifest, read_manifest
from storage.errors import ObjectMissing
from storage.keys import RunKeys
from storage.stores.store import Store, read_json

Evaluation = tuple[str, int]  # kind, step


@dataclass(frozen=True)
class Line:
    """One part of a run or dataset, its state, and the error of its last attempt if it failed."""

    what: str
    state: str
    error: str = ""


def store_status(store: Store) -> list[Line]:
    """The status of every run, then of every dataset."""
    lines = [line for name in run_names(store) for line in run_status(store, name)]
    return lines + [line for name in dataset_names(store) for line in dataset_status(store, name)]


def run_names(store: Store) -> list[str]:
    """The runs that were started in this store, and the models that were imported into it."""
    run_keys = {listed.key for listed in store.list(keys.RUNS)}
    names = {key.removeprefix(keys.RUNS).split("/")[0] for key in run_keys}
    return sorted(name for name in names if {RunKeys(name).config, RunKeys(name).checkpoint_record(0)} & run_keys)


def dataset_names(store: Store) -> list[str]:
    """The datasets with at least one object in the store."""
    return sorted({listed.key.removeprefix(keys.DATASETS).split("/")[0] for listed in store.list(keys.DATASETS)})


def dataset_status(store: Store, dataset: str) -> list[Line]:
    """The dataset's newest version, and its failed shard jobs."""
    manifest = latest_manifest(store, dataset)
    failures = records.failures(store, dataset)
    if manifest is None:
        lines = [Line(f"dataset {dataset}", "not sealed yet; continue with gpt2 dataset build")]
    else:
        finished = records.finished_shards(store, dataset, manifest.shard_ids, manifest.rows_by_id)
        state = f"{len(finished):,} of {len(manifest.shard_ids):,} shards done, {manifest.tokens:,} tokens"
        lines = [Line(f"dataset {dataset}", f"{state}, manifest {manifest.digest[:12]}")]
        failures = {shard_id: error for shard_id, error in failures.items() if shard_id not in finished}
    return lines + [Line(f"  shard {shard_id}", "failed", error) for shard_id, error in failures.items()]


def run_status(store: Store, name: str) -> list[Line]:
    """Every part of a run: its dataset, training, evaluations and report. Raises ObjectMissing for an unknown run."""
    known_names = run_names(store)
    if name not in known_names:
        raise ObjectMissing(
            f"store {store.url!r} has no run {name!r}; its runs are: {', '.join(known_names) or 'none'}. "
            f"Correct the name, or choose another store with --set store_url=…"
        )
    kept = checkpoints(store, name)
    step = kept[-1].step if kept else 0
    run = find_run(store, name)
    if run is None:
        lines = [Line(f"run {name}", "an imported model")]
        kinds = ["samples"]
    else:
        lines = _training_status(store, run, step)
        request: Any = read_json(store, RunKeys(name).request) or run.config
        kinds = ["val_loss", "hellaswag" if request["evaluation"].get("hellaswag") else "completion", "samples"]
    report = "written" if any(store.list(RunKeys(name).report("html"))) else "missing"
    return [*lines, *_evaluation_status(store, name, step, kinds), Line("  report", report)]


def _training_status(store: Store, run: Run, step: int) -> list[Line]:
    manifest = read_manifest(store, run.dataset, run.manifest)
    finished = records.finished_shards(store, run.dataset, manifest.shard_ids, manifest.rows_by_id)
    job = training_job(run)
    if read_result(store, job) is not None:
        training = Line("  train", "done")
    else:
        saved = f"{step:,} of {run.config['train']['max_steps']:,} steps saved"
        failure = read_json(store, keys.failure(RunKeys(run.name).result(job.job_id)))
        training = Line("  train", saved, str(failure["why"]) if failure else "")
    return [
        Line(f"run {run.name}", f"manifest {run.manifest[:12]} of dataset {run.dataset}"),
        Line("  tokenise", f"{len(finished):,} of {len(manifest.shard_ids):,} shards done"),
        training,
    ]


def _evaluation_status(store: Store, run: str, newest_step: int, kinds: list[str]) -> Iterator[Line]:
    """One line per kind: its state at the newest checkpoint, how many earlier checkpoints have it, and its errors."""
    written = _written_evaluations(store, run)
    errors = _failed_evaluations(store, run, written)
    for kind in dict.fromkeys([*kinds, *(kind for kind, _ in [*written, *errors])]):
        steps = {step for written_kind, step in written if written_kind == kind}
        state = "done" if newest_step in steps else "missing"
        earlier = len(steps - {newest_step})
        if earlier:
            state += f", earlier checkpoints done: {earlier}"
        yield Line(f"  {kind}", state, "; ".join(error for (failed, _), error in errors.items() if failed == kind))


def _written_evaluations(store: Store, run: str) -> dict[Evaluation, float]:
    """When each evaluation was written."""
    prefix = RunKeys(run).evaluations
    written = {}
    for listed in store.list(prefix):
        if listed.key.endswith(".json"):
            step, _, kind = listed.key.removeprefix(prefix).removesuffix(".json").partition("/")
            written[kind, int(step)] = listed.modified
    return written


def _failed_evaluations(store: Store, run: str, written: dict[Evaluation, float]) -> dict[Evaluation, str]:
    """The last error of each evaluation, unless a later job has written the evaluation."""
    errors = {}
    for listed in sorted(store.list(RunKeys(run).jobs), key=lambda listed: listed.modified):
        job_key = keys.failed_job(listed.key)
        failure = read_json(store, listed.key) if job_key else None
        if not job_key or not failure:
            continue
        job = read_job(store, job_key)
        if job.kind != "train" and listed.modified >= written.get((job.kind, job.recipe["step"]), 0):
            errors[job.kind, job.recipe["step"]] = str(failure["why"])
    return errors

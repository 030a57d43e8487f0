"""What is done, what is missing and what failed and why: read from the store alone, with no Prefect at all."""

from dataclasses import dataclass

from model.history import checkpoints
from model.job import Job, read_result
from model.run import Run, evaluation_jobs, read_run, training_job
from storage import keys, shards
from storage.errors import ObjectMissing
from storage.manifest import latest_manifest, read_manifest
from storage.store import Store, read_json


@dataclass(frozen=True)
class Line:
    """One thing in the store: what it is, how far it is, and why it failed last, if it did."""

    what: str
    state: str
    why: str = ""


def run_names(store: Store) -> list[str]:
    """The runs that were started in this store."""
    there = {listed.key for listed in store.list(keys.RUNS)}
    names = {key.removeprefix(keys.RUNS).split("/")[0] for key in there}
    return sorted(name for name in names if keys.run_config(name) in there)


def dataset_names(store: Store) -> list[str]:
    """The datasets of which anything is there."""
    return sorted({listed.key.removeprefix(keys.DATASETS).split("/")[0] for listed in store.list(keys.DATASETS)})


def dataset_status(store: Store, dataset: str) -> list[Line]:
    """The dataset's newest version, and the shard jobs that failed last."""
    manifest = latest_manifest(store, dataset)
    failures = shards.failures(store, dataset)
    if manifest is None:
        lines = [Line(f"dataset {dataset}", "not sealed yet: gpt2 dataset build goes on")]
    else:
        finished = shards.done(store, dataset, manifest.shard_ids, manifest.made)
        tokens = sum(sums["tokens"] for sums in manifest.totals.values())
        state = f"{len(finished):,} of {len(manifest.shard_ids):,} shards done, {tokens:,} tokens"
        lines = [Line(f"dataset {dataset}", f"{state}, manifest {manifest.digest[:12]}")]
        failures = {name: why for name, why in failures.items() if name not in finished}  # made since
    return lines + [Line(f"  shard {name}", "failed", why) for name, why in failures.items()]


def run_status(store: Store, name: str) -> list[Line]:
    """Every part of a run: its dataset, training, evaluations and report. Raises ObjectMissing for no such run."""
    try:
        run = read_run(store, name)
    except ObjectMissing as error:
        known = ", ".join(run_names(store)) or "none"
        raise ObjectMissing(
            f"run {name!r} is not in store {store.url!r}, found: {known}. Give one of these."
        ) from error
    manifest = read_manifest(store, run.dataset, run.manifest)
    finished = shards.done(store, run.dataset, manifest.shard_ids, manifest.made)
    kept = checkpoints(store, name)
    step = kept[-1].step if kept else 0
    lines = [
        Line(f"run {name}", f"manifest {run.manifest[:12]} of dataset {run.dataset}"),
        Line("  tokenise", f"{len(finished):,} of {len(manifest.shard_ids):,} shards done"),
        _job(store, run, training_job(run), f"{step:,} of {run.config['train']['max_steps']:,} steps saved"),
    ]
    lines += [_job(store, run, job, "missing") for job in evaluation_jobs(run, step)]
    reported = any(True for _ in store.list(keys.report(name, "html")))
    return [*lines, Line("  report", "written" if reported else "missing")]


def _job(store: Store, run: Run, job: Job, unfinished: str) -> Line:
    if read_result(store, job) is not None:
        return Line(f"  {job.kind}", "done")
    failure = read_json(store, keys.failure(keys.result(run.name, job.job_id)))
    return Line(f"  {job.kind}", unfinished, str(failure["why"]) if failure else "")

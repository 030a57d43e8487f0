"""What is done, what is missing and what failed and why: read from the store alone, with no Prefect at all."""

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


@dataclass(frozen=True)
class Line:
    """One thing in the store: what it is, how far it is, and why it failed last, if it did."""

    what: str
    state: str
    why: str = ""


def run_names(store: Store) -> list[str]:
    """The runs that were started in this store, and the models that were imported into it."""
    there = {listed.key for listed in store.list(keys.RUNS)}
    names = {key.removeprefix(keys.RUNS).split("/")[0] for key in there}
    return sorted(name for name in names if {RunKeys(name).config, RunKeys(name).checkpoint_record(0)} & there)


def dataset_names(store: Store) -> list[str]:
    """The datasets of which anything is there."""
    return sorted({listed.key.removeprefix(keys.DATASETS).split("/")[0] for listed in store.list(keys.DATASETS)})


def dataset_status(store: Store, dataset: str) -> list[Line]:
    """The dataset's newest version, and the shard jobs that failed last."""
    manifest = latest_manifest(store, dataset)
    failures = records.failures(store, dataset)
    if manifest is None:
        lines = [Line(f"dataset {dataset}", "not sealed yet: gpt2 dataset build goes on")]
    else:
        finished = records.finished_shards(store, dataset, manifest.shard_ids, manifest.summaries)
        tokens = sum(sums["tokens"] for sums in manifest.totals.values())
        state = f"{len(finished):,} of {len(manifest.shard_ids):,} shards done, {tokens:,} tokens"
        lines = [Line(f"dataset {dataset}", f"{state}, manifest {manifest.digest[:12]}")]
        failures = {name: why for name, why in failures.items() if name not in finished}  # made since
    return lines + [Line(f"  shard {name}", "failed", why) for name, why in failures.items()]


def run_status(store: Store, name: str) -> list[Line]:
    """Every part of a run: its dataset, training, evaluations and report. Raises ObjectMissing for no such run."""
    if name not in (known := run_names(store)):
        raise ObjectMissing(
            f"run {name!r} is not in store {store.url!r}, found: {', '.join(known) or 'none'}. Give one of these."
        )
    kept = checkpoints(store, name)
    step = kept[-1].step if kept else 0
    run = find_run(store, name)
    if run is None:
        lines, wanted = [Line(f"run {name}", "a model that was imported, not trained here")], ["samples"]
    else:
        lines = _trained(store, run, step)
        asked: Any = read_json(store, RunKeys(name).request) or run.config
        wanted = ["val_loss", "hellaswag" if asked["evaluation"]["hellaswag"] else "completion", "samples"]
    lines += _evaluated(store, name, step, wanted)
    reported = any(True for _ in store.list(RunKeys(name).report("html")))
    return [*lines, Line("  report", "written" if reported else "missing")]


def _trained(store: Store, run: Run, step: int) -> list[Line]:
    manifest = read_manifest(store, run.dataset, run.manifest)
    finished = records.finished_shards(store, run.dataset, manifest.shard_ids, manifest.summaries)
    job = training_job(run)
    failure = read_json(store, keys.failure(RunKeys(run.name).result(job.job_id)))
    saved = f"{step:,} of {run.config['train']['max_steps']:,} steps saved"
    return [
        Line(f"run {run.name}", f"manifest {run.manifest[:12]} of dataset {run.dataset}"),
        Line("  tokenise", f"{len(finished):,} of {len(manifest.shard_ids):,} shards done"),
        Line("  train", "done")
        if read_result(store, job) is not None
        else Line("  train", saved, str(failure["why"]) if failure else ""),
    ]


def _evaluated(store: Store, run: str, step: int, wanted: list[str]) -> list[Line]:
    """A line a kind of evaluation: whether the newest checkpoint has it, and how many of the earlier ones.

    A failure counts until the same is answered after it, be it asked otherwise.
    """
    prefix = RunKeys(run).evaluations
    written: dict[tuple[str, int], float] = {}
    for one in store.list(prefix):
        if one.key.endswith(".json"):
            at, _, kind = one.key.removeprefix(prefix).removesuffix(".json").partition("/")
            written[kind, int(at)] = one.modified
    failed: dict[tuple[str, int], str] = {}
    for one in sorted(store.list(RunKeys(run).jobs), key=lambda listed: listed.modified):
        if (key := keys.failed_job(one.key)) and (failure := read_json(store, one.key)):
            job = read_job(store, key)
            if job.kind != "train" and one.modified >= written.get(about := (job.kind, job.recipe["step"]), 0):
                failed[about] = str(failure["why"])
    lines = []
    for kind in dict.fromkeys([*wanted, *(name for name, _ in written), *(name for name, _ in failed)]):
        steps = {at for name, at in written if name == kind}
        more = f", of {len(steps - {step})} earlier checkpoints too" if steps - {step} else ""
        whys = "; ".join(why for (name, _), why in failed.items() if name == kind)
        lines.append(Line(f"  {kind}", ("done" if step in steps else "missing") + more, whys))
    return lines

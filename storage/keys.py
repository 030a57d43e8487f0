"""Every key in the store is spelled here and nowhere else. Knows no store."""

import re

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")

FORMAT = "FORMAT"
DATASETS = "datasets/"
RUNS = "runs/"
TEMPORARY = "tmp/"


def check_name(kind: str, name: str) -> str:
    """The name itself, when it can be one segment of a key. Raises ValueError otherwise."""
    if not NAME.fullmatch(name):
        raise ValueError(
            f"{kind} {name!r} cannot be part of a key. It must begin with a letter or a digit and hold only letters, "
            f"digits, '.', '_' and '-', 200 at most. Choose such a name."
        )
    return name


def as_name(text: str) -> str:
    """The text with what cannot stand in a key replaced; empty when nothing is left of it."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", text).lstrip("._-")


def check_key(key: str) -> str:
    """The key itself, when every segment of it is a name. Raises ValueError otherwise: no key leaves the store."""
    for segment in key.split("/"):
        check_name("the key", segment)
    return key


def is_key(text: str) -> bool:
    """Whether every segment of the text is a name."""
    return all(NAME.fullmatch(segment) for segment in text.split("/"))


def probe(token: str) -> str:
    """A key that a look at the store writes and deletes."""
    return f"{TEMPORARY}{token}"


def source(digest: str, name: str) -> str:
    """A source file that was copied into the store."""
    return check_key(f"sources/{digest}/{name}")


def listing(digest: str) -> str:
    """What a source of the Hub held when it was asked last."""
    return check_key(f"sources/listings/{digest}.json")


def dataset(name: str) -> str:
    """The prefix of one dataset."""
    return f"{DATASETS}{check_name('dataset', name)}/"


def shards(name: str) -> str:
    """The prefix of a dataset's shards and records."""
    return f"{dataset(name)}shards/"


def shard(name: str, shard_id: str) -> str:
    """One shard's token ids."""
    return f"{shards(name)}{check_name('shard', shard_id)}.bin"


def record(name: str, shard_id: str) -> str:
    """One shard's record."""
    return f"{shards(name)}{check_name('shard', shard_id)}.json"


def shard_of(name: str, key: str) -> tuple[str | None, bool]:
    """The shard whose token ids or record lie at the key (None: neither does), and whether it is the record."""
    shard_id, _, suffix = key.removeprefix(shards(name)).rpartition(".")
    return (None if shard_id.endswith(".failure") else shard_id), suffix == "json"


def failure(key: str) -> str:
    """Why the job whose record or result is at `key` failed last; gone once it succeeds."""
    return f"{key.removesuffix('.json')}.failure.json"


def plans(name: str) -> str:
    """The prefix of the plans of a dataset's source files."""
    return f"{dataset(name)}plans/"


def plan(name: str, digest: str) -> str:
    """Which rows of one source file become which shards."""
    return check_key(f"{plans(name)}{digest}.json")


def split(name: str) -> str:
    """The dataset's pinned val shards and what its name is bound to."""
    return f"{dataset(name)}split.json"


def lease(name: str) -> str:
    """Who may change which shards of the dataset count."""
    return f"{dataset(name)}lease.json"


def manifests(name: str) -> str:
    """The prefix of a dataset's versions."""
    return f"{dataset(name)}manifests/"


def manifest(name: str, digest: str) -> str:
    """One version of a dataset."""
    return f"{manifests(name)}{check_name('manifest', digest)}.json"


def audit(name: str, digest: str) -> str:
    """The leak report of one version."""
    return check_key(f"{dataset(name)}audits/{digest}.json")


def dataset_asked(name: str) -> str:
    """The configuration with which the dataset was asked for last."""
    return f"{dataset(name)}asked.json"


def dataset_latest(name: str) -> str:
    """The pointer to a dataset's newest manifest."""
    return f"{dataset(name)}latest.json"


def run(name: str) -> str:
    """The prefix of one run."""
    return f"{RUNS}{check_name('run', name)}/"


def run_config(name: str) -> str:
    """The configuration a run is pinned to."""
    return f"{run(name)}config.json"


def run_asked(name: str) -> str:
    """The configuration with which the run was asked for last, before it is pinned."""
    return f"{run(name)}asked.json"


def jobs(name: str) -> str:
    """The prefix of what a run's processes are asked, and answered."""
    return f"{run(name)}jobs/"


def job(name: str, job_id: str) -> str:
    """What one process is asked."""
    return f"{jobs(name)}{check_name('job', job_id)}.json"


def result(name: str, job_id: str) -> str:
    """What a process answered; there = the job is done."""
    return f"{jobs(name)}{check_name('job', job_id)}.result.json"


def failed_job(key: str) -> str | None:
    """The job whose failure is noted at the key; None when the key is another one."""
    ending = ".result.failure.json"
    return f"{key.removesuffix(ending)}.json" if key.endswith(ending) else None


def checkpoints(name: str) -> str:
    """The prefix of a run's checkpoints."""
    return f"{run(name)}checkpoints/"


def checkpoint_file(name: str, step: int, attempt: str, file: str) -> str:
    """One file of a checkpoint, as one attempt wrote it."""
    return check_key(f"{checkpoints(name)}{step:06d}/{attempt}/{file}")


def checkpoint_record(name: str, step: int) -> str:
    """A checkpoint's record."""
    return f"{checkpoints(name)}{step:06d}.json"


def run_latest(name: str) -> str:
    """The pointer to a run's newest complete checkpoint."""
    return f"{run(name)}latest.json"


def all_metrics(name: str) -> str:
    """The prefix of a run's metrics."""
    return f"{run(name)}metrics/"


def metrics(name: str, first_step: int, attempt: str) -> str:
    """The metrics between two checkpoints, as one attempt wrote them."""
    return check_key(f"{all_metrics(name)}{first_step:06d}-{attempt}.jsonl")


def progress(name: str) -> str:
    """Where a running training stands, for the live curve."""
    return f"{run(name)}progress.json"


def all_evaluations(name: str) -> str:
    """The prefix of a run's evaluations."""
    return f"{run(name)}evaluations/"


def evaluations(name: str, step: int) -> str:
    """The prefix of one checkpoint's evaluations."""
    return f"{all_evaluations(name)}{step:06d}/"


def evaluation(name: str, step: int, evaluation_name: str) -> str:
    """One evaluation of one checkpoint."""
    return check_key(f"{evaluations(name, step)}{evaluation_name}.json")


def evaluation_items(name: str, step: int, evaluation_name: str) -> str:
    """The evaluation's answers, one row an item."""
    return check_key(f"{evaluations(name, step)}{evaluation_name}.items.parquet")


def report(name: str, suffix: str) -> str:
    """The run's report for people: `html` or `md`."""
    return f"{run(name)}report.{suffix}"

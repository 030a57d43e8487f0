"""Every key in the store is defined here and nowhere else. Plural names are prefixes, which end in "/"."""

import re
import secrets

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")

FORMAT = "FORMAT"
DATASETS = "datasets/"
RUNS = "runs/"
CONVERTED = "sources/converted/"
TEMPORARY = "tmp/"


def check_name(kind: str, name: str) -> str:
    """Return the name if it can be one segment of a key. Raises ValueError otherwise."""
    if not NAME.fullmatch(name):
        remedy = "Start with a letter or a digit, and use at most 200 letters, digits, '.', '_' and '-'."
        raise ValueError(f"{kind} {name!r} cannot be part of a key. {remedy}")
    return name


def as_name(text: str) -> str:
    """The text as part of a key: forbidden characters become "_", leading ".", "_", "-" are removed; may be empty."""
    return re.sub(r"[^A-Za-z0-9._-]", "_", text).lstrip("._-")


def check_key(key: str) -> str:
    """Return the key if every segment is a name, so that no key leaves the store. Raises ValueError otherwise."""
    for segment in key.split("/"):
        check_name("key segment", segment)
    return key


def is_key(text: str) -> bool:
    """Whether every segment of the text is a name."""
    return all(NAME.fullmatch(segment) for segment in text.split("/"))


def probe() -> str:
    """A new scratch key, deleted by the check that writes it."""
    return f"{TEMPORARY}{secrets.token_hex(8)}"


def source(digest: str, name: str) -> str:
    """A source file mirrored into the store."""
    return check_key(f"sources/{digest}/{name}")


def converted(digest: str, suffix: str) -> str:
    """The parquet file of that sha256, or the record named by the digest of a conversion's recipe."""
    return check_key(f"{CONVERTED}{digest}{suffix}")


def listing(digest: str) -> str:
    """The files of a Hub source when it was last listed."""
    return check_key(f"sources/listings/{digest}.json")


def speed(digest: str) -> str:
    """The speed of micro-batches in the setup of that digest."""
    return check_key(f"speeds/{digest}.json")


def failure(key: str) -> str:
    """Why the job whose record or result is at `key` last failed; deleted when it succeeds."""
    return f"{key.removesuffix('.json')}.failure.json"


def failed_job(key: str) -> str | None:
    """The key of the run's job whose failure note is at `key`; None if `key` is any other key."""
    ending = ".result.failure.json"
    return f"{key.removesuffix(ending)}.json" if key.endswith(ending) else None


class DatasetKeys:
    """The keys of one dataset. Raises ValueError for a name that cannot be part of a key."""

    def __init__(self, name: str) -> None:
        self.prefix = f"{DATASETS}{check_name('dataset', name)}/"
        self.shards = f"{self.prefix}shards/"
        self.plans = f"{self.prefix}plans/"  # which rows of a source file become which shards
        self.manifests = f"{self.prefix}manifests/"  # immutable versions, named by their sha256
        self.split = f"{self.prefix}split.json"  # val shards and the settings that the name is bound to; create-only
        self.lease = f"{self.prefix}lease.json"  # who may change the dataset
        self.latest = f"{self.prefix}latest.json"  # pointer to the newest manifest, swapped
        self.request = f"{self.prefix}asked.json"  # the last request for the dataset
        self.card = f"{self.prefix}README.md"  # only on the Hub

    def shard(self, shard_id: str) -> str:
        """Token ids, little-endian uint16, immutable."""
        return f"{self.shards}{check_name('shard', shard_id)}.bin"

    def record(self, shard_id: str) -> str:
        return f"{self.shards}{check_name('shard', shard_id)}.json"

    def val_documents(self, name: str) -> str:
        """Hashes of the val documents, which train shards leave out."""
        return check_key(f"{self.prefix}val/{name}.bin")

    def plan(self, digest: str) -> str:
        return check_key(f"{self.plans}{digest}.json")

    def manifest(self, digest: str) -> str:
        return f"{self.manifests}{check_name('manifest', digest)}.json"

    def page(self, digest: str) -> str:
        return check_key(f"{self.prefix}cards/{digest}.html")

    def leaks(self, digest: str) -> str:
        return check_key(f"{self.prefix}audits/{digest}.json")


class RunKeys:
    """The keys of one run. Raises ValueError for a name that cannot be part of a key."""

    def __init__(self, name: str) -> None:
        self.prefix = f"{RUNS}{check_name('run', name)}/"
        self.jobs = f"{self.prefix}jobs/"
        self.checkpoints = f"{self.prefix}checkpoints/"
        self.metrics = f"{self.prefix}metrics/"
        self.evaluations = f"{self.prefix}evaluations/"
        self.config = f"{self.prefix}config.json"  # what the run is pinned to; create-only
        self.request = f"{self.prefix}asked.json"  # the last request for the run
        self.progress = f"{self.prefix}progress.json"  # steps done, swapped

    def job(self, job_id: str) -> str:
        return f"{self.jobs}{check_name('job', job_id)}.json"

    def result(self, job_id: str) -> str:
        return f"{self.jobs}{check_name('job', job_id)}.result.json"

    def checkpoint_file(self, step: int, attempt: str, file: str) -> str:
        return check_key(f"{self.checkpoints}{step:06d}/{attempt}/{file}")

    def checkpoint_record(self, step: int) -> str:
        return f"{self.checkpoints}{step:06d}.json"

    def metrics_segment(self, first_step: int, attempt: str) -> str:
        """The metrics of one attempt between two checkpoints."""
        return check_key(f"{self.metrics}{first_step:06d}-{attempt}.jsonl")

    def evaluation(self, step: int, name: str) -> str:
        return check_key(f"{self.evaluations}{step:06d}/{name}.json")

    def evaluation_items(self, step: int, name: str) -> str:
        """The evaluation's answers as parquet, one row per item."""
        return check_key(f"{self.evaluations}{step:06d}/{name}.items.parquet")

    def report(self, suffix: str) -> str:
        return f"{self.prefix}report.{suffix}"

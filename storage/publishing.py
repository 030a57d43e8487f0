"""Publishes a dataset's objects as a repository of the Hub, in commits, the manifest last; pulls it as from a store."""

import io
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import chain

from huggingface_hub import CommitOperationAdd, HfApi, get_token, logging
from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]  # imported lazily

from storage.datasets.copy import SHARDS_AT_ONCE, check_target, copy_dataset, version_objects
from storage.datasets.manifest import Manifest, ShardRow, ancestors
from storage.datasets.shards import read_shard
from storage.digests import canonical_json, sha256
from storage.errors import Conflict, DatasetMismatch, ObjectMissing, ShardCorrupt, SourceInvalid
from storage.keys import DatasetKeys
from storage.sources import hub
from storage.sources.files import HUB_NAME
from storage.stores.store import LIMIT_BYTES, Object, ReadableStore, Store, check_size

COMMIT_SHARDS = 50  # and their records: the Hub recommends at most 100 files in a commit
CONFLICTS = 10  # with others who commit to the repository at the same time
Progress = Callable[[int, int], None]


class Repository(ReadableStore):
    """The repository at the commit of a revision, then at each commit that it makes. Every read is verified."""

    def __init__(self, name: str, dataset: str, revision: str = "main") -> None:
        _check_name(name)
        self.name, self.dataset, self.keys = name, dataset, DatasetKeys(dataset)
        hub.with_retries(f"{name} at {revision}", partial(self._list, revision))
        self.url = f"{hub.SCHEME}{name}@{self.commit_id}"

    def _list(self, revision: str) -> None:
        info = HfApi().dataset_info(self.name, revision=revision, timeout=hub.READ_SECONDS)
        self.commit_id, self.is_private = str(info.sha), info.private
        self.files = {self.keys.prefix + name: file for name, file in hub.files_of(self.name, self.commit_id).items()}

    def read(self, key: str, limit_bytes: int = LIMIT_BYTES) -> Object:
        if key not in self.files:
            raise ObjectMissing(f"{self.url} has no file {key.removeprefix(self.keys.prefix)!r}.")
        file, body = self.files[key], io.BytesIO()
        check_size(file.place, file.size_bytes, limit_bytes)
        hub.fetch(file, body, lambda _: None)
        digest = sha256(body.getvalue())
        return Object(body.getvalue(), digest, digest)

    def upload(self, *files: tuple[str, bytes | bytearray]) -> list[CommitOperationAdd]:
        """Send the large ones of these files ahead of their commit, unless the Hub has them, and free their memory."""
        # As buffers: Xet accepts none, and would send the files past HF_ENDPOINT.
        additions = [CommitOperationAdd(key.removeprefix(self.keys.prefix), io.BytesIO(body)) for key, body in files]

        def send() -> None:
            try:
                HfApi().preupload_lfs_files(self.name, additions, repo_type="dataset")
            except RuntimeError as error:  # the client wraps the error of one file
                raise error.__cause__ or error from None

        hub.with_retries(f"{self.name}: {', '.join(addition.path_in_repo for addition in additions)}", send)
        return additions

    def commit(self, additions: list[CommitOperationAdd], summary: str) -> None:
        """Add or replace these files. Raises Conflict if others have committed since `commit_id`."""
        send = partial(HfApi().create_commit, self.name, additions, commit_message=summary, repo_type="dataset")
        self.commit_id = hub.with_retries(f"{self.name}: {summary}", partial(send, parent_commit=self.commit_id)).oid


def publish(
    store: Store, dataset: str, version: Manifest, name: str, card: bytes, private: bool, on_progress: Progress
) -> tuple[str, int, int]:
    """Commit what the repository lacks of a version and of those before it, the manifest and the card last.

    Returns the commit, the number of shards, and how many of them were missing. Idempotent: a second call resumes.
    Raises ValueError, DatasetMismatch for other content, Conflict, ShardCorrupt, SourceInvalid, SourceUnavailable.
    """
    _check_name(name)
    if get_token() is None:
        raise ValueError(f"{name}: the Hub needs a token with write access. Set HF_TOKEN.")
    disable_progress_bars()  # the client's own
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # the client's warnings quote signed URLs
    versions = list(ancestors(store, dataset, version))
    rows = {row.shard_id: row for each in versions for row in each.rows()}
    sent = set[str]()
    create = partial(HfApi().create_repo, name, repo_type="dataset", private=private or None, exist_ok=True)
    hub.with_retries(name, create)
    for _ in range(CONFLICTS):
        repository = Repository(name, dataset)
        if private and not repository.is_private:
            raise ValueError(f"{name} is public. Make it private in its settings on the Hub, or leave out --private.")
        latest = check_target(store, repository, dataset, versions)
        missing = _missing_shards(repository, rows.values(), is_new=latest is None)
        sent.update(row.shard_id for row in missing)
        with suppress(Conflict):
            _send_shards(store, repository, missing, on_progress)
            objects = [item for item in version_objects(store, dataset, versions) if item[0] not in repository.files]
            if latest != version.digest:
                pointer = {"manifest": version.digest, "parent": version.parent, "sequence": len(versions)}
                objects += [(repository.keys.latest, canonical_json(pointer)), (repository.keys.card, card)]
            if objects:
                repository.commit(repository.upload(*objects), f"Publish {version.digest[:12]}")
            return repository.commit_id, len(rows), len(sent)
    raise Conflict(f"{name}: others committed {CONFLICTS} times meanwhile. Run the command again.")


def pull(name: str, revision: str, store: Store, dataset: str, on_progress: Progress) -> tuple[Manifest, int, int]:
    """Copy the versions in a revision of the repository into the store; returns and raises as `copy_dataset`."""
    repository = Repository(name, dataset, revision)
    if repository.keys.latest not in repository.files:
        raise ObjectMissing(f"{repository.url} holds no dataset that gpt2 dataset publish completed. Check the name.")
    try:
        return copy_dataset(repository, store, dataset, on_progress)
    except (ObjectMissing, ShardCorrupt) as error:
        reason = str(error).partition(" Rebuild it")[0]  # without the remedy for a store
        raise SourceInvalid(f"{repository.url}: {reason} Its owner repairs it with gpt2 dataset publish.") from error


def _missing_shards(repository: Repository, rows: Iterable[ShardRow], *, is_new: bool) -> list[ShardRow]:
    """The shards that are absent or differ. Raises DatasetMismatch if a new repository holds something else."""
    keys, files, missing = repository.keys, repository.files, []
    own = {keys.card, f"{keys.prefix}.gitattributes"}
    for row in rows:
        shard, record = keys.shard(row.shard_id), keys.record(row.shard_id)
        own |= {shard, record}
        if not {shard, record} <= files.keys() or files[shard].digest != row.sha256:
            missing.append(row)
    if is_new and (others := sorted(files[key].name for key in files.keys() - own)):
        raise DatasetMismatch(f"{repository.url} holds other files, such as {others[0]!r}. Choose another repository.")
    return missing


def _send_shards(store: Store, repository: Repository, missing: list[ShardRow], on_progress: Progress) -> None:
    def upload(row: ShardRow) -> list[CommitOperationAdd]:
        body = read_shard(store, repository.dataset, row)
        shard, record = repository.keys.shard(row.shard_id), repository.keys.record(row.shard_id)
        additions = repository.upload((shard, body), (record, store.read(record).body))
        on_progress(1, len(missing))
        return additions

    with ThreadPoolExecutor(SHARDS_AT_ONCE) as pool:
        for start in range(0, len(missing), COMMIT_SHARDS):
            additions = [*chain.from_iterable(pool.map(upload, missing[start : start + COMMIT_SHARDS]))]
            repository.commit(additions, f"Add {len(additions) // 2} shards")


def _check_name(name: str) -> None:
    if not HUB_NAME.fullmatch(name):  # which may be a URL with a password
        raise ValueError("The name of a dataset repository on the Hub has the form OWNER/NAME.")

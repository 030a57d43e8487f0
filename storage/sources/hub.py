"""The Hugging Face Hub: the files of a dataset at one commit, and their bytes. Independent of stores.

`datasets` resolves a name, a configuration and a revision, so the files are those that `load_dataset` would use.
The Hub's client reads HF_TOKEN and HF_ENDPOINT, and sends the token only to the endpoint. Its `hf_hub_download` is not
used: it deletes a partial file on failure and does not verify digests.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from http import HTTPStatus
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, TypeVar

from storage.errors import Conflict, SourceInvalid, SourceUnavailable
from storage.sources.files import WILDCARD, Listing, SourceFile
from storage.sources.selection import READABLE, listed, reason_to_ignore, suffix_of
from storage.stores.opening import CREDENTIALS
from storage.stores.retries import RETRYABLE_STATUSES, Backoff, Transient, parse_retry_after

if TYPE_CHECKING:  # the Hub's client takes 0.2 s to import, so the functions that use it import it
    import httpx2
    from huggingface_hub import DatasetInfo

SCHEME = "hf://datasets/"
PLACE = re.compile(r"hf://datasets/([^@]+)@([^/]+)/(.+)")
NEWEST = "newest:"
DATE = re.compile(r"(19|20)\d\d-\d\d")  # year and week in the name of a crawl's configuration: CC-MAIN-2025-05
COMMIT = re.compile(r"[0-9a-f]{40}")
MAX_RETRY_AFTER_SECONDS = 330.0  # the Hub limits requests per 5 minutes and sends the rest of that time
READ_SECONDS = 30.0  # without a byte
UNREACHABLE_SECONDS = 3.0  # without a first connection; the name of the dataset may be a mistyped path
DIGEST_TRIES = 3  # downloads of a whole file whose digest does not match
Result = TypeVar("Result")


def resolve(dataset: str, revision: str) -> tuple[str, str]:
    """The commit of a revision, and the licence from the dataset's card. Raises ValueError, SourceUnavailable."""
    import httpx2
    from huggingface_hub import HfApi

    began, timeout = time.monotonic(), httpx2.Timeout(READ_SECONDS, connect=UNREACHABLE_SECONDS)

    def request() -> "DatasetInfo":
        try:
            return HfApi().dataset_info(dataset, revision=revision, timeout=timeout)  # type: ignore[arg-type]
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            if time.monotonic() - began < UNREACHABLE_SECONDS:
                raise
            problem = f"{dataset}: cannot reach the Hub: {error}"
            raise SourceUnavailable(f"{problem}. Check the network and HF_ENDPOINT.") from error

    info = with_retries(f"{dataset} at {revision}", request)
    licence = info.card_data.get("license") if info.card_data else None
    return str(info.sha), ", ".join(licence) if isinstance(licence, list) else str(licence or "not stated")


def list_files(dataset: str, config: str, commit: str, split: str) -> Listing:
    """The files of a split at a commit, as `load_dataset`. `config` may be a glob or `newest:N`. Raises ValueError."""
    is_pattern = WILDCARD.search(config) or config.startswith(NEWEST)
    names = _choose_configs(dataset, config, commit) if is_pattern else [config]
    listings = [_list_config(dataset, name, commit, split) for name in names]
    files = {file.name: file for listing in listings for file in listing.files}
    ignored = tuple(line for listing in listings for line in listing.ignored)
    return Listing(tuple(files.values()), {"configs": ", ".join(names)} if is_pattern else {}, ignored)


def _choose_configs(dataset: str, config: str, commit: str) -> list[str]:
    """The configurations that a glob or `newest:N` chooses, oldest first. Raises ValueError if there are none."""
    from datasets import get_dataset_config_names  # takes 1.5 s to import

    what = f"data.config = {config!r} of {dataset} at {commit}"
    load = _refused(dataset, "", commit)(partial(get_dataset_config_names, dataset, revision=commit))
    names = with_retries(what, load)
    chosen = sorted(name for name in names if fnmatchcase(name, config))
    if config.startswith(NEWEST):
        count = config.removeprefix(NEWEST)
        if not count.isdecimal() or int(count) == 0:
            raise ValueError(f"{what}: write a number above 0 after newest:, such as newest:3.")
        dated = sorted((date[0], name) for name in names if (date := DATE.search(name)))
        chosen = [name for _, name in dated[-int(count) :]]
    if not chosen:
        nearest = ", ".join(get_close_matches(config, names, 5, cutoff=0))
        raise ValueError(f"{what}: none of its {len(names):,} configurations matches. Set one of these: {nearest}.")
    return chosen


def _list_config(dataset: str, config: str, commit: str, split: str) -> Listing:
    from datasets import load_dataset_builder

    what = f"{dataset} ({config or 'default'}) at {commit}"
    load = _refused(dataset, config, commit)(partial(load_dataset_builder, dataset, config or None, revision=commit))
    data_files = with_retries(what, load).config.data_files
    if split not in data_files:
        remedy = "Choose another dataset (data.source or evaluation.hellaswag) or another data.config."
        raise ValueError(f"{what}: no split {split!r}, only {', '.join(data_files)}. {remedy}")
    names = [PLACE.fullmatch(place)[3] for place in data_files[split]]  # type: ignore[index]  # each matches
    if unreadable := [name for name in names if not suffix_of(name).format]:
        remedy = "Choose another dataset, data.config, or the Hub's copy: --set data.revision=refs/convert/parquet"
        raise ValueError(f"{what}: {unreadable[0]!r} is not {READABLE}. {remedy}")
    folders = {PurePosixPath(name).parent for name in names}
    common = os.path.commonpath(folders)
    files = with_retries(f"the files of {dataset} at {commit}", lambda: files_of(dataset, commit, common))
    others = (name for name in sorted(files.keys() - set(names)) if PurePosixPath(name).parent in folders)
    ignored = {name: f"not in split {split!r}" for name in others if not reason_to_ignore([PurePosixPath(name).name])}
    return Listing(tuple(files[name] for name in names), {}, listed(ignored))


def files_of(dataset: str, commit: str, folder: str = "") -> dict[str, SourceFile]:
    """The files of a repository at a commit, below a folder, by name."""
    from huggingface_hub import HfApi, RepoFile

    tree = HfApi().list_repo_tree(dataset, folder or None, recursive=True, revision=commit, repo_type="dataset")
    files = {}
    for entry in tree:
        if isinstance(entry, RepoFile):
            digest = entry.lfs.sha256 if entry.lfs else entry.blob_id
            files[entry.path] = SourceFile(entry.path, entry.size, digest, place_of(dataset, commit, entry.path))
    return files


def place_of(dataset: str, commit: str, name: str) -> str:
    """The place of a dataset's file at a commit."""
    return f"{SCHEME}{dataset}@{commit}/{name}"


def read_range(place: str, start: int, length: int) -> bytes:
    """Exactly `length` bytes of a file from `start`."""

    def request() -> bytes:
        with _open_response(place, {"Range": f"bytes={start}-{start + length - 1}"}) as response:
            body = response.read() if response.status_code == HTTPStatus.PARTIAL_CONTENT else b""
        if len(body) != length:
            raise Transient(f"status {response.status_code}, {len(body):,} of {length:,} bytes at offset {start:,}")
        return body

    return with_retries(place, request)


def fetch(file: SourceFile, body: BinaryIO, on_progress: Callable[[int], None]) -> None:
    """Download the rest of `body`, verified; `on_progress` gets its size. Raises SourceInvalid, SourceUnavailable."""
    is_git = COMMIT.fullmatch(file.digest)  # of a small file: git's sha1
    new_hasher = partial(hashlib.sha1, b"blob %d\0" % file.size_bytes) if is_git else hashlib.sha256
    for _ in range(DIGEST_TRIES):
        with_retries(file.place, lambda: _download_rest(file, body, on_progress), body.tell)
        body.seek(0)
        digest = hashlib.file_digest(body, new_hasher).hexdigest()  # type: ignore[arg-type]  # BinaryIO has readinto
        if digest == file.digest:
            return
        body.truncate(body.seek(0))
    problem = f"{DIGEST_TRIES} times: the Hub publishes {file.digest}, the last download has {digest}"
    remedy = "A proxy or HF_ENDPOINT may be altering it: try another network."
    raise SourceInvalid(f"{file.place}: the download failed its checksum {problem}. {remedy}")


def _download_rest(file: SourceFile, body: BinaryIO, on_progress: Callable[[int], None]) -> None:
    if (start := body.seek(0, os.SEEK_END)) < file.size_bytes:
        with _open_response(file.place, {"Range": f"bytes={start}-"} if start else {}) as response:
            if start and response.status_code != HTTPStatus.PARTIAL_CONTENT:
                body.truncate(body.seek(0))  # the server ignored the range and sends the whole file
            for piece in response.iter_bytes():  # unbuffered, so that a dropped connection loses nothing
                body.write(piece)
                on_progress(body.tell())
    received_bytes = body.tell()
    if received_bytes > file.size_bytes:
        body.truncate(body.seek(0))
    if received_bytes != file.size_bytes:
        raise Transient(f"received {received_bytes:,} of {file.size_bytes:,} bytes")


@contextmanager
def _open_response(place: str, headers: dict[str, str]) -> Iterator["httpx2.Response"]:
    """The Hub's response for a file. The Hub redirects to another host, which does not receive the token."""
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    match = PLACE.fullmatch(place)
    assert match is not None
    url = hf_hub_url(match[1], match[3], repo_type="dataset", revision=match[2])
    headers = {**build_hf_headers(), "Accept-Encoding": "identity", **headers}
    with get_session().stream("GET", url, headers=headers, timeout=READ_SECONDS) as response:
        hf_raise_for_status(response)
        yield response


def with_retries(what: str, request: Callable[[], Result], received_bytes: Callable[[], int] = lambda: 0) -> Result:
    """Send a request until it succeeds. Raises ValueError, SourceInvalid, SourceUnavailable, which name `what`."""
    import httpx2
    from huggingface_hub import constants, errors

    endpoint = constants.ENDPOINT  # every error of the Hub's client quotes it
    if CREDENTIALS.search(endpoint) or not endpoint.startswith(("https://", "http://")):
        raise ValueError("HF_ENDPOINT should be https://HOST, without a password: the Hub's credential is HF_TOKEN.")
    backoff = Backoff(MAX_RETRY_AFTER_SECONDS)
    while True:
        try:
            return request()
        except (errors.HfHubHTTPError, httpx2.TransportError, ConnectionError, Transient) as error:
            _check_transient(what, error)
            headers = error.response.headers if isinstance(error, errors.HfHubHTTPError) else {}
            if problem := backoff.wait(parse_retry_after(headers.get("Retry-After")), received_bytes()):
                remedy = "Check the network and HF_ENDPOINT, then run the same command again."
                raise SourceUnavailable(f"{what}: {problem}, last error: {_first_line(error)}. {remedy}") from error


def _check_transient(what: str, error: Exception) -> None:
    """Raise an error that a retry cannot fix as ValueError, Conflict, SourceInvalid or SourceUnavailable."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        remedy = "Accept them on its Hub page, then set HF_TOKEN to a token of that account."
        raise ValueError(f"{what}: access requires an account that accepted the dataset's terms. {remedy}") from error
    if isinstance(error, errors.RevisionNotFoundError):
        raise ValueError(f"{what}: no such revision. Name a branch, a tag or a commit.") from error
    if isinstance(error, errors.RepositoryNotFoundError):
        problem = "no such dataset on the Hub (or it is private), and no such local file"
        remedy = "Check the name or the path; for a private dataset set HF_TOKEN to a token that has access."
        raise ValueError(f"{what}: {problem}. {remedy}") from error
    if isinstance(error, errors.OfflineModeIsEnabled):
        raise SourceUnavailable(f"{what}: HF_HUB_OFFLINE forbids requests to the Hub. Unset it.") from error
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code == HTTPStatus.PRECONDITION_FAILED:
        raise Conflict(f"{what}: others have committed meanwhile. Run the command again.") from error
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code not in RETRYABLE_STATUSES:
        answer = f"{error.response.status_code}: {_first_line(error)}"
        raise SourceInvalid(f"{what}: the Hub answered {answer}. Check HF_TOKEN and HF_ENDPOINT.") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".:")


@contextmanager
def _refused(dataset: str, config: str, commit: str) -> Iterator[None]:
    """Raise the errors of `datasets` for the name of a dataset or a configuration as ValueError."""
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError

    try:
        yield
    except (DatasetNotFoundError, DataFilesNotFoundError, ValueError, RuntimeError) as error:
        # ValueError: no such configuration; RuntimeError: the repository holds a loading script
        name = f"data.config = {config!r} of {dataset}" if config else dataset
        check = "Check the dataset's name (data.source, evaluation.hellaswag), or choose another data.config"
        copy = "(empty = default), or the Hub's copy: data.revision=refs/convert/parquet"
        raise ValueError(f"{name} at {commit}: {_first_line(error)}. {check} {copy}") from error

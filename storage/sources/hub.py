"""The Hugging Face Hub: which files a dataset has at one commit, and their bytes. Knows no store.

What a name, a configuration and a revision mean is asked of `datasets`, so it is what `load_dataset` would take. Token
and endpoint are HF_TOKEN and HF_ENDPOINT, which the Hub's client reads; the token is sent to the endpoint alone.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, BinaryIO, TypeVar

import httpx2
from huggingface_hub import HfApi, get_session, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]  # lazily there

from storage.errors import SourceInvalid, SourceUnavailable
from storage.sources.files import SUFFIXES, SourceFile
from storage.stores.retries import Patience, asked_seconds

SCHEME = "hf://datasets/"
PLACE = re.compile(r"hf://datasets/([^@]+)@([^/]+)/(.+)")
COMMIT = re.compile(r"[0-9a-f]{40}")
PASSING = {408, 429, 500, 502, 503, 504}
PATIENCE_SECONDS = 60.0
LONGEST_WAIT_SECONDS = 10.0
LONGEST_ASKED_SECONDS = 330.0  # the Hub counts requests in windows of 5 minutes and says how much is left of one
READ_SECONDS = 30.0  # without a byte
PIECE_BYTES = 1 << 20
WRONG_TRIES = 3  # of a whole file whose digest is not the published one
Answer = TypeVar("Answer")


class _Cut(Exception):
    """Fewer bytes came than were asked for."""


def resolve(dataset: str, revision: str) -> tuple[str, str]:
    """The commit that a revision is now, and the dataset's licence as its card says it: one request.

    Raises ValueError when there is no such dataset or revision, SourceUnavailable when the Hub does not answer.
    """
    found = _patiently(
        f"{dataset} at {revision}", lambda: HfApi().dataset_info(dataset, revision=revision, timeout=READ_SECONDS)
    )
    licence = found.card_data.get("license") if found.card_data else None
    return str(found.sha), ", ".join(licence) if isinstance(licence, list) else str(licence or "not stated")


def list_files(dataset: str, config: str, commit: str, split: str) -> tuple[SourceFile, ...]:
    """The files of one split of a configuration at a commit, in `load_dataset`'s order, with published digests."""
    from datasets import load_dataset_builder  # takes 1.5 s to import
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError

    def load() -> Any:
        try:
            return load_dataset_builder(dataset, config or None, revision=commit).config.data_files
        except (DatasetNotFoundError, DataFilesNotFoundError) as error:
            raise ValueError(f"{dataset} ({config}) at {commit}: {error} Check data.source and data.config.") from error
        except ValueError as error:
            if "BuilderConfig" not in str(error):
                raise
            raise ValueError(
                f"data.config = {config!r}: {dataset} has no such configuration. {error}. Name one of these: "
                f"--set data.config=…"
            ) from error

    data_files = _patiently(f"{dataset} ({config}) at {commit}", load)
    if split not in data_files:
        raise ValueError(
            f"{dataset} ({config}) at {commit}: split {split!r} was asked for, found {', '.join(data_files)}. "
            f"Choose another configuration: --set data.config=…"
        )
    names = [_taken_apart(place)[2] for place in data_files[split]]
    if other := [name for name in names if not name.endswith(SUFFIXES)]:
        raise ValueError(
            f"{dataset} ({config}) at {commit}: {' or '.join(SUFFIXES)} files were asked for, found {other[0]!r}. "
            f"Choose another configuration (--set data.config=…), or one of the Hub's parquet copies: "
            f"--set data.revision=refs/convert/parquet"
        )
    folder = _common_folder(names)
    entries = _patiently(f"the files of {dataset} at {commit}", lambda: _entries(dataset, commit, folder))
    return tuple(
        SourceFile(name, entries[name].size, _published(entries[name]), place_of(dataset, commit, name))
        for name in names
    )


def place_of(dataset: str, commit: str, name: str) -> str:
    """Where a file of a dataset lies at a commit."""
    return f"{SCHEME}{dataset}@{commit}/{name}"


def read_range(place: str, start: int, length: int) -> bytes:
    """`length` bytes of a file from `start`."""

    def ask() -> bytes:
        with _answer(place, {"Range": f"bytes={start}-{start + length - 1}"}) as response:
            body = response.read() if response.status_code == httpx2.codes.PARTIAL_CONTENT else b""
        if len(body) != length:
            raise _Cut(f"{length:,} bytes from {start:,} were asked for, {len(body):,} came")
        return body

    return _patiently(place, ask)


def fetch(file: SourceFile, body: BinaryIO, come: Callable[[int], None]) -> None:
    """Bring a file's bytes into `body`, going on where it ends, until they have the published digest.

    `come` is told how many bytes are there. Raises SourceInvalid when the digest is wrong again and again.
    """
    for _ in range(WRONG_TRIES):
        _patiently(file.place, lambda: _take(file, body, come), body.tell)
        found = content_digest(body, file)
        if found == file.digest:
            return
        body.seek(0)
        body.truncate()
    raise SourceInvalid(
        f"{file.place}: the Hub publishes {file.size_bytes:,} bytes of digest {file.digest}, "
        f"{WRONG_TRIES} times others came, {found} last. "
        f"Something on the way changes them (a proxy, HF_ENDPOINT): take another way."
    )


def content_digest(body: BinaryIO, file: SourceFile) -> str:
    """The digest of what is in `body`, of the kind that the file's is: a sha256, or git's sha1 of a small file."""
    git = COMMIT.fullmatch(file.digest) is not None
    hasher = hashlib.sha1(b"blob %d\0" % file.size_bytes) if git else hashlib.sha256()  # noqa: S324  # git's own
    body.seek(0)
    while piece := body.read(PIECE_BYTES):
        hasher.update(piece)
    return hasher.hexdigest()


def _take(file: SourceFile, body: BinaryIO, come: Callable[[int], None]) -> None:
    start = body.seek(0, 2)
    if start < file.size_bytes:
        with _answer(file.place, {"Range": f"bytes={start}-"} if start else {}) as response:
            if start and response.status_code != httpx2.codes.PARTIAL_CONTENT:  # all of it comes, from the beginning
                body.seek(0)
                body.truncate()
            for piece in response.iter_bytes():  # as it comes: a piece that waits to be full is lost with a connection
                body.write(piece)
                come(body.tell())
    if body.tell() != file.size_bytes:
        if body.tell() > file.size_bytes:
            body.seek(0)
            body.truncate()
        raise _Cut(f"{file.size_bytes:,} bytes were asked for, {body.tell():,} are there")


@contextmanager
def _answer(place: str, headers: dict[str, str]) -> Iterator[httpx2.Response]:
    """The Hub's answer for a file. It redirects to where the bytes lie: on another host the token is not sent."""
    dataset, commit, name = _taken_apart(place)
    url = hf_hub_url(dataset, name, repo_type="dataset", revision=commit)
    headers = {**build_hf_headers(), "Accept-Encoding": "identity", **headers}
    with get_session().stream("GET", url, headers=headers, timeout=READ_SECONDS) as response:
        hf_raise_for_status(response)
        yield response


def _patiently(what: str, ask: Callable[[], Answer], come: Callable[[], int] = lambda: 0) -> Answer:
    """The answer, asked again after what may pass; see `Patience`."""
    patience = Patience(PATIENCE_SECONDS, LONGEST_WAIT_SECONDS, LONGEST_ASKED_SECONDS)
    while True:
        try:
            return ask()
        except GatedRepoError as error:
            raise ValueError(
                f"{what}: its owner lets in only those who accepted its terms. Accept them on its page on the Hub, "
                f"then set HF_TOKEN to a token of that account."
            ) from error
        except RevisionNotFoundError as error:
            raise ValueError(f"{what}: there is no such revision. Name a branch, a tag or a commit.") from error
        except RepositoryNotFoundError as error:
            raise ValueError(
                f"{what}: nothing on this host is called so, and the Hub knows no such dataset, or shows it to its "
                f"members only. Check the name or the path; for a private dataset set HF_TOKEN."
            ) from error
        except OfflineModeIsEnabled as error:
            raise SourceUnavailable(f"{what}: HF_HUB_OFFLINE forbids asking the Hub. Unset it.") from error
        except HfHubHTTPError as error:
            if error.response.status_code not in PASSING:
                raise SourceInvalid(f"{what}: the Hub answered {error}. Check HF_TOKEN and HF_ENDPOINT.") from error
            problem: Exception = error
            asked = asked_seconds(error.response.headers.get("Retry-After"))
        except (httpx2.TransportError, ConnectionError, _Cut) as error:
            problem, asked = error, 0.0
        if not patience.waits(asked, come()):
            raise SourceUnavailable(
                f"{what}: no good answer in {patience.tries} tries and {patience.in_vain_seconds:.0f} s, last: "
                f"{str(problem).splitlines()[0]}. Check the network and HF_ENDPOINT, then run the same command "
                f"again: it goes on."
            ) from problem


def _entries(dataset: str, commit: str, folder: str | None) -> dict[str, Any]:
    tree = HfApi().list_repo_tree(dataset, folder, recursive=True, revision=commit, repo_type="dataset")
    return {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}


def _published(entry: Any) -> str:
    """The sha256 that the Hub publishes of a large file, or git's id of a small one."""
    return str(entry.lfs.sha256 if entry.lfs else entry.blob_id)


def _taken_apart(place: str) -> tuple[str, str, str]:
    found = PLACE.fullmatch(place)
    assert found is not None
    return found[1], found[2], found[3]


def _common_folder(names: list[str]) -> str | None:
    common = os.path.commonpath([str(PurePosixPath(name).parent) for name in names])
    return None if common in ("", ".") else common

"""The Hub client: names resolve as in `load_dataset`, and a download is complete and verified or fails."""

import io
import logging
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from storage.digests import sha256
from storage.errors import SourceInvalid, SourceUnavailable
from storage.sources import hub as client
from storage.sources.files import SourceFile, is_on_hub
from storage.stores import retries
from tests.hub import TOKEN, Fault, Hub

FILES = {f"data/part-{number}.parquet": bytes([65 + number]) * (100_000 + number) for number in range(5)}
STORED = "/stored/*/data/part-0.parquet"


@pytest.fixture(autouse=True)
def short_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "RETRY_SECONDS", 2.0)
    monkeypatch.setattr(client, "READ_SECONDS", 5.0)


def first_file(hub: Hub) -> SourceFile:
    hub.dataset("org/edu", FILES)
    commit, _ = client.resolve("org/edu", "main")
    file = client.list_files("org/edu", "default", commit, "train").files[0]
    hub.requests.clear()
    return file


def fetched(file: SourceFile, partial: bytes = b"") -> bytes:
    body = io.BytesIO(partial)
    client.fetch(file, body, lambda _: None)
    return body.getvalue()


@pytest.mark.parametrize("endpoint", ["http://user:sekret@127.0.0.1:1", "sekret.example"])
def test_a_wrong_endpoint_is_refused_at_once_and_not_echoed(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(retries.time, "sleep", lambda _: pytest.fail("retried"))
    with pytest.raises(ValueError, match="HF_ENDPOINT") as caught:
        client.resolve("org/edu", "main")
    assert "sekret" not in "".join(traceback.format_exception(caught.value))


# Names


def test_a_folder_with_the_form_of_a_hub_name_is_on_this_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_on_hub("my/texts")
    (tmp_path / "my/texts").mkdir(parents=True)
    assert not is_on_hub("my/texts")


def test_a_revision_resolves_to_a_commit_in_one_request(hub: Hub) -> None:
    repository = hub.dataset("org/edu", FILES)
    first = next(iter(repository.commits))
    assert client.resolve("org/edu", "main") == (first, "odc-by")
    assert len(hub.requests) == 1
    second = repository.commit(FILES | {"data/part-9.parquet": b"9"})
    assert client.resolve("org/edu", "main")[0] == second != first
    assert client.resolve("org/edu", first)[0] == first


def test_files_are_listed_in_order_with_their_published_digests(hub: Hub) -> None:
    repository = hub.dataset(
        "org/edu",
        FILES | dict.fromkeys(("data/small.jsonl", "data/.a.parquet", "data/README.md", "data/in/x.parquet"), b"x"),
        configs={"ten": {"train": "data/*.parquet"}},
    )
    (commit,) = repository.commits
    listing = client.list_files("org/edu", "ten", commit, "train")
    files = listing.files
    assert [(file.name, file.size_bytes) for file in files] == [(name, len(body)) for name, body in FILES.items()]
    assert [file.place for file in files] == [f"hf://datasets/org/edu@{commit}/{name}" for name in FILES]
    for file in files:
        assert fetched(file) == FILES[file.name]
        assert file.digest == sha256(FILES[file.name])  # git's id is of a pointer to the content
    assert len(listing.ignored) == 1  # in the folder of the split, but not in the split, and not hidden
    assert listing.ignored[0].startswith("data/small.jsonl: ")


@pytest.mark.parametrize("name", ["data/part-0.json.lz4", "data/part-0.jsonl.lzma"])
def test_files_of_another_format_are_refused_before_any_download(hub: Hub, name: str) -> None:
    repository = hub.dataset("org/edu", FILES | {name: b"text\nhello\n"}, configs={"ten": {"train": "data/*"}})
    with pytest.raises(ValueError, match=r"org/edu.*data"):
        client.list_files("org/edu", "ten", next(iter(repository.commits)), "train")
    assert hub.received("/stored/*") == []


def test_the_digest_of_a_small_file_is_its_git_id(hub: Hub) -> None:
    repository = hub.dataset("org/edu", {"data/a.jsonl": b'{"text": "a"}\n'})
    (file,) = client.list_files("org/edu", "default", next(iter(repository.commits)), "train").files
    assert len(file.digest) == 40
    assert fetched(file) == b'{"text": "a"}\n'


@pytest.mark.parametrize(
    ("dataset", "revision", "facts"),
    [("org/none", "main", ["org/none", "no such dataset", "HF_TOKEN"]), ("org/edu", "v9", ["v9", "no such revision"])],
)
def test_an_unknown_dataset_or_revision_is_named(hub: Hub, dataset: str, revision: str, facts: list[str]) -> None:
    hub.dataset("org/edu", FILES)
    with pytest.raises(ValueError, match=dataset) as caught:
        client.resolve(dataset, revision)
    assert all(fact in str(caught.value) for fact in facts)
    assert len(hub.requests) == 1


def test_an_unknown_configuration_or_split_is_refused_with_the_available_ones(hub: Hub) -> None:
    repository = hub.dataset("org/edu", FILES, configs={"one": {"train": "data/*"}, "two": {"test": "data/*"}})
    (commit,) = repository.commits
    with pytest.raises(ValueError, match=r"data\.config = 'three'.*one.*two"):
        client.list_files("org/edu", "three", commit, "train")
    with pytest.raises(ValueError, match=r"'train'.* test\..*data\.config"):
        client.list_files("org/edu", "two", commit, "train")


def test_a_repository_with_a_loading_script_is_refused(hub: Hub) -> None:
    repository = hub.dataset("org/edu", {"edu.py": b"raise SystemExit"})
    with pytest.raises(ValueError, match=r"org/edu.*script.*data\.config"):
        client.list_files("org/edu", "", next(iter(repository.commits)), "train")


def test_an_answer_of_several_lines_is_quoted_by_its_first(hub: Hub) -> None:
    hub.dataset("org/edu", FILES)
    hub.inject("*", "400")
    with pytest.raises(SourceInvalid, match=r"org/edu.*400.*HF_ENDPOINT") as caught:
        client.resolve("org/edu", "main")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["/api/datasets/org/edu*", "*README.md"])
@pytest.mark.parametrize("fault", ["500", "429", "reset"])
def test_metadata_requests_are_retried(hub: Hub, path: str, fault: Fault) -> None:
    files = FILES | {
        "data/part-9.parquet": f"{path} {fault}".encode()
    }  # distinct, because the client caches the card of a commit
    hub.dataset("org/edu", files)
    hub.inject(path, fault, fault)
    commit, _ = client.resolve("org/edu", "main")
    assert len(client.list_files("org/edu", "default", commit, "train").files) == len(files)
    assert hub.faults == []


def test_a_hub_that_never_responds_is_unavailable(hub: Hub) -> None:
    hub.dataset("org/edu", FILES)
    hub.inject("*", *["503"] * 1_000)  # type: ignore[arg-type]  # a thousand faults
    with pytest.raises(SourceUnavailable, match=r"org/edu.*503.*HF_ENDPOINT.*same command again"):
        client.resolve("org/edu", "main")
    assert len(hub.requests) < 100


def test_a_missing_licence_is_not_stated(hub: Hub) -> None:
    hub.dataset("org/edu", FILES, license=None)
    assert client.resolve("org/edu", "main")[1] == "not stated"


# Downloads


@pytest.mark.parametrize("fault", ["429", "500", "503", "reset", "cut", "short", "wrong"])
def test_a_download_is_complete_after_a_fault(hub: Hub, fault: Fault) -> None:
    file = first_file(hub)
    hub.inject(STORED, fault)
    assert fetched(file) == FILES[file.name]
    assert hub.faults == []
    assert len(hub.received(STORED)) == 2


@pytest.mark.parametrize("fault", ["cut", "short"])
def test_received_bytes_are_not_requested_again(hub: Hub, fault: Fault) -> None:
    file = first_file(hub)
    hub.inject(STORED, fault, fault)
    assert fetched(file) == FILES[file.name]
    ranges = [request.headers.get("range") for request in hub.received(STORED)]
    assert ranges == [None, "bytes=50000-", "bytes=75000-"]


def test_a_fetch_resumes_a_partial_download(hub: Hub) -> None:
    file = first_file(hub)
    assert fetched(file, FILES[file.name][:99_000]) == FILES[file.name]
    assert hub.received(STORED)[0].headers["range"] == "bytes=99000-"


@pytest.mark.parametrize(
    "partial", [FILES["data/part-0.parquet"], FILES["data/part-0.parquet"] + b"more", b"x" * 100_000]
)
def test_any_partial_download_ends_with_the_published_bytes(hub: Hub, partial: bytes) -> None:
    file = first_file(hub)
    assert fetched(file, partial) == FILES[file.name]
    assert len(hub.received(STORED)) == (0 if partial == FILES[file.name] else 1)


def test_a_server_that_ignores_ranges_restarts_the_download(hub: Hub) -> None:
    file = first_file(hub)
    hub.inject(STORED, "cut", "whole")
    assert fetched(file) == FILES[file.name]


def test_retry_after_extends_the_deadline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "RETRY_SECONDS", 0.5)
    file = first_file(hub)
    hub.inject(STORED, "429 later")
    began = time.monotonic()
    assert fetched(file) == FILES[file.name]
    assert time.monotonic() - began >= 1.0


def test_a_download_whose_digest_is_always_wrong_is_refused(hub: Hub) -> None:
    file = first_file(hub)
    hub.inject(STORED, *["wrong"] * 9)  # type: ignore[arg-type]
    body = io.BytesIO()
    with pytest.raises(SourceInvalid, match=rf"part-0.*checksum.*{file.digest}.*HF_ENDPOINT"):
        client.fetch(file, body, lambda _: None)
    assert body.getvalue() == b""
    assert len(hub.received(STORED)) == client.DIGEST_TRIES


@pytest.mark.parametrize("fault", [None, "429", "500", "reset", "cut", "short", "whole"])
def test_a_range_is_complete_after_a_fault(hub: Hub, fault: Fault | None) -> None:
    file = first_file(hub)
    if fault:
        hub.inject(STORED, fault)
    assert client.read_range(file.place, 99_990, 10) == FILES[file.name][99_990:]
    assert [request.headers["range"] for request in hub.received(STORED)] == ["bytes=99990-99999"] * (2 if fault else 1)


# Secrets


@pytest.fixture
def gated(hub: Hub) -> Iterator[SourceFile]:
    yield first_file(hub)


def test_a_gated_dataset_needs_a_token(hub: Hub, gated: SourceFile, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["org/edu"].gated = True
    with pytest.raises(ValueError, match=r"part-0.*terms.*HF_TOKEN"):
        fetched(gated)
    assert len(hub.requests) == 1
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert fetched(gated) == FILES[gated.name]


def test_the_token_goes_only_to_the_endpoint_and_into_no_message(
    hub: Hub, gated: SourceFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    caplog.set_level(logging.DEBUG)
    hub.inject("*", "500", "429", "reset")
    assert fetched(gated) == FILES[gated.name]
    hub.inject("*", *["500"] * 1_000)  # type: ignore[arg-type]
    messages = ""
    for request in (lambda: fetched(gated), lambda: client.resolve("org/edu", "main")):
        with pytest.raises(SourceUnavailable) as caught:
            request()
        messages += str(caught.value)
    with_token = {request.host for request in hub.requests if TOKEN in str(request.headers)}
    assert with_token == {"127.0.0.1"}
    assert "localhost" in {request.host for request in hub.requests}
    assert "org/edu" in messages
    assert TOKEN not in messages + caplog.text

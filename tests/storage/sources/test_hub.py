"""The Hub: what a name means there, and bytes that come whole or not at all, whatever its answers are."""

import io
import logging
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from storage.errors import SourceInvalid, SourceUnavailable
from storage.sources import hub as client
from storage.sources.files import SourceFile
from tests.hub import TOKEN, Fault, Hub

FILES = {f"data/part-{number}.parquet": bytes([65 + number]) * (100_000 + number) for number in range(5)}
STORED = "/stored/*/data/part-0.parquet"


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PATIENCE_SECONDS", 2.0)
    monkeypatch.setattr(client, "READ_SECONDS", 5.0)


def first_file(hub: Hub) -> SourceFile:
    hub.dataset("org/edu", FILES)
    commit, _ = client.resolve("org/edu", "main")
    found = client.list_files("org/edu", "default", commit, "train")[0]
    hub.requests.clear()
    return found


def fetched(file: SourceFile, body: bytes = b"") -> bytes:
    into = io.BytesIO(body)
    client.fetch(file, into, lambda _: None)
    return into.getvalue()


# What a name means


def test_a_revision_is_a_commit_and_one_request(hub: Hub) -> None:
    made = hub.dataset("org/edu", FILES)
    first = next(iter(made.commits))
    assert client.resolve("org/edu", "main") == (first, "odc-by")
    assert len(hub.requests) == 1
    second = made.commit(FILES | {"data/part-9.parquet": b"9"})
    assert client.resolve("org/edu", "main")[0] == second != first
    assert client.resolve("org/edu", first)[0] == first


def test_files_come_in_order_with_what_the_hub_publishes_of_them(hub: Hub) -> None:
    made = hub.dataset(
        "org/edu",
        FILES | {"data/small.jsonl": b"{}", "other/x.parquet": b"x"},
        configs={"ten": {"train": "data/*.parquet"}},
    )
    (commit,) = made.commits
    found = client.list_files("org/edu", "ten", commit, "train")
    assert [(file.name, file.size_bytes) for file in found] == [(name, len(body)) for name, body in FILES.items()]
    assert [file.place for file in found] == [f"hf://datasets/org/edu@{commit}/{name}" for name in FILES]
    for file in found:
        assert fetched(file) == FILES[file.name]


@pytest.mark.parametrize("name", ["data/part-0.csv", "data/part-0.json.gz"])
def test_files_of_another_kind_are_refused_before_any_comes(hub: Hub, name: str) -> None:
    made = hub.dataset("org/edu", FILES | {name: b"text\nhello\n"}, configs={"ten": {"train": "data/*"}})
    with pytest.raises(ValueError, match=r"org/edu.*\.parquet or \.jsonl.*part-0.*data\.config"):
        client.list_files("org/edu", "ten", next(iter(made.commits)), "train")
    assert hub.asked("/stored/*") == []


def test_a_small_file_has_gits_id_as_its_digest(hub: Hub) -> None:
    made = hub.dataset("org/edu", {"data/a.jsonl": b'{"text": "a"}\n'})
    (file,) = client.list_files("org/edu", "default", next(iter(made.commits)), "train")
    assert len(file.digest) == 40
    assert fetched(file) == b'{"text": "a"}\n'


@pytest.mark.parametrize(
    ("dataset", "revision", "words"),
    [("org/none", "main", ["org/none", "no such dataset", "HF_TOKEN"]), ("org/edu", "v9", ["v9", "no such revision"])],
)
def test_what_the_hub_does_not_know_is_said(hub: Hub, dataset: str, revision: str, words: list[str]) -> None:
    hub.dataset("org/edu", FILES)
    with pytest.raises(ValueError, match=dataset) as found:
        client.resolve(dataset, revision)
    assert all(word in str(found.value) for word in words)
    assert len(hub.requests) == 1


def test_a_configuration_and_a_split_that_are_not_there_are_refused_with_those_that_are(hub: Hub) -> None:
    made = hub.dataset("org/edu", FILES, configs={"one": {"train": "data/*"}, "two": {"test": "data/*"}})
    (commit,) = made.commits
    with pytest.raises(ValueError, match=r"data\.config = 'three'.*one.*two"):
        client.list_files("org/edu", "three", commit, "train")
    with pytest.raises(ValueError, match=r"'train' was asked for, found test"):
        client.list_files("org/edu", "two", commit, "train")


@pytest.mark.parametrize("path", ["/api/datasets/org/edu*", "*README.md"])
@pytest.mark.parametrize("fault", ["500", "429", "reset"])
def test_questions_are_asked_again(hub: Hub, path: str, fault: Fault) -> None:
    files = FILES | {"data/part-9.parquet": f"{path} {fault}".encode()}  # the client remembers the card of a commit
    hub.dataset("org/edu", files)
    hub.spoil(path, fault, fault)
    commit, _ = client.resolve("org/edu", "main")
    assert len(client.list_files("org/edu", "default", commit, "train")) == len(files)
    assert hub.faults == []


def test_a_hub_that_never_answers_is_said_to_be_unavailable(hub: Hub) -> None:
    hub.dataset("org/edu", FILES)
    hub.spoil("*", *["503"] * 1_000)  # type: ignore[arg-type]  # a fault, a thousand times
    with pytest.raises(SourceUnavailable, match=r"org/edu.*503.*HF_ENDPOINT.*run the same command again"):
        client.resolve("org/edu", "main")
    assert len(hub.requests) < 100


def test_a_licence_that_nobody_stated(hub: Hub) -> None:
    hub.dataset("org/edu", FILES, license=None)
    assert client.resolve("org/edu", "main")[1] == "not stated"


# Bytes


@pytest.mark.parametrize("fault", ["429", "500", "503", "reset", "cut", "short", "wrong"])
def test_a_file_comes_whole_through_a_fault(hub: Hub, fault: Fault) -> None:
    file = first_file(hub)
    hub.spoil(STORED, fault)
    assert fetched(file) == FILES[file.name]
    assert hub.faults == []
    assert len(hub.asked(STORED)) == 2


@pytest.mark.parametrize("fault", ["cut", "short"])
def test_what_had_come_is_not_asked_for_again(hub: Hub, fault: Fault) -> None:
    file = first_file(hub)
    hub.spoil(STORED, fault, fault)
    assert fetched(file) == FILES[file.name]
    asked = [request.headers.get("range") for request in hub.asked(STORED)]
    assert asked == [None, "bytes=50000-", "bytes=75000-"]


def test_a_fetch_goes_on_from_what_an_earlier_one_left(hub: Hub) -> None:
    file = first_file(hub)
    assert fetched(file, FILES[file.name][:99_000]) == FILES[file.name]
    assert hub.asked(STORED)[0].headers["range"] == "bytes=99000-"


@pytest.mark.parametrize("left", [FILES["data/part-0.parquet"], FILES["data/part-0.parquet"] + b"more", b"x" * 100_000])
def test_whatever_an_earlier_fetch_left_ends_with_the_published_bytes(hub: Hub, left: bytes) -> None:
    file = first_file(hub)
    assert fetched(file, left) == FILES[file.name]
    assert len(hub.asked(STORED)) == (0 if left == FILES[file.name] else 1)


def test_a_server_without_ranges_sends_all_of_it_again(hub: Hub) -> None:
    file = first_file(hub)
    hub.spoil(STORED, "cut", "whole")
    assert fetched(file) == FILES[file.name]


def test_retry_after_is_waited_for_beyond_ones_own_patience(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "PATIENCE_SECONDS", 0.5)
    file = first_file(hub)
    hub.spoil(STORED, "429 later")
    began = time.monotonic()
    assert fetched(file) == FILES[file.name]
    assert time.monotonic() - began >= 1.0


def test_bytes_that_are_never_the_published_ones_are_refused(hub: Hub) -> None:
    file = first_file(hub)
    hub.spoil(STORED, *["wrong"] * 9)  # type: ignore[arg-type]
    into = io.BytesIO()
    with pytest.raises(SourceInvalid, match=rf"part-0.*{file.digest}.*others came.*HF_ENDPOINT"):
        client.fetch(file, into, lambda _: None)
    assert into.getvalue() == b""
    assert len(hub.asked(STORED)) == client.WRONG_TRIES


@pytest.mark.parametrize("fault", [None, "429", "500", "reset", "cut", "short", "whole"])
def test_a_range_comes_whole_through_a_fault(hub: Hub, fault: Fault | None) -> None:
    file = first_file(hub)
    if fault:
        hub.spoil(STORED, fault)
    assert client.read_range(file.place, 99_990, 10) == FILES[file.name][99_990:]
    assert [request.headers["range"] for request in hub.asked(STORED)] == ["bytes=99990-99999"] * (2 if fault else 1)


# Secrets


@pytest.fixture
def gated(hub: Hub) -> Iterator[SourceFile]:
    yield first_file(hub)


def test_a_gated_dataset_wants_a_token(hub: Hub, gated: SourceFile, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["org/edu"].gated = True
    with pytest.raises(ValueError, match=r"part-0.*terms.*HF_TOKEN"):
        fetched(gated)
    assert len(hub.requests) == 1
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert fetched(gated) == FILES[gated.name]


def test_the_token_goes_to_the_endpoint_alone_and_into_no_message(
    hub: Hub, gated: SourceFile, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    caplog.set_level(logging.DEBUG)
    hub.spoil("*", "500", "429", "reset")
    said = ""
    assert fetched(gated) == FILES[gated.name]
    hub.spoil("*", *["500"] * 1_000)  # type: ignore[arg-type]
    for ask in (lambda: fetched(gated), lambda: client.resolve("org/edu", "main")):
        with suppress(SourceUnavailable):
            try:
                ask()
            except SourceUnavailable as error:
                said += str(error)
                raise
    with_token = {request.host for request in hub.requests if TOKEN in str(request.headers)}
    assert with_token == {"127.0.0.1"}
    assert "localhost" in {request.host for request in hub.requests}
    assert "org/edu" in said
    assert TOKEN not in said + caplog.text

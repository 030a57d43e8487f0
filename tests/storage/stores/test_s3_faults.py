"""Network faults are recovered or reported: never a wrong byte, a duplicate write or an endless wait."""

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import get_args

import boto3
import pytest

from storage.errors import Conflict, ObjectCorrupt, ObjectMissing, StoreUnavailable
from storage.stores import retries, s3_body, s3_client
from storage.stores.opening import open_store
from storage.stores.store import Store
from tests import servers
from tests.conftest import S3Url
from tests.proxy import Fault, Proxy, Request, running_proxy
from tests.storage.store_kinds import SERVERS, each, listed

BODY = os.urandom(300_000)
FAULTS = [fault for fault in get_args(Fault) if fault != "409"]


class FaultyStore:
    """A store behind a fault-injecting proxy; `next` holds the faults of the next requests."""

    def __init__(self) -> None:
        self.next: list[Fault | None] = []
        self.always: Callable[[Request], Fault | None] = lambda _: None
        self.proxy: Proxy
        self.store: Store

    def plan(self, request: Request) -> Fault | None:
        return self.next.pop(0) if self.next else self.always(request)

    def put_past_the_proxy(self, key: str, body: bytes) -> None:
        bucket, prefix = self.store.url.removeprefix("s3://").split("/")
        upstream = self.proxy.upstream.geturl()
        boto3.Session().client("s3", endpoint_url=upstream).put_object(Bucket=bucket, Key=f"{prefix}/{key}", Body=body)

    def requests_of(self, action: Callable[[], object]) -> list[Request]:
        """The requests sent by `action`."""
        before = len(self.proxy.requests)
        action()
        return self.proxy.requests[before:]


@pytest.fixture(params=each(SERVERS))
def faulty(
    request: pytest.FixtureRequest,
    running: Callable[[str], servers.Server],
    s3_url: S3Url,
    monkeypatch: pytest.MonkeyPatch,
    forget_client: Callable[[], None],
) -> Iterator[FaultyStore]:
    url = s3_url(request.param)
    monkeypatch.setattr(s3_client, "READ_SECONDS", 0.5)
    monkeypatch.setattr(s3_body, "PIECE_BYTES", 50_000)
    state = FaultyStore()
    with running_proxy(running(request.param).endpoint, state.plan) as state.proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", state.proxy.endpoint)
        forget_client()
        state.store = open_store(url, create=True)
        state.store.put_new("body", BODY)
        yield state


# Reading


@pytest.mark.parametrize("fault", FAULTS)
def test_a_read_returns_the_correct_bytes_after_any_fault(faulty: FaultyStore, fault: Fault) -> None:
    faulty.next = [fault]
    sent = faulty.requests_of(lambda: None if faulty.store.read("body").body == BODY else pytest.fail("other bytes"))
    assert len(sent) <= 2


def test_a_cut_body_is_resumed_from_the_same_object(faulty: FaultyStore) -> None:
    etag = faulty.store.read("body").etag
    faulty.next = ["cut", "cut", "cut"]  # bytes are kept from the second response on
    sent = faulty.requests_of(lambda: faulty.store.read("body"))
    assert "range" not in sent[0].headers and "range" not in sent[1].headers
    starts = [int(again.headers["range"].removeprefix("bytes=").split("-")[0]) for again in sent[2:]]
    assert 0 < starts[0] < starts[1] < len(BODY)
    assert [again.headers["if-match"] for again in sent[2:]] == [etag, etag]


def test_an_object_that_is_replaced_while_it_is_read_is_never_mixed(faulty: FaultyStore) -> None:
    other = os.urandom(len(BODY))

    def replace_before_the_third(request: Request) -> Fault | None:
        if request.number == first + 2:
            faulty.put_past_the_proxy("body", other)
        return "cut" if request.number < first + 2 else None

    first = len(faulty.proxy.requests)
    faulty.always = replace_before_the_third
    assert faulty.store.read("body").body == other


def test_a_range_is_correct_after_a_fault(faulty: FaultyStore) -> None:
    for fault in ("cut", "reset", "503"):
        faulty.next = [None, fault]  # the first request asks for the size
        assert faulty.store.read_range("body", 1000, 200_000) == BODY[1000:201_000]


def test_an_object_damaged_in_the_store_is_reported_after_three_tries(faulty: FaultyStore) -> None:
    faulty.always = lambda request: "flip" if request.method == "GET" else None

    def read() -> None:
        with pytest.raises(ObjectCorrupt, match=r"body.*sha256.*delete"):
            faulty.store.read("body")

    assert len(faulty.requests_of(read)) == 3


def test_an_oversized_object_is_refused_before_its_body_is_read(faulty: FaultyStore) -> None:
    faulty.always = lambda _: "stall in body"
    started = time.monotonic()
    with pytest.raises(ObjectCorrupt, match=f"{len(BODY):,} bytes.*1,000"):
        faulty.store.read("body", 1000)
    assert time.monotonic() - started < s3_client.READ_SECONDS


# Writing


@pytest.mark.parametrize("fault", get_args(Fault))
def test_a_put_creates_one_object_after_any_fault(faulty: FaultyStore, fault: Fault) -> None:
    faulty.next = [fault]
    etag = faulty.store.put_new("new", BODY)
    assert faulty.store.read("new")[:2] == (BODY, etag)
    with pytest.raises(Conflict):
        faulty.store.put_new("new", BODY[::-1])


@pytest.mark.parametrize("fault", get_args(Fault))
def test_a_swap_happens_once_after_any_fault(faulty: FaultyStore, fault: Fault) -> None:
    first = faulty.store.swap("pointer", b"one", None)
    faulty.next = [fault]
    second = faulty.store.swap("pointer", b"two", first)
    assert faulty.store.read("pointer")[:2] == (b"two", second)
    with pytest.raises(Conflict):
        faulty.store.swap("pointer", b"three", first)


def test_a_put_that_lost_the_race_is_refused_after_a_lost_request(faulty: FaultyStore) -> None:
    faulty.store.put_new("taken", b"theirs")
    for fault in ("reset", "lost"):
        faulty.next = [fault]
        with pytest.raises(Conflict):
            faulty.store.put_new("taken", b"ours")
    assert faulty.store.read("taken").body == b"theirs"


def test_a_persistent_conflict_is_a_lost_race(faulty: FaultyStore) -> None:
    etag = faulty.store.put_new("pointer", b"one")
    faulty.always = lambda request: "409" if request.method == "PUT" else None
    with pytest.raises(Conflict):
        faulty.store.put_new("other", b"1")
    with pytest.raises(Conflict):
        faulty.store.swap("pointer", b"two", etag)


def test_one_of_several_racing_writers_wins_although_responses_are_lost(faulty: FaultyStore) -> None:
    faulty.always = lambda request: "lost" if request.method == "PUT" and request.number % 3 == 0 else None

    def write(number: int) -> str | None:
        try:
            return faulty.store.put_new("raced", f"writer {number}".encode()) and f"writer {number}"
        except Conflict:
            return None

    with ThreadPoolExecutor(4) as pool:
        won = [name for name in pool.map(write, range(8)) if name]
    assert [faulty.store.read("raced").body.decode()] == won


def test_retry_after_is_honoured(faulty: FaultyStore) -> None:
    faulty.next = ["503 later"]
    started = time.monotonic()
    faulty.store.read("body")
    assert time.monotonic() - started >= 1


def test_retries_end_at_the_deadline_with_a_remedy(faulty: FaultyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "RETRY_SECONDS", 1.0)
    faulty.always = lambda _: "reset"
    started = time.monotonic()
    with pytest.raises(StoreUnavailable, match=r"read 'body'.*tries.*AWS_ENDPOINT_URL.*same command again"):
        faulty.store.read("body")
    assert time.monotonic() - started < 3


def test_a_missing_object_costs_one_request(faulty: FaultyStore) -> None:
    def read() -> None:
        with pytest.raises(ObjectMissing):
            faulty.store.read("none")

    assert len(faulty.requests_of(read)) == 1


def test_listing_and_deleting_are_correct_after_faults(faulty: FaultyStore) -> None:
    faults: list[Fault] = ["reset", "cut", "lost"]
    for fault in faults:
        faulty.next = [fault]
        assert listed(faulty.store, "bo") == ["body"]
        faulty.store.put_new("gone", b"1")
        faulty.next = [fault]
        faulty.store.delete("gone")
        assert listed(faulty.store, "gone") == []


def test_received_bytes_restart_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    now, received = [0.0], [0]
    monkeypatch.setattr(retries.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(retries.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))

    def slow(progress: int) -> None:
        now[0] += 50
        received[0] += progress
        if received[0] < 10:
            raise ConnectionResetError

    s3_client.with_retries("s3://x", "read", lambda: slow(1), lambda: received[0])
    received[0] = 0
    with pytest.raises(StoreUnavailable, match="3 tries"):
        s3_client.with_retries("s3://x", "read", lambda: slow(0), lambda: received[0])

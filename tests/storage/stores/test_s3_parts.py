"""Multipart uploads are atomic and conditional, and leave no parts after a failure or a clean-up."""

import os
import time
from collections.abc import Callable, Iterator

import boto3
import pytest

from storage.errors import Conflict, StorageError
from storage.stores import retries, s3, s3_client
from storage.stores.opening import open_store
from storage.stores.store import Store
from tests import servers
from tests.conftest import S3Url
from tests.proxy import Fault, Proxy, Request, running_proxy
from tests.storage.store_kinds import SERVERS, each, listed

BODY = os.urandom(5 << 20) * 3 + b"and a short last part"
PARTS = 4


class Parts:
    """A store behind a proxy; it uploads objects over 6 MiB in parts of 5 MiB."""

    kind: str
    store: Store
    proxy: Proxy

    def __init__(self) -> None:
        self.fault: Callable[[Request], Fault | None] = lambda _: None

    def plan(self, request: Request) -> Fault | None:
        return self.fault(request)


@pytest.fixture(params=each(SERVERS))
def parts(
    request: pytest.FixtureRequest,
    running: Callable[[str], servers.Server],
    s3_url: S3Url,
    monkeypatch: pytest.MonkeyPatch,
    forget_client: Callable[[], None],
) -> Iterator[Parts]:
    url = s3_url(request.param)
    monkeypatch.setattr(s3, "WHOLE_BYTES", 6 << 20)
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    state = Parts()
    state.kind = request.param
    with running_proxy(running(request.param).endpoint, state.plan) as state.proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", state.proxy.endpoint)
        forget_client()
        state.store = open_store(url, create=True)
        state.store.put_new("warm", b"1")
        yield state


def uploads(store: Store, key: str) -> list[str]:
    """The unfinished uploads that the server lists for this key."""
    bucket, prefix = store.url.removeprefix("s3://").split("/")
    page = s3_client.own_client().list_multipart_uploads(Bucket=bucket, Prefix=f"{prefix}/{key}")
    return [upload["UploadId"] for upload in page.get("Uploads", [])]


def test_a_body_in_parts_is_one_object_and_create_only(parts: Parts) -> None:
    etag = parts.store.put_new("large", BODY)
    assert parts.store.read("large")[:2] == (BODY, etag)
    with pytest.raises(Conflict):
        parts.store.put_new("large", BODY[::-1])
    assert parts.store.read("large").body == BODY
    assert uploads(parts.store, "large") == []
    parts.store.swap("large", BODY[::-1], etag)
    assert parts.store.read("large").body == BODY[::-1]


@pytest.mark.parametrize("fault", ["500", "reset", "lost", "flip up"])
def test_only_the_part_that_failed_is_sent_again(parts: Parts, fault: Fault) -> None:
    failing = {"partNumber=2": fault}
    parts.fault = lambda request: next((failing.pop(name) for name in list(failing) if name in request.path), None)
    parts.store.put_new("large", BODY)
    assert parts.store.read("large").body == BODY
    sent = [request.path for request in parts.proxy.requests if "partNumber" in request.path]
    assert len(sent) == PARTS + 1
    assert sum("partNumber=2" in path for path in sent) == 2


def test_a_completion_whose_response_was_lost_is_a_success(parts: Parts) -> None:
    lost: list[Fault] = ["lost"]
    parts.fault = lambda request: (
        lost.pop() if request.method == "POST" and "uploadId" in request.path and lost else None
    )
    etag = parts.store.put_new("large", BODY)
    assert parts.store.read("large")[:2] == (BODY, etag)


def test_an_upload_that_fails_is_aborted(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "RETRY_SECONDS", 0.3)
    parts.fault = lambda request: "reset" if "partNumber=3" in request.path else None
    with pytest.raises(StorageError, match="part 3 of 'large'"):
        parts.store.put_new("large", BODY)
    assert listed(parts.store, "large") == []
    assert uploads(parts.store, "large") == []


def test_an_old_unfinished_upload_is_listed_and_aborted(parts: Parts) -> None:
    bucket, prefix = parts.store.url.removeprefix("s3://").split("/")
    began = boto3.Session().client("s3").create_multipart_upload(Bucket=bucket, Key=f"{prefix}/large")["UploadId"]
    assert uploads(parts.store, "large") == [began]
    assert list(parts.store.unfinished(time.time() - 3600, remove=True)) == []
    lists_all = parts.kind != "minio"  # MinIO lists uploads of one key only, and aborts all after 24 hours
    assert list(parts.store.unfinished(time.time() + 3600)) == (["upload of large"] if lists_all else [])
    assert uploads(parts.store, "large") == [began]
    list(parts.store.unfinished(time.time() + 3600, remove=True))
    assert uploads(parts.store, "large") == ([] if lists_all else [began])

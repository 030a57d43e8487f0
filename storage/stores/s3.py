"""A store in an S3 bucket: MinIO, SeaweedFS, AWS and compatible servers. Knows no dataset and no run.

Every put carries its SHA-256 and a condition. Every body is hashed while it streams, and resumed if it is cut.
A write whose response was lost is recognised by reading the object back: writers that must differ store a commit_id.
"""

import mimetypes
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from botocore.exceptions import ClientError

from storage import keys
from storage.digests import sha256
from storage.errors import AlreadyExists, Conflict, ObjectCorrupt, ObjectMissing, StorageError, StoreUnusable
from storage.stores.retries import Transient
from storage.stores.s3_body import ResumableBody, base64_sha256, stored_sha256
from storage.stores.s3_client import (
    DAMAGED_TRIES,
    Result,
    check_endpoint,
    code,
    link_client,
    own_client,
    status,
    with_retries,
)
from storage.stores.s3_multipart import abort, uploaded_parts
from storage.stores.store import LIMIT_BYTES, LINK_SECONDS, Body, Capabilities, Object, Stat, check_conditions

WHOLE_BYTES = 1 << 26  # one request up to this size: a shard of 20 MB in parts costs five times the CPU time
CONFLICT_TRIES = 3  # a server answers 409 briefly while it settles another write


class S3Store:
    """Objects below a prefix of one bucket. In a `foreign` bucket, which is only read, any name is a key."""

    checked_buckets: ClassVar[set[tuple[str, str]]] = set()  # (endpoint, bucket) that honour conditional writes
    _check_lock = threading.RLock()

    def __init__(self, bucket: str, prefix: str, url: str, *, plain_http: bool, foreign: bool = False) -> None:
        self.url = url
        self._foreign = foreign
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._endpoint = str(own_client().meta.endpoint_url)
        check_endpoint(url, self._endpoint, plain_http=plain_http)

    def read(self, key: str, limit_bytes: int = LIMIT_BYTES) -> Object:
        for _ in range(DAMAGED_TRIES):  # damage in transit disappears with the next try
            received = self._receive(key, ResumableBody(limit_bytes))
            digest = received.hasher.hexdigest()
            if received.stored_sha256 in (None, digest):
                return Object(received.body, received.etag, digest)
        raise ObjectCorrupt(
            f"object {key!r} of store {self.url!r}: its bytes have sha256 {digest}, the store recorded "
            f"{received.stored_sha256}. It is damaged in the store: delete it, then run the command that made it again."
        )

    def read_range(self, key: str, start: int, length: int) -> bytes:
        length = min(length, self.stat(key).size - start)
        return bytes(self._receive(key, ResumableBody(length, start)).body) if length > 0 else b""

    def put_new(self, key: str, body: Body) -> str:
        return self._write(key, body, None, AlreadyExists(f"object {key!r} of store {self.url!r} already exists."))

    def swap(self, key: str, body: Body, etag: str | None) -> str:
        conflict = Conflict(f"object {key!r} of store {self.url!r} has changed since it was read.")
        return self._write(key, body, etag, conflict)

    def stat(self, key: str) -> Stat:
        head = self._request(f"stat {key!r}", "head_object", key, ChecksumMode="ENABLED")
        return Stat(key, head["ContentLength"], head["LastModified"].timestamp(), stored_sha256(head))

    def list(self, prefix: str) -> Iterator[Stat]:
        if prefix and not self._foreign and not keys.is_key(prefix.removesuffix("/")):
            return  # MinIO refuses such a prefix, SeaweedFS reads it as another one
        parameters = {"Bucket": self._bucket, "Prefix": self._prefix + prefix}
        while True:
            page = self._retried(f"list {prefix!r}", partial(own_client().list_objects_v2, **parameters))
            for entry in page.get("Contents", []):
                key = entry["Key"].removeprefix(self._prefix)
                if self._foreign or keys.is_key(key):  # other programs may keep their own objects in the bucket
                    yield Stat(key, entry["Size"], entry["LastModified"].timestamp())
            if not page.get("IsTruncated"):
                return
            parameters["ContinuationToken"] = page["NextContinuationToken"]

    def delete(self, key: str) -> None:
        with suppress(ObjectMissing):
            self._request(f"delete {key!r}", "delete_object", key)

    def probe(self) -> Capabilities:
        server = self._server()
        self._check_conditions(server)
        key = keys.probe(secrets.token_hex(8))
        damaged = {"Body": b"body", "ChecksumSHA256": base64_sha256(b"another body")}
        try:
            self._request("probe checksums", "put_object", key, **damaged)
        except StoreUnusable:
            return Capabilities(server, refuses_damaged=True)
        self.delete(key)
        return Capabilities(server, refuses_damaged=False)

    def unfinished(self, before: float, *, remove: bool = False) -> tuple[str, ...]:
        parameters = {"Bucket": self._bucket, "Prefix": self._prefix}
        leftovers = []
        while True:
            page = self._retried("list uploads", partial(own_client().list_multipart_uploads, **parameters))
            for upload in page.get("Uploads", []):
                key = upload["Key"].removeprefix(self._prefix)
                if keys.is_key(key) and upload["Initiated"].timestamp() < before:
                    leftovers.append(f"upload of {key}")
                    if remove:
                        abort(self._request, key, upload["UploadId"])
            if not page.get("IsTruncated"):
                return tuple(leftovers)
            parameters |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def local_path(self, key: str) -> Path | None:
        keys.check_key(key)
        return None

    def link(self, key: str, endpoint: str = "") -> str:
        parameters = {"Bucket": self._bucket, "Key": self._prefix + keys.check_key(key)}
        parameters["ResponseContentType"] = mimetypes.guess_type(key)[0] or "application/octet-stream"
        client = link_client(endpoint)  # signs on this host, without a request
        return str(client.generate_presigned_url("get_object", Params=parameters, ExpiresIn=LINK_SECONDS))

    def _write(self, key: str, body: Body, etag: str | None, lost: StorageError) -> str:
        """Write if the object has `etag` (None: is absent) and return the new etag, else raise `lost`."""
        keys.check_key(key)
        with self._check_lock:  # no thread writes before the first check has passed
            if (self._endpoint, self._bucket) not in self.checked_buckets:
                self._check_conditions(self._server())
        if len(body) <= WHOLE_BYTES:
            send = partial(self._call, "put_object", key, Body=bytes(body), ChecksumSHA256=base64_sha256(body))
            return self._write_if(key, body, etag, lost, send)
        with uploaded_parts(self._request, key, body) as parameters:
            send = partial(self._call, "complete_multipart_upload", key, **parameters)
            return self._write_if(key, body, etag, lost, send)

    def _write_if(self, key: str, body: Body, etag: str | None, lost: StorageError, send: Callable[..., Any]) -> str:
        """Call `send` if the object has `etag` (None: is absent), else raise `lost` unless it holds `body` already."""
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
        tries = 0

        def request() -> str:
            nonlocal tries
            tries += 1
            try:
                # Check before resending a body: MinIO refuses a long one by closing the connection.
                if tries == 1 or self._etag(key) == etag:
                    return str(send(**condition)["ETag"])
            except ClientError as error:
                if status(error) not in (404, 409, 412) or code(error) == "NoSuchBucket":
                    raise
                if status(error) == 409 and tries < CONFLICT_TRIES:
                    raise Transient(str(error)) from error
            stored_etag = self._etag_of(key, body) if tries > 1 else None
            if stored_etag is None:
                raise lost
            return stored_etag  # an earlier try was stored and only its response was lost

        return self._retried(f"write {key!r}", request)

    def _etag(self, key: str) -> str | None:
        """The object's etag, or None if it is absent; without retries."""
        try:
            return str(self._call("head_object", key)["ETag"])
        except ClientError as error:
            if status(error) != 404:
                raise
            return None

    def _etag_of(self, key: str, body: Body) -> str | None:
        """The object's etag if it holds exactly `body`."""
        try:
            stored = self.read(key, len(body))
        except (ObjectMissing, ObjectCorrupt):
            return None
        return stored.etag if stored.sha256 == sha256(body) else None

    def _check_conditions(self, server: str) -> None:
        place = (self._endpoint, self._bucket)
        self.checked_buckets.add(place)  # so that the check's own writes do not start another check
        try:
            check_conditions(self, server)
        except BaseException:
            self.checked_buckets.discard(place)
            raise

    def _server(self) -> str:
        """The name that the server gives itself, and its endpoint."""
        response = self._retried("reach the bucket", partial(own_client().head_bucket, Bucket=self._bucket))
        name = response["ResponseMetadata"]["HTTPHeaders"].get("server", "an unnamed server")
        return f"{name} at {self._endpoint}"

    def _receive(self, key: str, body: ResumableBody) -> ResumableBody:
        def request() -> ResumableBody:
            try:
                return body.receive(self._call("get_object", key, **body.request_parameters()))
            except ClientError as error:
                if status(error) != 412:
                    raise
                body.restart()
                raise Transient("the object was replaced while it was read") from error

        return with_retries(self.url, f"read {key!r}", request, lambda: body.received_bytes)

    def _request(self, action: str, verb: str, key: str, **parameters: Any) -> Any:
        """The response to one request about a key, with retries."""
        return self._retried(action, partial(self._call, verb, key, **parameters))

    def _call(self, verb: str, key: str, **parameters: Any) -> Any:
        key = key if self._foreign else keys.check_key(key)
        return getattr(own_client(), verb)(Bucket=self._bucket, Key=self._prefix + key, **parameters)

    def _retried(self, action: str, request: Callable[[], Result]) -> Result:
        return with_retries(self.url, action, request)

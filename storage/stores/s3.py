"""A store in an S3 bucket: MinIO, SeaweedFS, AWS and their like. Knows no dataset and no run.

Every put carries its SHA-256 and a condition, every body is hashed while it comes in and taken up again where it was
cut. A write whose answer was lost is recognised by reading back: what must be told apart holds a commit_id.
"""

import hashlib
import mimetypes
import secrets
import threading
from base64 import b64encode
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from storage import keys
from storage.digests import sha256
from storage.errors import AlreadyExists, Conflict, ObjectCorrupt, ObjectMissing, StorageError, StoreUnusable
from storage.stores.s3_body import Incoming, kept_sha256
from storage.stores.s3_client import (
    DAMAGED_TRIES,
    Answer,
    Passing,
    check_endpoint,
    code,
    link_client,
    own_client,
    patiently,
    status,
)
from storage.stores.store import LIMIT_BYTES, LINK_SECONDS, Body, Capabilities, Object, Stat, check_conditions

PART_BYTES = 1 << 25  # 32 MiB, 4 at a time: as fast as any of those measured
PARTS_AT_ONCE = 4
WHOLE_BYTES = 1 << 26  # one request up to here: a shard of 20 MB in parts costs five times the processor time
CONFLICT_TRIES = 3  # a server that is settling another write answers 409 for a moment
probing = threading.RLock()
honest: set[tuple[str, str]] = set()  # (endpoint, bucket) whose conditions this process has seen to hold


class S3Store:
    """Objects below a prefix of one bucket. In a bucket that is not ours (`foreign`) every key is an object."""

    def __init__(self, bucket: str, prefix: str, url: str, *, plain_http: bool, foreign: bool = False) -> None:
        self.url = url
        self._foreign = foreign
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._endpoint = str(own_client().meta.endpoint_url)
        check_endpoint(url, self._endpoint, plain_http=plain_http)

    def read(self, key: str, limit_bytes: int = LIMIT_BYTES) -> Object:
        """The whole object. Raises ObjectMissing, and ObjectCorrupt for a damaged one or more than `limit_bytes`."""
        for _ in range(DAMAGED_TRIES):  # what was damaged on its way comes whole the next time
            found = self._receive(key, Incoming(limit_bytes))
            digest = found.hasher.hexdigest()
            if found.kept_sha256 in (None, digest):
                return Object(found.body, found.etag, digest)
        raise ObjectCorrupt(
            f"object {key!r} of store {self.url!r}: the store keeps sha256 {found.kept_sha256} of it, its bytes have "
            f"{digest}. It is damaged in the store: delete it, then run the command that made it again."
        )

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`, fewer where the object ends. Raises ObjectMissing."""
        length = min(length, self.stat(key).size - start)
        return bytes(self._receive(key, Incoming(length, start)).body) if length > 0 else b""

    def put_new(self, key: str, body: Body) -> str:
        """Create the object and return its etag. Of any number of racing writers one wins; raises AlreadyExists."""
        lost = AlreadyExists(f"object {key!r} of store {self.url!r} is there already.")
        return self._write(key, body, None, lost)

    def swap(self, key: str, body: Body, etag: str | None) -> str:
        """Replace the object that `etag` names (None: there is none yet), return the new etag. Raises Conflict."""
        lost = Conflict(f"object {key!r} of store {self.url!r} is not the one that was read.")
        return self._write(key, body, etag, lost)

    def stat(self, key: str) -> Stat:
        """Size, time and kept sha256 of the object. Raises ObjectMissing."""
        found = self._ask(f"look at {key!r}", lambda: self._call("head_object", key, ChecksumMode="ENABLED"))
        return Stat(key, found["ContentLength"], found["LastModified"].timestamp(), kept_sha256(found))

    def list(self, prefix: str) -> Iterator[Stat]:
        """Every object whose key begins with `prefix`; SeaweedFS sorts by folder, others by key."""
        if prefix and not self._foreign and not keys.is_key(prefix.removesuffix("/")):
            return  # MinIO refuses such a prefix, SeaweedFS reads it as another
        asked: dict[str, str] = {"Bucket": self._bucket, "Prefix": self._prefix + prefix}
        while True:
            page = self._ask(f"list {prefix!r}", partial(own_client().list_objects_v2, **asked))
            for found in page.get("Contents", []):
                key = found["Key"].removeprefix(self._prefix)
                if self._foreign or keys.is_key(key):  # whatever else lies in our bucket is none of our objects
                    yield Stat(key, found["Size"], found["LastModified"].timestamp())
            if not page.get("IsTruncated"):
                return
            asked["ContinuationToken"] = page["NextContinuationToken"]

    def delete(self, key: str) -> None:
        """Remove the object; nothing happens when it is not there."""
        with suppress(ObjectMissing):
            self._ask(f"delete {key!r}", lambda: self._call("delete_object", key))

    def probe(self) -> Capabilities:
        """Prove that conditional writes are honoured. Raises StoreUnusable when they are not."""
        server = self._server()
        self._check_conditions(server)
        key = keys.probe(secrets.token_hex(8))
        damaged = {"Body": b"body", "ChecksumSHA256": _base64_sha256(b"as it was sent")}
        try:
            self._ask("probe checksums", lambda: self._call("put_object", key, **damaged))
        except StoreUnusable:
            return Capabilities(server, refuses_damaged=True)
        self.delete(key)
        return Capabilities(server, refuses_damaged=False)

    def unfinished(self, before: float, *, remove: bool = False) -> tuple[str, ...]:
        """Uploads in parts that were begun before a time (Unix seconds) and never ended; aborted when asked."""
        asked = {"Bucket": self._bucket, "Prefix": self._prefix}
        found = []
        while True:
            page = self._ask("list uploads", partial(own_client().list_multipart_uploads, **asked))
            for upload in page.get("Uploads", []):
                key = upload["Key"].removeprefix(self._prefix)
                if keys.is_key(key) and upload["Initiated"].timestamp() < before:
                    found.append(f"upload of {key}")
                    if remove:
                        self._abort(key, upload["UploadId"])
            if not page.get("IsTruncated"):
                return tuple(found)
            asked |= {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}

    def local_path(self, key: str) -> Path | None:
        """No object lies on this host."""
        keys.check_key(key)
        return None

    def link(self, key: str, endpoint: str = "") -> str:
        """Where a browser opens the object for LINK_SECONDS: signed here, without a request."""
        asked = {"Bucket": self._bucket, "Key": self._prefix + keys.check_key(key)}
        asked["ResponseContentType"] = mimetypes.guess_type(key)[0] or "application/octet-stream"
        return str(link_client(endpoint).generate_presigned_url("get_object", Params=asked, ExpiresIn=LINK_SECONDS))

    def _write(self, key: str, body: Body, etag: str | None, lost: StorageError) -> str:
        """Replace the object of that etag (None: none) and return the new one; raise `lost` when it is another."""
        keys.check_key(key)
        with probing:  # no thread writes before the first probe has ended
            if (self._endpoint, self._bucket) not in honest:
                self._check_conditions(self._server())
        if len(body) <= WHOLE_BYTES:
            whole = {"Body": bytes(body), "ChecksumSHA256": _base64_sha256(body)}
            return self._conditionally(key, body, etag, lost, partial(self._call, "put_object", key, **whole))
        upload = self._ask(
            f"begin {key!r}", lambda: self._call("create_multipart_upload", key, ChecksumAlgorithm="SHA256")
        )["UploadId"]
        try:
            parts = {"UploadId": upload, "MultipartUpload": {"Parts": self._put_parts(key, upload, memoryview(body))}}
            complete = partial(self._call, "complete_multipart_upload", key, **parts)
            return self._conditionally(key, body, etag, lost, complete)
        except BaseException:
            with suppress(StorageError):
                self._abort(key, upload)
            raise

    def _conditionally(
        self, key: str, body: Body, etag: str | None, lost: StorageError, send: Callable[..., Any]
    ) -> str:
        """Send while the object at the key is the one of that etag (None: none); else it is ours already, or lost."""
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
        tries = 0

        def request() -> str:
            nonlocal tries
            tries += 1
            try:
                # Looked at before a body is sent again: MinIO refuses a long one by closing the connection.
                if tries == 1 or self._etag(key) == etag:
                    return str(send(**condition)["ETag"])
            except ClientError as error:
                if status(error) not in (404, 409, 412) or code(error) == "NoSuchBucket":
                    raise
                if status(error) == 409 and tries < CONFLICT_TRIES:
                    raise Passing(str(error)) from error
            if tries > 1 and (ours := self._holds(key, body)):
                return ours  # an earlier try was stored and only its answer was lost
            raise lost

        return self._ask(f"write {key!r}", request)

    def _etag(self, key: str) -> str | None:
        try:
            return str(self._call("head_object", key)["ETag"])
        except ClientError as error:
            if status(error) != 404:
                raise
            return None

    def _put_parts(self, key: str, upload: str, body: memoryview) -> Sequence[dict[str, Any]]:
        def put(start: int) -> dict[str, Any]:
            part = body[start : start + PART_BYTES]
            number, digest = 1 + start // PART_BYTES, _base64_sha256(part)
            asked = {"UploadId": upload, "PartNumber": number, "ChecksumSHA256": digest, "Body": bytes(part)}
            reply = self._ask(f"write part {number} of {key!r}", lambda: self._call("upload_part", key, **asked))
            return {"PartNumber": number, "ETag": reply["ETag"], "ChecksumSHA256": digest}

        with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
            try:
                return list(pool.map(put, range(0, len(body), PART_BYTES)))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _abort(self, key: str, upload: str) -> None:
        with suppress(ObjectMissing):
            self._ask(f"abort {key!r}", lambda: self._call("abort_multipart_upload", key, UploadId=upload))

    def _holds(self, key: str, body: Body) -> str | None:
        """The etag of the object when it holds just these bytes."""
        try:
            found = self.read(key, len(body))
        except (ObjectMissing, ObjectCorrupt):
            return None
        return found.etag if found.sha256 == sha256(body) else None

    def _check_conditions(self, server: str) -> None:
        place = (self._endpoint, self._bucket)
        honest.add(place)  # or the probe's own writes would ask for a probe
        try:
            check_conditions(self, server)
        except BaseException:
            honest.discard(place)
            raise

    def _server(self) -> str:
        """What answers, in its own words."""
        answer = self._ask("reach the bucket", lambda: own_client().head_bucket(Bucket=self._bucket))
        name = answer["ResponseMetadata"]["HTTPHeaders"].get("server", "a server without a name")
        return f"{name} at {self._endpoint}"

    def _receive(self, key: str, found: Incoming) -> Incoming:
        def request() -> Incoming:
            try:
                return found.take(self._call("get_object", key, **found.rest()))
            except ClientError as error:
                if status(error) != 412:
                    raise
                found.restart()
                raise Passing("it was replaced while it was read") from error

        return patiently(self.url, f"read {key!r}", request, lambda: found.come)

    def _call(self, verb: str, key: str, **asked: Any) -> Any:
        key = key if self._foreign else keys.check_key(key)
        return getattr(own_client(), verb)(Bucket=self._bucket, Key=self._prefix + key, **asked)

    def _ask(self, what: str, ask: Callable[[], Answer]) -> Answer:
        return patiently(self.url, what, ask)


def _base64_sha256(body: Body) -> str:
    """The sum as S3 writes it."""
    return b64encode(hashlib.sha256(body).digest()).decode()

"""A store in an S3 bucket: MinIO, SeaweedFS, AWS and compatible servers. Independent of datasets and runs.

Every put carries its SHA-256 and a condition. Every body is hashed while it streams, and resumed if a connection drops.
A write whose response was lost is recognised by its stored bytes, so writes that must not be confused hold a commit_id.
"""

import mimetypes
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar
from urllib.parse import urlsplit

from botocore.exceptions import ClientError

from storage import keys
from storage.errors import Conflict, ObjectCorrupt, ObjectMissing, StorageError, StoreUnusable
from storage.stores.retries import Transient
from storage.stores.s3_body import ResumableBody, base64_sha256, stored_sha256
from storage.stores.s3_client import DAMAGED_TRIES, code, new_client, own_client, status, with_retries
from storage.stores.store import LIMIT_BYTES, LINK_SECONDS, Body, Object, Stat, Store, check_conditions, sha256_of

WHOLE_BYTES = 1 << 26  # one request up to this size: a shard of 20 MB in parts costs five times the CPU time
PART_BYTES = 1 << 25  # of a larger object: 32 MiB, 4 at a time, as fast as any other setting measured
PARTS_AT_ONCE = 4
CONFLICT_TRIES = 3  # a server answers 409 briefly while it settles another write


class S3Store(Store):
    """Objects below a prefix of one bucket. In a `foreign` bucket, which is only read, any name is a key."""

    checked_buckets: ClassVar[set[tuple[str, str]]] = set()  # (endpoint, bucket) that honour conditional writes
    _check_lock = threading.RLock()

    def __init__(self, bucket: str, prefix: str, url: str, *, plain_http: bool, foreign: bool = False) -> None:
        self.url, self._foreign, self._bucket = url, foreign, bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._endpoint = str(own_client().meta.endpoint_url)
        parts = urlsplit(self._endpoint)
        if not (plain_http or parts.scheme == "https" or parts.hostname in ("localhost", "127.0.0.1", "::1")):
            problem = f"its endpoint should be https, found {parts.scheme}://{parts.hostname}"
            remedy = "Use https, or on a private network write s3+http:// instead of s3://."
            raise StoreUnusable(f"store {url!r}: {problem}. {remedy}")

    def read(self, key: str, limit_bytes: int = LIMIT_BYTES) -> Object:
        for _ in range(DAMAGED_TRIES):  # damage in transit disappears with the next try
            received = self._receive(key, limit_bytes)
            digest = received.hasher.hexdigest()
            if received.stored_sha256 in (None, digest):
                return Object(received.body, received.etag, digest)
        problem = f"its bytes have sha256 {digest}, the store recorded {received.stored_sha256}"
        remedy = "The object is damaged: delete it, then repeat the command that wrote it."
        raise ObjectCorrupt(f"object {key!r} of store {self.url!r}: {problem}. {remedy}")

    def read_range(self, key: str, start: int, length: int) -> bytes:
        length = min(length, self.stat(key).size - start)
        return bytes(self._receive(key, length, start).body) if length > 0 else b""

    def swap(self, key: str, body: Body, etag: str | None) -> str:
        keys.check_key(key)
        with self._check_lock:  # no thread writes before the first check has passed
            if (self._endpoint, self._bucket) not in self.checked_buckets:
                self._check_conditions()
        if len(body) > WHOLE_BYTES:
            return self._swap_parts(key, body, etag)
        whole = bytes(body[:])
        send = partial(self._call, "put_object", key, Body=whole, ChecksumSHA256=base64_sha256(whole))
        return self._swap_by(send, key, body, etag)

    def stat(self, key: str) -> Stat:
        head = self._request(f"stat {key!r}", "head_object", key, ChecksumMode="ENABLED")
        return Stat(key, head["ContentLength"], head["LastModified"].timestamp(), stored_sha256(head))

    def list(self, prefix: str) -> Iterator[Stat]:
        if prefix and not self._foreign and not keys.is_key(prefix.removesuffix("/")):
            return  # MinIO refuses such a prefix, SeaweedFS reads it as another prefix
        for entry in self._listed(f"list {prefix!r}", "list_objects_v2", "Contents", prefix):
            key = entry["Key"].removeprefix(self._prefix)
            if self._foreign or keys.is_key(key):  # other programs may keep their own objects in the bucket
                yield Stat(key, entry["Size"], entry["LastModified"].timestamp())

    def delete(self, key: str) -> None:
        with suppress(ObjectMissing):
            self._request(f"delete {key!r}", "delete_object", key)

    def probe(self) -> tuple[str, bool]:
        server = self._check_conditions()
        key = keys.probe()
        try:
            self._request("probe checksums", "put_object", key, Body=b"body", ChecksumSHA256=base64_sha256(b"other"))
        except StoreUnusable:
            return server, True
        self.delete(key)
        return server, False

    def unfinished(self, before: float, *, remove: bool = False) -> Iterator[str]:
        for upload in self._listed("list uploads", "list_multipart_uploads", "Uploads"):
            key = upload["Key"].removeprefix(self._prefix)
            if keys.is_key(key) and upload["Initiated"].timestamp() < before:
                if remove:
                    with suppress(ObjectMissing):
                        self._request(f"abort {key!r}", "abort_multipart_upload", key, UploadId=upload["UploadId"])
                yield f"upload of {key}"

    def link(self, key: str, endpoint: str = "") -> str:
        parameters = {"Bucket": self._bucket, "Key": self._prefix + keys.check_key(key)}
        parameters["ResponseContentType"] = mimetypes.guess_type(key)[0] or "application/octet-stream"
        client = new_client(endpoint, signature_version="s3v4", s3={"addressing_style": "path"})  # makes no request
        return str(client.generate_presigned_url("get_object", Params=parameters, ExpiresIn=LINK_SECONDS))

    def _swap_by(self, send: Callable[..., Any], key: str, body: Body, etag: str | None) -> str:
        """Call `send` if the object has `etag` (None: is absent), even if a response is lost. Raises Conflict."""
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
        tries = 0

        def request() -> str:
            nonlocal tries
            tries += 1
            try:
                # Check before resending: MinIO refuses a long body by closing the connection.
                if tries == 1 or self._etag(key) == etag:
                    return str(send(**condition)["ETag"])
            except ClientError as error:
                if status(error) not in (404, 409, 412) or code(error) == "NoSuchBucket":
                    raise
                if status(error) == 409 and tries < CONFLICT_TRIES:
                    raise Transient(str(error)) from error
            if tries > 1:
                with suppress(ObjectMissing, ObjectCorrupt):
                    stored = self.read(key, len(body))
                    if stored.sha256 == sha256_of(body):
                        return stored.etag  # an earlier try was stored and only its response was lost
            raise Conflict(f"object {key!r} of store {self.url!r} exists or has changed. Run the command again.")

        return with_retries(self.url, f"write {key!r}", request)

    def _swap_parts(self, key: str, body: Body, etag: str | None) -> str:
        """Upload the parts, then complete the object as `_swap_by`. An error aborts the upload."""
        begun = self._request(f"begin upload of {key!r}", "create_multipart_upload", key, ChecksumAlgorithm="SHA256")
        upload = {"UploadId": begun["UploadId"]}

        def put(start: int) -> dict[str, Any]:
            part = bytes(body[start : start + PART_BYTES])
            identity = {"PartNumber": 1 + start // PART_BYTES, "ChecksumSHA256": base64_sha256(part)}
            action = f"write part {identity['PartNumber']} of {key!r}"
            response = self._request(action, "upload_part", key, Body=part, **identity, **upload)
            return {**identity, "ETag": response["ETag"]}

        try:
            with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
                parts = list(pool.map(put, range(0, len(body), PART_BYTES)))
            send = partial(self._call, "complete_multipart_upload", key, MultipartUpload={"Parts": parts}, **upload)
            return self._swap_by(send, key, body, etag)
        except BaseException:
            with suppress(StorageError):
                self._request(f"abort {key!r}", "abort_multipart_upload", key, **upload)
            raise

    def _etag(self, key: str) -> str | None:
        with suppress(ObjectMissing):
            return str(self._request(f"write {key!r}", "head_object", key)["ETag"])
        return None

    def _check_conditions(self) -> str:
        """Refuse a server that ignores conditions; return the server's own name and its endpoint."""
        response = with_retries(self.url, "reach the bucket", partial(own_client().head_bucket, Bucket=self._bucket))
        name = response["ResponseMetadata"]["HTTPHeaders"].get("server", "an unnamed server")
        server = f"{name} at {self._endpoint}"
        place = (self._endpoint, self._bucket)
        self.checked_buckets.add(place)  # so that the check's own writes do not start another check
        try:
            check_conditions(self, server)
        except BaseException:
            self.checked_buckets.discard(place)
            raise
        return server

    def _receive(self, key: str, limit_bytes: int, start: int | None = None) -> ResumableBody:
        body = ResumableBody(f"object {key!r} of store {self.url!r}", limit_bytes, start)
        request = partial(body.receive, partial(self._call, "get_object", key))
        return with_retries(self.url, f"read {key!r}", request, lambda: body.received_bytes)

    def _listed(self, action: str, verb: str, field: str, prefix: str = "") -> Iterator[Any]:
        """The entries in one field of all pages of a listing."""
        parameters = {"Bucket": self._bucket, "Prefix": self._prefix + prefix}
        truncated = True
        while truncated:
            page = with_retries(self.url, action, partial(getattr(own_client(), verb), **parameters))
            yield from page.get(field, [])
            truncated = page.get("IsTruncated")
            # The next page begins at NextContinuationToken, or at NextKeyMarker and NextUploadIdMarker.
            parameters |= {name.removeprefix("Next"): page[name] for name in page if name.startswith("Next")}

    def _request(self, action: str, verb: str, key: str, **parameters: Any) -> Any:
        return with_retries(self.url, action, partial(self._call, verb, key, **parameters))

    def _call(self, verb: str, key: str, **parameters: Any) -> Any:
        key = key if self._foreign else keys.check_key(key)
        return getattr(own_client(), verb)(Bucket=self._bucket, Key=self._prefix + key, **parameters)

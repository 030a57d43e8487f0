"""An S3 response body: hashed while it streams, resumed where the connection dropped. boto3 does neither."""

import hashlib
from base64 import b64decode, b64encode
from collections.abc import Callable
from contextlib import closing
from typing import Any, Self

from botocore.exceptions import ClientError

from storage.stores.retries import Transient
from storage.stores.s3_client import status
from storage.stores.store import check_size

PIECE_BYTES = 1 << 20
AT_ONCE_BYTES = 1 << 26  # pieces cost a copy: 6 ms for 20 MB, a sixth of the read


class ResumableBody:
    """The bytes received so far: of a whole object of at most `limit_bytes`, or of `limit_bytes` from `start`."""

    def __init__(self, name: str, limit_bytes: int, start: int | None = None) -> None:
        self._name, self._limit_bytes, self._start = name, limit_bytes, start
        self._in_pieces = False
        self._restart()

    def _restart(self) -> None:
        self.body: bytes | bytearray = b""
        self.hasher = hashlib.sha256()
        self.etag = ""
        self.stored_sha256: str | None = None
        self.received_bytes = self._size_bytes = 0

    def receive(self, get_object: Callable[..., Any]) -> Self:
        """Read the missing bytes. Raises Transient, or ObjectCorrupt before allocating if the object is too large."""
        start, received_bytes, parameters = self._start or 0, self.received_bytes, dict[str, str]()
        if received_bytes:
            byte_range = f"bytes={start + received_bytes}-{start + self._size_bytes - 1}"
            parameters = {"Range": byte_range, "IfMatch": self.etag}
        elif self._start is not None:
            parameters = {"Range": f"bytes={start}-{start + self._limit_bytes - 1}"}
        try:
            response = get_object(**parameters)
        except ClientError as error:
            if status(error) != 412:
                raise
            self._restart()
            raise Transient("the object was replaced while it was being read") from error
        with closing(response["Body"]) as stream:
            if parameters and response["ResponseMetadata"]["HTTPStatusCode"] != 206:
                self._restart()
                raise Transient("the server ignored the range and sent the whole object")
            if not self.received_bytes:
                self._size_bytes = response["ContentLength"]
                self.etag = response["ETag"]
                self.stored_sha256 = stored_sha256(response)
                check_size(self._name, self._size_bytes, self._limit_bytes)
            if self._in_pieces or self._size_bytes > AT_ONCE_BYTES:  # pieces survive a lost connection
                self._read_pieces(stream)
            else:
                self._in_pieces = True  # from the next response on, if this connection drops
                self.body = stream.read()
                self.hasher.update(self.body)
        return self

    def _read_pieces(self, stream: Any) -> None:
        if not self.received_bytes:
            self.body = bytearray(self._size_bytes)
        view = memoryview(self.body)
        while self.received_bytes < self._size_bytes:
            if not (count := stream.readinto(view[self.received_bytes : self.received_bytes + PIECE_BYTES])):
                raise Transient(f"the connection dropped after {self.received_bytes:,} of {self._size_bytes:,} bytes")
            self.hasher.update(view[self.received_bytes : self.received_bytes + count])
            self.received_bytes += count


def stored_sha256(response: Any) -> str | None:
    """The stored sha256 of the whole object in hex; None if the server has none, as after a multipart upload."""
    value = response.get("ChecksumSHA256", "")
    if not value or "-" in value or response.get("ChecksumType", "FULL_OBJECT") != "FULL_OBJECT":
        return None
    return b64decode(value).hex()


def base64_sha256(body: bytes) -> str:
    """The sha256 in base64, the form of S3 headers."""
    return b64encode(hashlib.sha256(body).digest()).decode()

"""A body on its way from an S3 server, hashed while it comes. Knows no bucket, no key and no retry.

boto3 neither repeats nor checks the reading of a body. A shard comes in one piece, which is fastest. What was cut, and
what is larger, comes in pieces that are kept, and is taken up where it ended, from the same object.
"""

import hashlib
from base64 import b64decode
from contextlib import closing
from typing import Any, Self

from storage.errors import ObjectCorrupt
from storage.stores.s3_client import Passing

PIECE_BYTES = 1 << 20
AT_ONCE_BYTES = 1 << 26  # pieces cost a copy: 6 ms of 20 MB, a sixth of a read


class Incoming:
    """The bytes that have come so far: a whole object of at most `limit_bytes`, or just that many from `start`."""

    def __init__(self, limit_bytes: int, start: int | None = None) -> None:
        self._limit_bytes, self._start = limit_bytes, start
        self._in_pieces = False
        self.restart()

    def restart(self) -> None:
        """Forget what has come: it is of an object that is no longer there."""
        self.body: bytes | bytearray = b""
        self.hasher = hashlib.sha256()
        self.etag = ""
        self.kept_sha256: str | None = None
        self.come = self._size = 0

    def rest(self) -> dict[str, str]:
        """What to ask for: all of it, or the bytes that have not come, of the same object."""
        if self._start is None and not self.come:
            return {}
        first = (self._start or 0) + self.come
        last = (self._start or 0) + (self._size if self.come else self._limit_bytes) - 1
        return {"Range": f"bytes={first}-{last}"} | ({"IfMatch": self.etag} if self.come else {})

    def take(self, answer: Any) -> Self:
        """Take the body of an answer to `rest`. Raises ObjectCorrupt for too large an object, before allocating."""
        with closing(answer["Body"]) as stream:
            if self.rest() and answer["ResponseMetadata"]["HTTPStatusCode"] != 206:
                self.restart()
                raise Passing("a range was asked for, all of the object came")
            if not self.come:
                self._begin(answer)
            if self._in_pieces or answer["ContentLength"] > AT_ONCE_BYTES:
                self._take_pieces(stream)
            else:
                self._in_pieces = True  # from the next answer on, should this one be cut
                self.body = stream.read()
                self.hasher.update(self.body)
        return self

    def _take_pieces(self, stream: Any) -> None:
        size = self._size
        if not self.come:
            self.body = bytearray(size)
        view = memoryview(self.body)
        while self.come < size:
            count = stream.readinto(view[self.come : self.come + PIECE_BYTES])
            if not count:
                raise Passing(f"the body was cut after {self.come:,} of {size:,} bytes")
            self.hasher.update(view[self.come : self.come + count])
            self.come += count

    def _begin(self, answer: Any) -> None:
        size = answer["ContentLength"]
        if size > self._limit_bytes:
            raise ObjectCorrupt(
                f"an object of at most {self._limit_bytes:,} bytes was expected, found {size:,}. Something else was "
                f"put at its key: delete it, then run the command that made it again."
            )
        self._size = size
        self.etag = answer["ETag"]
        self.kept_sha256 = kept_sha256(answer)


def kept_sha256(answer: Any) -> str | None:
    """The sha256 that the server keeps of a whole object, in hex; of one put in parts it keeps another kind of sum."""
    value = answer.get("ChecksumSHA256", "")
    if not value or "-" in value or answer.get("ChecksumType", "FULL_OBJECT") != "FULL_OBJECT":
        return None
    return b64decode(value).hex()

"""The connection to an S3 server: settings that were measured, retries with an end, errors in words. Knows no object.

Endpoint, region and secrets come from the standard `AWS_*` chain and its files only. The library's own retries are off:
they would hide that a write was sent twice, honour no Retry-After and have no bound on their total time. boto3's
transfer manager is not used at all, so its CRT client, which ignores the endpoint, cannot be picked.
"""

import logging
import os
from base64 import b64decode
from collections.abc import Callable
from functools import lru_cache
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.parse import urlsplit

import boto3
from botocore.auth import AUTH_TYPE_MAPS, S3SigV4Auth
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ResponseStreamingError,
)
from botocore.exceptions import (
    ConnectionError as NoConnection,
)
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from storage.errors import ObjectMissing, StorageError, StoreUnavailable, StoreUnusable
from storage.stores.retries import Patience, asked_seconds

SIGNATURE = "s3v4-of-known-sha256"
CONNECT_SECONDS = 5.0
READ_SECONDS = 30.0  # without a byte; a shard of 20 MB takes 0.03 s on loopback, 2 s over 100 Mbit/s
PATIENCE_SECONDS = 60.0  # for one request with all its repetitions; a server restarts within 20 s
LONGEST_WAIT_SECONDS = 10.0
CONNECTIONS = 32  # at least one a thread
PASSING = {408, 429, 500, 502, 503, 504}
PASSING_CODES = {"RequestTimeout", "SlowDown", "InternalError"}
DAMAGED_CODES = {"BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"}  # on its way to the server
DAMAGED_TRIES = 3
NO_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError)
BODY = (IncompleteReadError, ResponseStreamingError, ResponseParserError)
NETWORK = (*BODY, NoConnection, HTTPClientError, HTTPError, HTTPException, OSError)
CREDENTIALS = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE."
REMEDIES = {
    "NoSuchBucket": "Make the bucket once (aws s3 mb, or mc mb), or mend the name in store_url.",
    "AccessDenied": "This identity may not: let its policy allow it, or use another identity.",
    "InvalidAccessKeyId": f"The server does not know this access key. {CREDENTIALS}",
    "SignatureDoesNotMatch": f"The secret does not belong to the access key. {CREDENTIALS}",
    "ExpiredToken": "The session token has expired: fetch a new one.",
    "RequestTimeTooSkewed": "The clocks differ: set this host's, or the server's.",
    "AuthorizationHeaderMalformed": "Set AWS_DEFAULT_REGION to the bucket's region.",
    "PermanentRedirect": "Set AWS_DEFAULT_REGION to the bucket's region.",
    "XMinioStorageFull": "The server's disk is full: free some space there, then run the same command again.",
    "403": f"This identity may not, or is unknown. {CREDENTIALS}",
}
Answer = TypeVar("Answer")
log = logging.getLogger(__name__)


class Passing(Exception):
    """What an answer showed to be worth asking again: damaged on the way, or a conflict that is being settled."""


class _Signer(S3SigV4Auth):  # type: ignore[misc]  # botocore has no types
    """Signs the SHA-256 that a put already carries: hashing 20 MB once more would take 11 of a put's 90 ms."""

    def payload(self, request: Any) -> str:
        """The hex digest of the request's body."""
        known = request.headers.get("x-amz-checksum-sha256")
        return b64decode(known).hex() if known else str(super().payload(request))


@lru_cache(maxsize=1)
def client(_process: int) -> Any:
    """The S3 client of a process: connections that were made before a fork must not be shared (2-4 errors in 160)."""
    AUTH_TYPE_MAPS[SIGNATURE] = _Signer
    session = boto3.Session()
    made = session.client(
        "s3",
        region_name=session.region_name or "us-east-1",
        config=Config(
            signature_version=SIGNATURE,
            retries={"mode": "adaptive", "total_max_attempts": 1},  # slows down when told to; `patiently` asks again
            connect_timeout=CONNECT_SECONDS,
            read_timeout=READ_SECONDS,
            tcp_keepalive=True,
            max_pool_connections=CONNECTIONS,
            request_checksum_calculation="when_required",  # every put brings its SHA-256: no trailer is ever sent
            response_checksum_validation="when_required",  # and every read is hashed: no second sum beside it
            user_agent_extra="gpt2-pipeline",
        ),
    )
    made.meta.events.register("before-call.s3.GetObject", _ask_for_checksum)
    return made


def link_client(endpoint: str) -> Any:
    """A client that signs links for browsers, which reach the server by another name than the hosts of the pipeline."""
    region = own_client().meta.region_name
    config = Config(signature_version="s3v4", s3={"addressing_style": "path"})
    return boto3.Session().client("s3", region_name=region, endpoint_url=endpoint or None, config=config)


def own_client() -> Any:
    """The client of this process."""
    return client(os.getpid())


def check_endpoint(url: str, endpoint: str, *, plain_http: bool) -> None:
    """Raise StoreUnusable for an endpoint that would send text and signatures in the clear over a network."""
    parts = urlsplit(endpoint)
    if parts.scheme == "https" or plain_http or parts.hostname in ("localhost", "127.0.0.1", "::1"):
        return
    raise StoreUnusable(
        f"store {url!r}: its endpoint should be https, found {parts.scheme}://{parts.hostname}. Use https, or, where "
        f"the network itself is private, write s3+http:// instead of s3:// in store_url."
    )


def patiently(url: str, what: str, ask: Callable[[], Answer], come: Callable[[], int] = lambda: 0) -> Answer:
    """The answer, asked again after what may pass: time-outs, resets, 429, 5xx, until PATIENCE_SECONDS were in vain.

    A Retry-After is waited for, up to LONGEST_WAIT_SECONDS; bytes that have `come` are progress, after which patience
    begins anew. Raises ObjectMissing, StoreUnusable and StoreUnavailable.
    """
    patience = Patience(PATIENCE_SECONDS, LONGEST_WAIT_SECONDS, LONGEST_WAIT_SECONDS)
    while True:
        try:
            return ask()
        except ClientError as error:
            damaged = code(error) in DAMAGED_CODES and patience.tries < DAMAGED_TRIES
            if status(error) not in PASSING and code(error) not in PASSING_CODES and not damaged:
                raise _in_words(url, what, error) from error
            problem: Exception = error
            asked_wait = asked_seconds(
                error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("retry-after")
            )
        except NO_CREDENTIALS as error:
            raise StoreUnusable(f"store {url!r}: {what}: no credentials were found. {CREDENTIALS}") from error
        except (*NETWORK, Passing) as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error):
                raise StoreUnusable(f"store {url!r}: {what}: {error}. Set AWS_CA_BUNDLE to its authority.") from error
            problem, asked_wait = error, 0.0
        except BotoCoreError as error:
            raise StoreUnusable(f"store {url!r}: {what}: {error}. Check the AWS_* settings.") from error
        if not patience.waits(asked_wait, come()):
            raise StoreUnavailable(
                f"store {url!r}: {what}: no good answer in {patience.tries} tries and {patience.in_vain_seconds:.0f} "
                f"s, last: {problem}. Check that the server runs and that AWS_ENDPOINT_URL names it, then run the same "
                f"command again."
            ) from problem
        if patience.tries == 5:
            log.warning("store %s: %s: %s; asking again for up to %.0f s", url, what, problem, PATIENCE_SECONDS)


def status(error: ClientError) -> int:
    """The answer's HTTP status."""
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code(error: ClientError) -> str:
    """The server's word for the error; for an answer without a body its status."""
    return str(error.response.get("Error", {}).get("Code", ""))


def _in_words(url: str, what: str, error: ClientError) -> StorageError:
    if status(error) == 404 and code(error) != "NoSuchBucket":
        return ObjectMissing(f"store {url!r}: {what}: no such object.")
    said = f"{code(error)}: {error.response.get('Error', {}).get('Message', '')}".rstrip(".: ")
    remedy = REMEDIES.get(code(error)) or REMEDIES.get(str(status(error)), "See the server's log.")
    return StoreUnusable(f"store {url!r}: {what}: the server answered {said}. {remedy}")


def _ask_for_checksum(params: dict[str, Any], **_: Any) -> None:
    """The sum comes with the object, without the library's own check of it, which `readinto` skips in silence."""
    params["headers"]["x-amz-checksum-mode"] = "ENABLED"

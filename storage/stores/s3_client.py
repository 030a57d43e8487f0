"""The connection to an S3 server: client settings, retries, error messages.

Settings come only from the standard `AWS_*` variables and files. boto3's own retries hide that a write was sent twice,
ignore Retry-After and never end; its transfer manager's CRT client ignores the endpoint. Neither is used.
"""

import logging
import os
import re
from collections.abc import Callable
from functools import cache
from typing import Any, TypeVar

import boto3
from botocore import exceptions
from botocore.config import Config
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from storage.errors import ObjectMissing, StoreUnavailable, StoreUnusable, printable
from storage.stores import retries

CONNECT_SECONDS = 5.0
READ_SECONDS = 30.0  # without a byte; a shard of 20 MB takes 0.03 s on loopback, 2 s over 100 Mbit/s
CONNECTIONS = 32  # at least one per thread
WARN_AFTER_TRIES = 5
RETRYABLE_CODES = {"RequestTimeout", "SlowDown", "InternalError"}
DAMAGED_CODES = {"BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"}  # the body, in transit
DAMAGED_TRIES = 3
ENDPOINT = re.compile(r"https?://(\[[0-9A-Fa-f:.]+\]|[\w.-]+)(:\d{1,5})?(/[^?#]*)?")  # without a secret
NETWORK = (OSError, HTTPError, exceptions.ConnectionError, exceptions.HTTPClientError)
TRANSIENT = (*NETWORK, exceptions.IncompleteReadError, ResponseParserError, retries.Transient)
CREDENTIALS = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE."
REMEDIES = {
    "NoSuchBucket": "Create the bucket (aws s3 mb, or mc mb), or correct its name.",
    "AccessDenied": "Grant the permission, or use other credentials.",
    "InvalidAccessKeyId": f"The server does not know this access key. {CREDENTIALS}",
    "SignatureDoesNotMatch": f"The secret does not belong to the access key. {CREDENTIALS}",
    "ExpiredToken": "The session token has expired: get a new one.",
    "RequestTimeTooSkewed": "The clocks differ: correct the clock of this host or of the server.",
    "AuthorizationHeaderMalformed": "Set AWS_DEFAULT_REGION to the bucket's region.",
    "PermanentRedirect": "Set AWS_DEFAULT_REGION to the bucket's region.",
    "XMinioStorageFull": "The server's disk is full: free some space on it, then run the same command again.",
    "403": f"Access denied, or unknown credentials. {CREDENTIALS}",
}
Result = TypeVar("Result")
log = logging.getLogger(__name__)


@cache
def own_client() -> Any:
    """The S3 client of this process."""
    s3 = new_client(
        signature_version="s3v4",
        retries={"mode": "adaptive", "total_max_attempts": 1},  # throttles itself; `with_retries` does the retries
        connect_timeout=CONNECT_SECONDS,
        read_timeout=READ_SECONDS,
        tcp_keepalive=True,
        max_pool_connections=CONNECTIONS,
        request_checksum_calculation="when_required",  # every put carries its SHA-256, so no trailer is sent
        response_checksum_validation="when_required",  # `s3_body` hashes every read, so no second checksum
        user_agent_extra="gpt2-pipeline",
    )
    # Request the stored checksum without botocore's own check of it, which `readinto` silently skips.
    header = {"x-amz-checksum-mode": "ENABLED"}
    s3.meta.events.register("before-call.s3.GetObject", lambda params, **_: params["headers"].update(header))
    return s3


os.register_at_fork(after_in_child=own_client.cache_clear)  # a shared connection fails: 2 to 4 errors in 160 requests


def new_client(endpoint: str = "", **settings: Any) -> Any:
    """A client with these settings and the environment's. If any is invalid, raises StoreUnusable without a secret."""
    reason = "an AWS_* setting is invalid; an endpoint should be http(s)://HOST:PORT, without user and password"
    try:
        session = boto3.Session()
        region, config = session.region_name or "us-east-1", Config(**settings)
        created = session.client("s3", region_name=region, endpoint_url=endpoint or None, config=config)
        if ENDPOINT.fullmatch(created.meta.endpoint_url):
            return created
    except (exceptions.BotoCoreError, ValueError) as error:
        reason = str(error) if isinstance(error, exceptions.BotoCoreError) else reason
    # Raised outside the handler, because the cause may quote a secret.
    raise StoreUnusable(f"S3: {reason}. Correct AWS_PROFILE, AWS_*, BROWSER_S3_ENDPOINT or ~/.aws/credentials.")


def with_retries(
    url: str, action: str, request: Callable[[], Result], received_bytes: Callable[[], int] = lambda: 0
) -> Result:
    """The result of `request`, retried until RETRY_SECONDS pass without more `received_bytes`. Raises as a Store."""
    backoff = retries.Backoff(retries.MAX_WAIT_SECONDS)
    what = f"store {url!r}: {action}"
    while True:
        try:
            return request()
        except (exceptions.ClientError, exceptions.BotoCoreError, *TRANSIENT) as error:
            retry_after_seconds = _check_transient(what, error, backoff.tries)
            if problem := backoff.wait(retry_after_seconds, received_bytes()):
                remedy = "Check that the server runs at AWS_ENDPOINT_URL, then run the same command again."
                raise StoreUnavailable(f"{what}: {problem}, last error: {error}. {remedy}") from error
            if backoff.tries == WARN_AFTER_TRIES:
                log.warning("%s: %s; retrying for up to %.0f s", what, printable(str(error)), retries.RETRY_SECONDS)


def status(error: exceptions.ClientError) -> int:
    """The HTTP status of the response."""
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"])


def code(error: exceptions.ClientError) -> str:
    """The server's error code, or the HTTP status if the response has no body."""
    return str(error.response["Error"]["Code"])


def _check_transient(what: str, error: Exception, tries: int) -> float:
    """The server's Retry-After in seconds. Raises StoreUnusable or ObjectMissing if a retry cannot fix the error."""
    if isinstance(error, exceptions.ClientError):
        is_damaged = code(error) in DAMAGED_CODES and tries < DAMAGED_TRIES
        if is_damaged or status(error) in retries.RETRYABLE_STATUSES or code(error) in RETRYABLE_CODES:
            return retries.parse_retry_after(error.response["ResponseMetadata"]["HTTPHeaders"].get("retry-after"))
        if status(error) == 404 and code(error) != "NoSuchBucket":
            raise ObjectMissing(f"{what}: no such object.") from error
        response = f"{code(error)}: {error.response['Error'].get('Message', '')}".rstrip(".: ")
        remedy = REMEDIES.get(code(error)) or REMEDIES.get(str(status(error)), "See the server's log.")
        raise StoreUnusable(f"{what}: the server answered {response}. {remedy}") from error
    if isinstance(error, exceptions.NoCredentialsError):
        raise StoreUnusable(f"{what}: no credentials were found. {CREDENTIALS}") from error
    if "Invalid header" in str(error):  # the error quotes the credential
        raise StoreUnusable(f"{what}: a credential contains a line break. {CREDENTIALS}") from None
    if not isinstance(error, TRANSIENT):
        raise StoreUnusable(f"{what}: {error}. Check the AWS_* settings.") from error
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        raise StoreUnusable(f"{what}: {error}. Set AWS_CA_BUNDLE to the certificate of the server's CA.") from error
    return 0.0

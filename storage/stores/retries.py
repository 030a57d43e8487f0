"""Retries of requests: exponential backoff with jitter, and a deadline. Independent of the server."""

import random
import time

RETRYABLE_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
RETRY_SECONDS = 60.0  # without progress, for one request and its retries; a server restarts within 20 s
FIRST_WAIT_SECONDS = 0.1
MAX_WAIT_SECONDS = 10.0


class Transient(Exception):
    """A failure that a retry may fix: an incomplete, damaged or outdated response."""


class Backoff:
    """Exponential backoff with jitter, and a deadline that restarts whenever bytes arrive."""

    def __init__(self, max_retry_after_seconds: float) -> None:
        self._max_retry_after_seconds = max_retry_after_seconds
        self._received_bytes, self._last_progress = -1, 0.0
        self.tries = 0

    def wait(self, retry_after_seconds: float, received_bytes: int) -> str:
        """Sleep. If that would pass the deadline, say at once what failed. A Retry-After extends a shorter deadline."""
        now = time.monotonic()
        if received_bytes > self._received_bytes:
            self.tries, self._last_progress, self._received_bytes = 0, now, received_bytes
        retry_after_seconds = min(retry_after_seconds, self._max_retry_after_seconds)
        max_wait_seconds = min(FIRST_WAIT_SECONDS * 2**self.tries, MAX_WAIT_SECONDS)
        wait_seconds = max(random.uniform(0, max_wait_seconds), retry_after_seconds)  # noqa: S311  # not a secret
        deadline_seconds = max(RETRY_SECONDS, retry_after_seconds + 1) if retry_after_seconds else RETRY_SECONDS
        self.tries += 1
        stalled_seconds = now - self._last_progress
        if stalled_seconds + wait_seconds > deadline_seconds:
            return f"{self.tries} tries failed in {stalled_seconds:.0f} s"
        time.sleep(wait_seconds)
        return ""


def parse_retry_after(header: str | None) -> float:
    """The seconds of a Retry-After header; 0 for no header and for a date, which no tested server sends."""
    return float(header) if header and header.isdigit() else 0.0

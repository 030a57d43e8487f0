"""How long a request is repeated in vain: waits that grow and are spread, and an end. Knows no server."""

import random
import time

FIRST_WAIT_SECONDS = 0.1


class Patience:
    """The patience that one request has with all its repetitions: `seconds` without progress."""

    def __init__(self, seconds: float, longest_wait_seconds: float, longest_asked_seconds: float) -> None:
        self._seconds = seconds
        self._longest_wait, self._longest_asked = longest_wait_seconds, longest_asked_seconds
        self._since, self._had = 0.0, -1
        self.tries = 0
        self.in_vain_seconds = 0.0

    def waits(self, asked_seconds: float = 0.0, come: int = 0) -> bool:
        """Wait before the next try; False, at once, when patience has ended.

        `asked_seconds` is what the server asked for (Retry-After); `come` counts what has come so far: more of it is
        progress, after which patience begins anew.
        """
        now = time.monotonic()
        if come > self._had:
            self.tries, self._since, self._had = 0, now, come
        longest = min(FIRST_WAIT_SECONDS * 2**self.tries, self._longest_wait)
        asked = min(asked_seconds, self._longest_asked)
        wait = max(random.uniform(0, longest), asked)  # noqa: S311  # spreads retries, keeps no secret
        self.tries += 1
        self.in_vain_seconds = now - self._since
        if self.in_vain_seconds + wait > max(
            self._seconds, asked + 1 if asked else 0.0
        ):  # one try more than was asked for
            return False
        time.sleep(wait)
        return True


def asked_seconds(header: str | None) -> float:
    """The seconds of a Retry-After header; 0 for none, and for a date, which no server tried here sends."""
    return float(header) if header and header.isdigit() else 0.0

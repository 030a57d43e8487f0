"""Polling: the only way in which tests wait for a condition."""

import threading
import time
from collections.abc import Callable
from typing import Any

PATIENCE_SECONDS = 600.0  # costs a passing test nothing; a busy machine is up to five times slower than an idle one


def poll(
    condition: Callable[[], Any],
    seconds: float = PATIENCE_SECONDS,
    every_seconds: float = 0.2,
    failure: str = "timed out",
) -> Any:
    """Call the condition until it returns something true. Returns that; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{failure} after {seconds} s"
        threading.Event().wait(every_seconds)
    return value

"""Polling: the only way in which tests wait for a condition."""

import threading
import time
from collections.abc import Callable
from typing import Any


def poll(
    condition: Callable[[], Any], seconds: float = 60.0, every_seconds: float = 0.05, failure: str = "timed out"
) -> Any:
    """Call the condition until it returns something true. Returns that; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{failure} after {seconds} s"
        threading.Event().wait(every_seconds)
    return value

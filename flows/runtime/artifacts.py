"""Artifacts of a flow run in Prefect's UI. If the server does not answer for a minute, the flow goes on without."""

import os
import time
from collections.abc import Callable
from typing import Any

import httpx
from prefect.logging import get_run_logger

from flows.platform.server import file_url
from storage.stores.store import Store

WAITS_SECONDS = (1, 2, 4, 8, 16, 32, 0)  # after each try: a restarted server answers within a minute


def show(create: Callable[..., Any], **arguments: Any) -> None:
    """Create an artifact with a function of prefect.artifacts, unless every request fails."""
    for wait in WAITS_SECONDS:
        try:
            create(**arguments)
            return
        except httpx.HTTPError as error:
            reason = error
            time.sleep(wait)
    get_run_logger().warning("artifact %r is not shown: Prefect's server failed: %s", arguments.get("key"), reason)


def link(store: Store, key: str) -> str:
    """An address for browsers of a key of the store. BROWSER_S3_ENDPOINT is the address of the S3 server for them."""
    path = store.local_path(key)
    return file_url(path) if path else store.link(key, os.environ.get("BROWSER_S3_ENDPOINT", ""))

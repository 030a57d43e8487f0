"""What Prefect's UI shows of a flow beside its states: tables, text, pictures, links. Decides nothing.

A server that is away, as while it is started again, is waited for; then the flow goes on without what was to be shown.
"""

import os
import time
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from uuid import UUID

import httpx
from prefect.artifacts import create_image_artifact, create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.logging import get_run_logger

from storage.stores.store import Store

INK = "#7d8794"  # legible on the UI's white and on its black
WAITS_SECONDS = (1, 2, 4, 8, 16, 32)  # a server is back within a minute


def show(create: Callable[..., Any], **what: Any) -> Any:
    """Make an artifact by one of Prefect's functions. Returns its id, or None when no server was there to take it."""
    for wait in WAITS_SECONDS:
        try:
            return create(**what)
        except httpx.HTTPError as error:
            why = error
            time.sleep(wait)
    get_run_logger().warning("artifact %r is not shown: Prefect's server does not answer (%s)", what.get("key"), why)
    return None


def replace(artifact: UUID | None, data: Any) -> None:
    """Let an artifact show something else now, if the server answers: the next time is soon."""
    if artifact is not None:
        with suppress(httpx.HTTPError), get_client(sync_client=True) as client:
            client.update_artifact(artifact, ArtifactUpdate(data=data))


def show_links(store: Store, title: str, links: dict[str, str]) -> None:
    """Show where a browser opens these keys of the store. BROWSER_S3_ENDPOINT is a bucket's address for browsers."""
    endpoint = os.environ.get("BROWSER_S3_ENDPOINT", "")
    lines = [f"- [{what}]({store.link(key, endpoint)}): {key}" for what, key in links.items()]
    show(create_markdown_artifact, markdown="\n".join(lines), key="links", description=title)


class Picture:
    """A drawing that changes while a flow goes on: one artifact, for each new one would stay in the database."""

    def __init__(self, key: str, description: str) -> None:
        self._key, self._description = key, description
        self._artifact: UUID | None = None

    def show(self, svg: str) -> None:
        """Show this inline SVG from now on."""
        image = b64encode(svg.replace("currentColor", INK).encode()).decode()
        url = f"data:image/svg+xml;base64,{image}"
        if self._artifact is None:
            self._artifact = show(create_image_artifact, image_url=url, key=self._key, description=self._description)
        else:
            replace(self._artifact, url)

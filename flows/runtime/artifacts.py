"""Artifacts of a flow run in Prefect's UI: tables, text, pictures, links. After a minute a flow goes on without."""

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

INK = "#7d8794"  # legible on the UI's white and on its black background
WAITS_SECONDS = (1, 2, 4, 8, 16, 32, 0)  # after each try: a restarted server answers within a minute


def show(create: Callable[..., Any], **arguments: Any) -> Any:
    """Create an artifact with a function of prefect.artifacts. Returns its id, or None when every request failed."""
    for wait in WAITS_SECONDS:
        try:
            return create(**arguments)
        except httpx.HTTPError as error:
            reason = error
            time.sleep(wait)
    get_run_logger().warning("artifact %r is not shown: Prefect's server failed: %s", arguments.get("key"), reason)
    return None


def replace(artifact: UUID | None, data: Any) -> None:
    """Replace an artifact's data. Ignores HTTP errors."""
    if artifact is not None:
        with suppress(httpx.HTTPError), get_client(sync_client=True) as client:
            client.update_artifact(artifact, ArtifactUpdate(data=data))


def show_links(store: Store, title: str, links: dict[str, str]) -> None:
    """Show browser links to keys of the store. BROWSER_S3_ENDPOINT is the address of the S3 server for browsers."""
    endpoint = os.environ.get("BROWSER_S3_ENDPOINT", "")
    lines = [f"- [{text}]({store.link(key, endpoint)}): {key}" for text, key in links.items()]
    show(create_markdown_artifact, markdown="\n".join(lines), key="links", description=title)


class Picture:
    """A picture that is redrawn during a flow. It updates one artifact, since every artifact stays in the database."""

    def __init__(self, key: str, description: str) -> None:
        self._key, self._description = key, description
        self._artifact: UUID | None = None

    def show(self, svg: str) -> None:
        image = b64encode(svg.replace("currentColor", INK).encode()).decode()
        url = f"data:image/svg+xml;base64,{image}"
        if self._artifact is None:
            self._artifact = show(create_image_artifact, image_url=url, key=self._key, description=self._description)
        else:
            replace(self._artifact, url)

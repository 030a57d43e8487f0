"""Prefect's server, closed to other websites. In a folder it ends with the last process that uses it.

python -m flows.platform.app SOCKET USERS      SOCKET: descriptor of the listening socket; USERS: the file users lock
"""

import fcntl
import hmac
import os
import signal
import socket
import sys
import threading
import time
from base64 import b64encode
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from starlette.datastructures import Headers, QueryParams
from starlette.responses import FileResponse, PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from flows.platform import server
from model import form
from storage.errors import printable

GRACE_SECONDS = 10.0
ISOLATED = "sandbox allow-scripts allow-downloads; connect-src 'none'"


def create() -> ASGIApp:
    """Prefect's server, which refuses (403) a request with another Host or Origin than those of its own address.

    PREFECT_SERVER_CORS_ALLOWED_ORIGINS lists its own. A website's page sends its own Origin, or Host (DNS rebinding).
    """
    from prefect.server.api import deployments
    from prefect.server.api.server import create_app
    from prefect.server.events import actions
    from prefect.server.events.clients import PrefectServerEventsAPIClient
    from prefect.settings import PREFECT_SERVER_API_AUTH_STRING, PREFECT_SERVER_CORS_ALLOWED_ORIGINS

    # Works around a bug of Prefect's server (3.9.1): its automations that pause others send it no login.
    login = b64encode(PREFECT_SERVER_API_AUTH_STRING.value().encode()).decode()
    headers = {"Authorization": f"Basic {login}"}
    vars(actions)["PrefectServerEventsAPIClient"] = partial(PrefectServerEventsAPIClient, headers)
    vars(deployments)["validate"] = validate
    app = create_app(final=True)
    origins = PREFECT_SERVER_CORS_ALLOWED_ORIGINS.value().split(",")
    hosts = [urlsplit(origin).netloc for origin in origins]
    refusal = PlainTextResponse(f"This server answers only at {', '.join(origins)}.\n", 403)

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(raw=scope.get("headers", []))
        is_own = headers.get("host") in hosts and headers.get("origin", origins[0]) in origins
        reply: ASGIApp = app if is_own or scope["type"] == "lifespan" else refusal
        if reply is app and scope.get("path") == server.FILE:
            reply = _signed_file(QueryParams(scope["query_string"]), PREFECT_SERVER_API_AUTH_STRING.value())
        await reply(scope, receive, send)

    return guarded


def _signed_file(query: QueryParams, secret: str) -> ASGIApp:
    """The file of a signed link (see `server.link`), whose scripts can neither read this site nor use a network."""
    path, given = query.get("path", ""), query.get("signature", "").encode()  # of a str, it compares only ASCII
    if not hmac.compare_digest(given, server.signature(secret, path).encode()) or not Path(path).is_file():
        return PlainTextResponse("No such page. Open the link from the page of the run again.\n", 404)
    return FileResponse(path, headers={"Content-Security-Policy": ISOLATED})


def validate(parameters: dict[str, Any], schema: dict[str, Any], **options: Any) -> None:
    """Prefect's check of a run's parameters by their schema, then ours of a form, with the messages of the console."""
    from prefect.utilities.schema_tools import validation

    fields = schema.get("properties", {})
    is_form = "settings" in fields
    validation.validate(parameters, schema | {"additionalProperties": False} if is_form else schema, **options)
    if is_form:
        try:
            form.check({name: field["default"] for name, field in fields.items() if "default" in field} | parameters)
        except ValueError as error:
            raise validation.ValidationError(printable(str(error), lines=True)) from error


def end_with_users(path: Path) -> None:
    """End this process as soon as no other process shares the lock. The kernel releases the locks of dead processes."""
    with path.open("w") as users:
        fcntl.flock(users, fcntl.LOCK_EX)  # kept until this process has ended, so that nobody becomes its user
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE_SECONDS)
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=end_with_users, args=(Path(sys.argv[2]),), daemon=True).start()
    listener = socket.socket(fileno=int(sys.argv[1]))
    config = uvicorn.Config(create(), log_level="warning", headers=[("X-Frame-Options", "DENY")])
    uvicorn.Server(config).run(sockets=[listener])

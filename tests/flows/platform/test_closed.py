"""Without the login nobody reads or writes anything of a folder's server: no local user, and no page in a browser."""

import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from socket import create_connection
from typing import Any

import httpx
import pytest
from prefect.server.api.server import API_ROUTERS
from starlette.routing import WebSocketRoute
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from flows.platform import server
from tests.flows.client import login
from tests.processes import matching

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
FOR_ALL = {("GET", "/health"), ("GET", "/ready")}
NOBODY = "00000000-0000-0000-0000-000000000000"
SOCKETS = [route.path for router in API_ROUTERS for route in router.routes if isinstance(route, WebSocketRoute)]
# Runs as root, becomes `nobody`, and prints which of the files it can read.
HOSTILE_USER = """
import os, pwd, sys
user = pwd.getpwnam("nobody")
os.setgroups([]), os.setgid(user.pw_gid), os.setuid(user.pw_uid)
for path in sys.argv[1:]:
    try:
        os.listdir(path) if path.endswith("/") else open(path).close()
        print(path)
    except PermissionError:
        pass
"""


@pytest.fixture
def site(api: str) -> str:
    """The server's address, without /api."""
    return api.removesuffix("/api")


@pytest.fixture
def client(site: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=site, timeout=60) as client:
        yield client


def test_every_route_refuses_every_method_without_the_login(client: httpx.Client) -> None:
    paths: dict[str, Any] = client.get("/openapi.json").json()["paths"]
    assert len(paths) > 100
    answered = set()
    for path in paths:
        url = f"/api{path}".replace("{id}", NOBODY)
        for method in METHODS:
            if client.request(method, url, json={}).status_code != 401:
                answered.add((method, path))
        assert client.post(url, json={}, auth=("gpt2", "other")).status_code == 401, path
    assert answered == FOR_ALL
    assert client.post("/api/flows/filter", json={}, auth=login()).status_code == 200


def auth_reply(url: str, token: str | None, **how: Any) -> str:
    """What a websocket answers to the first message, or how it refused the client."""
    try:
        with connect(url, **how) as socket:
            socket.send(json.dumps({"type": "auth", "token": token}))
            return str(socket.recv(60))
    except InvalidStatus as refused:
        return str(refused.response.status_code)
    except ConnectionClosed:
        return "closed"


@pytest.mark.parametrize("path", SOCKETS)
def test_every_websocket_refuses_clients_without_the_login_and_foreign_pages(site: str, path: str) -> None:
    url = f"{site.replace('http', 'ws')}/api{path.replace('{work_pool_name}', 'train')}"
    password = os.environ["PREFECT_API_AUTH_STRING"]
    prefect: Any = {"subprotocols": ["prefect"]}
    for token in (None, "", "gpt2:other"):
        assert auth_reply(url, token, **prefect) == "closed"
    assert auth_reply(url, password) in ("closed", "403")  # another protocol, which has no login
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1"):
        assert auth_reply(url, password, origin=origin, **prefect) == "403"
    rebound, address = url.replace("127.0.0.1", "evil.example"), (httpx.URL(site).host, httpx.URL(site).port)
    assert auth_reply(rebound, password, sock=create_connection(address), **prefect) == "403"
    for origin in (None, site, site.replace("127.0.0.1", "localhost")):
        assert "auth_success" in auth_reply(url, password, origin=origin, **prefect)


PLACES = ("/", "/api/health", "/api/admin/version", "/ui-settings", "/docs", "/openapi.json", "/v2/", "/missing")


def test_a_foreign_host_header_is_refused_everywhere(client: httpx.Client) -> None:
    """DNS rebinding: the browser takes the server for a part of the hostile site, and shows it the answers."""
    port = client.base_url.port
    hosts = ("evil.example", f"evil.example:{port}", f"127.0.0.1.evil.example:{port}", "127.0.0.1", "localhost:1", "")
    for host in hosts:
        for place in PLACES:
            assert client.get(place, headers={"Host": host}, auth=login()).status_code == 403, (host, place)
    for name in ("127.0.0.1", "localhost"):
        assert client.get("/api/admin/version", headers={"Host": f"{name}:{port}"}, auth=login()).status_code == 200


def test_a_page_of_another_site_is_refused_and_the_ui_is_not(client: httpx.Client, site: str) -> None:
    """What a browser sends for such a page: a preflight, or a request that needs none, with the page's origin."""
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", site.replace("http", "https")):
        for place in PLACES:
            preflight = client.options(place, headers=asked | {"Origin": origin})
            simple = client.post(
                place, content="{}", headers={"Content-Type": "text/plain", "Origin": origin}, auth=login()
            )
            for answer in (preflight, simple, client.get(place, headers={"Origin": origin}, auth=login())):
                assert answer.status_code == 403
                assert "access-control-allow-origin" not in answer.headers
    for origin in (site, site.replace("127.0.0.1", "localhost")):  # the UI calls 127.0.0.1, also from localhost
        preflight = client.options("/api/flows/filter", headers=asked | {"Origin": origin})
        read = client.post("/api/flows/filter", json={}, headers={"Origin": origin}, auth=login())
        for answer in (preflight, read):
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, origin)
    assert client.get("/").headers["x-frame-options"] == "DENY"  # a page of another port would frame it logged in


def test_another_local_user_reads_neither_files_nor_the_login(api: str) -> None:
    files = [path for path in server.HOME.iterdir() if path.is_file()]
    assert {path.name for path in files} >= {"login", "server.log", "server.json"}
    assert stat.S_IMODE(server.HOME.stat().st_mode) == 0o700
    assert {stat.S_IMODE((server.HOME / name).stat().st_mode) for name in ("login", "server.log")} == {0o600}
    password = server.login().partition(":")[2].encode()
    assert matching(lambda folder: password in (folder / "cmdline").read_bytes()) == []
    if os.geteuid() == 0:
        [pid] = matching(lambda folder: str(server.HOME / "users").encode() in (folder / "cmdline").read_bytes())
        places = [
            f"{server.HOME}/",
            *map(str, files),
            str(server.HOME / "prefect" / "prefect.db"),
            f"/proc/{pid}/environ",
        ]
        argv = [sys.executable, "-c", HOSTILE_USER, *places]
        assert subprocess.run(argv, capture_output=True, text=True, check=True).stdout == ""


def test_the_login_is_in_no_other_file(api: str) -> None:
    password = server.login().partition(":")[2].encode()
    having = []
    for path in server.HOME.rglob("*"):
        with suppress(FileNotFoundError):  # SQLite's journals come and go
            if path.is_file() and password in path.read_bytes():
                having.append(path.name)
    assert having == ["login"]
    assert Path(server.HOME / "prefect" / "prefect.db").exists()

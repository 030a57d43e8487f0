"""A stand-in for the Hugging Face Hub: the part of its HTTP interface that its client uses, and every way to fail.

Large files are answered, as by the hub, with a redirect to another host (here: `localhost` instead of 127.0.0.1), which
must never see the token.
"""

import hashlib
import json
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

Fault = Literal[
    "429",  # too many requests
    "429 later",  # with Retry-After: 1
    "500",
    "503",
    "reset",  # the connection ends before an answer
    "cut",  # half of the body comes, then the connection ends
    "short",  # a body that is shorter, and says so: nothing in HTTP tells
    "wrong",  # as many bytes, one bit of them wrong
    "whole",  # a range was asked for, all comes
    "hang",  # half of the body comes, the rest never does: until `let_go`
]
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    PORT: int = probe.getsockname()[1]
ENDPOINT = f"http://127.0.0.1:{PORT}"
PAGE = 3  # entries of one page of a listing: the hub's 1,000 would never need a second one here
TOKEN = "hf_" + "x" * 34  # what the tests sign in with


class Request(NamedTuple):
    """A request as it came: host name, method, path, and headers by lower-case name."""

    host: str
    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Repository:
    """A dataset on the hub: its card's fields, and at each commit its files."""

    card: dict[str, Any]
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: bool = False

    def commit(self, files: dict[str, bytes]) -> str:
        """Make these files the newest commit of `main`; returns the commit."""
        config = "\n".join(
            f"- config_name: {name}\n  data_files:\n"
            + "".join(f"  - split: {split}\n    path: {path!r}\n" for split, path in splits.items())
            for name, splits in self.card["configs"].items()
        )
        readme = f"---\nlicense: {self.card['license']}\nconfigs:\n{config}\n---\n# A dataset\n"
        files = {"README.md": readme.encode()} | files
        digest = hashlib.sha1(repr(sorted(files.items())).encode() + bytes(len(self.commits)))  # noqa: S324  # git's
        self.commits[digest.hexdigest()] = files
        return digest.hexdigest()

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = list(self.commits)[-1] if revision == "main" else revision
        return (commit, self.commits[commit]) if commit in self.commits else None


class Hub:
    """The stand-in's state: repositories by name, what it was asked, and the faults that are still to come."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Forget all."""
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.faults: list[tuple[str, Fault]] = []
        self._held = threading.Event()

    def let_go(self) -> None:
        """End the answers that hang."""
        self._held.set()

    def hold(self) -> None:
        self._held.wait()

    def dataset(self, name: str, files: dict[str, bytes], **card: Any) -> Repository:
        """A new dataset of one commit; its configuration `default` has the files below `data/` as split `train`."""
        made = Repository({"license": "odc-by", "configs": {"default": {"train": "data/*"}}} | card)
        made.commit(files)
        self.repositories[name] = made
        return made

    def spoil(self, path: str, *faults: Fault) -> None:
        """Spoil the next requests whose path matches the pattern, one fault each."""
        self.faults += [(path, fault) for fault in faults]

    def fault(self, request: Request) -> Fault | None:
        with self.lock:
            self.requests.append(request)
            for index, (path, fault) in enumerate(self.faults):
                if fnmatch(request.path, path):
                    del self.faults[index]
                    return fault
        return None

    def asked(self, path: str, method: str = "GET") -> list[Request]:
        """The requests so far whose path matches the pattern."""
        return [found for found in self.requests if found.method == method and fnmatch(found.path, path)]


def is_large(name: str) -> bool:
    """Whether the hub keeps a file outside git, with its sha256 published."""
    return Path(name).suffix == ".parquet"


def entry(name: str, body: bytes) -> dict[str, Any]:
    """A file as a listing shows it."""
    blob = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()  # noqa: S324  # git's
    found: dict[str, Any] = {"type": "file", "oid": blob, "size": len(body), "path": name}
    if is_large(name):
        found["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
    return found


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._posted = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._serve()

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        host = headers["host"].split(":")[0]
        self._fault = self.hub.fault(Request(host, self.command, path, headers))
        if self._fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        if self._fault in ("429", "429 later", "500", "503"):
            later = {"Retry-After": "1"} if self._fault == "429 later" else {}
            self._json({"error": "not now"}, int(self._fault.split()[0]), later)
            return
        for name, repository in self.hub.repositories.items():
            for verb in ("revision", "tree", "paths-info"):
                if path.startswith(f"/api/datasets/{name}/{verb}/"):
                    self._api(name, repository, verb, path.removeprefix(f"/api/datasets/{name}/{verb}/"), parts.query)
                    return
            if path == f"/api/datasets/{name}":
                self._api(name, repository, "revision", "main", "")
                return
            if path.startswith(f"/datasets/{name}/resolve/"):
                self._resolve(repository, path.removeprefix(f"/datasets/{name}/resolve/"))
                return
            if path.startswith(f"/stored/{name}/"):
                commit, _, file = path.removeprefix(f"/stored/{name}/").partition("/")
                self._body(repository.commits[commit][file], {})
                return
        self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    def _api(self, name: str, repository: Repository, verb: str, rest: str, query: str) -> None:
        revision, _, folder = rest.partition("/")
        found = repository.files(revision)
        if found is None:
            self._json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
            return
        commit, files = found
        if verb == "revision":
            card = {"license": repository.card["license"]}
            siblings = [{"rfilename": file} for file in files]
            facts = {"id": name, "sha": commit, "private": False, "disabled": False, "siblings": siblings}
            self._json(facts | {"gated": "manual" if repository.gated else False, "cardData": card, "tags": []})
        elif verb == "tree":
            self._tree(files, folder, parse_qs(query))
        else:
            asked = parse_qs(self._posted.decode())["paths"]
            self._json([entry(file, files[file]) for file in asked if file in files])

    def _tree(self, files: dict[str, bytes], folder: str, query: dict[str, list[str]]) -> None:
        prefix = f"{folder}/" if folder else ""
        inside = [entry(file, body) for file, body in sorted(files.items()) if file.startswith(prefix)]
        names = {str(Path(one["path"]).parent) for one in inside} - {folder or "."}
        folders = {part for name in names for part in [name, *map(str, Path(name).parents)] if part.startswith(prefix)}
        found = inside + [{"type": "directory", "oid": "0" * 40, "size": 0, "path": one} for one in folders - {"."}]
        if query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            found = [one for one in found if "/" not in one["path"].removeprefix(prefix)]
        if not found:
            self._json({"error": "not there"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        start = int(query.get("cursor", ["0"])[0])
        more = {}
        if start + PAGE < len(found):
            flags = "&".join(f"{name}={value[0]}" for name, value in query.items() if name != "cursor")
            more = {"Link": f'<{ENDPOINT}{urlsplit(self.path).path}?{flags}&cursor={start + PAGE}>; rel="next"'}
        self._json(found[start : start + PAGE], 200, more)

    def _resolve(self, repository: Repository, rest: str) -> None:
        revision, _, file = rest.partition("/")
        found = repository.files(revision)
        if found is None or file not in found[1]:
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        if repository.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._json({"error": "gated"}, 401, {"X-Error-Code": "GatedRepo"})
            return
        commit, files = found
        facts = entry(file, files[file])
        headers = {"X-Repo-Commit": commit, "ETag": f'"{facts["oid"]}"'}
        if "lfs" not in facts:
            self._body(files[file], headers)
            return
        name = next(name for name, one in self.hub.repositories.items() if one is repository)
        other_host = ENDPOINT.replace("127.0.0.1", "localhost")
        headers |= {"X-Linked-Size": str(facts["size"]), "X-Linked-ETag": f'"{facts["lfs"]["oid"]}"'}
        headers["Location"] = f"{other_host}/stored/{name}/{commit}/{file}"
        self._json({}, 302, headers)

    def _body(self, body: bytes, headers: dict[str, str]) -> None:
        status = 200
        asked = self.headers.get("Range")
        if asked and self._fault != "whole":
            first, _, last = asked.removeprefix("bytes=").partition("-")
            end = min(int(last or len(body)), len(body) - 1)
            if int(first) > end:
                self._json({}, 416, {"Content-Range": f"bytes */{len(body)}"})
                return
            headers = headers | {"Content-Range": f"bytes {first}-{end}/{len(body)}"}
            body, status = body[int(first) : end + 1], 206
        if self._fault == "short":
            body = body[: len(body) // 2]
        if self._fault == "wrong":
            body = bytes([body[0] ^ 1]) + body[1:]
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self._fault in ("cut", "hang") else body)
        if self._fault == "hang":
            self.hub.hold()
        if self._fault in ("cut", "hang"):
            self.close_connection = True

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, text in ((headers or {}) | {"Content-Type": "application/json"}).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            with suppress(ConnectionError):
                self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A client that goes away in the middle is part of the tests."""


@contextmanager
def serving() -> Iterator[Hub]:
    """The stand-in, answering at ENDPOINT while the block lasts."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    with _Server(("127.0.0.1", PORT), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()

"""A fake Hugging Face Hub: the part of its HTTP interface that its client uses, with fault injection.

As on the real Hub, a large file is read from and sent to another host (here `localhost` instead of 127.0.0.1), which
must never get the token.
"""

import base64
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

import yaml

from tests.ports import free_port

Fault = Literal[
    "429",  # too many requests
    "429 later",  # with Retry-After: 1
    "400",
    "500",
    "503",
    "reset",  # the connection ends before a response
    "lost",  # the same, after the request was carried out
    "cut",  # half of the body, then the connection ends
    "short",  # half of the body with a matching Content-Length, so HTTP shows no error
    "wrong",  # the right length, one wrong bit
    "whole",  # the range is ignored
    "hang",  # half of the body, then nothing until `release`
]
PORT = free_port()
ENDPOINT = f"http://127.0.0.1:{PORT}"
STORAGE = f"http://localhost:{PORT}"  # of large files
PAGE_ENTRIES = 3  # of a listing; with the real 1,000 no test would need a second page
TOKEN = "hf_" + "x" * 34  # the tests' access token


class Request(NamedTuple):
    """A received request: host name, method, path, and headers by lower-case name."""

    host: str
    method: str
    path: str
    headers: dict[str, str]


@dataclass
class Repository:
    """A dataset on the Hub: the fields of its card, and the files of each commit."""

    card: dict[str, Any]
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    stored: dict[str, bytes] = field(default_factory=dict)  # large files that were sent, by sha256

    def commit(self, files: dict[str, bytes]) -> str:
        """Make these files the newest commit of `main`; returns the commit."""
        config = "\n".join(
            f"- config_name: {name}\n  data_files:\n"
            + "".join(f"  - split: {split}\n    path: {path!r}\n" for split, path in splits.items())
            for name, splits in self.card["configs"].items()
        )
        readme = f"---\nlicense: {self.card['license']}\nconfigs:\n{config}\n---\n# A dataset\n"
        return self.add({"README.md": readme.encode()} | files)

    def add(self, files: dict[str, bytes]) -> str:
        """Make exactly these files the newest commit of `main`."""
        digest = hashlib.sha1(repr(sorted(files.items())).encode() + bytes(len(self.commits)))  # noqa: S324  # git's
        self.commits[digest.hexdigest()] = files
        return digest.hexdigest()

    def files(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commit = list(self.commits)[-1] if revision == "main" else revision
        return (commit, self.commits[commit]) if commit in self.commits else None


class Hub:
    """The state of the fake Hub: repositories by name, requests received, and faults still to inject."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.faults: list[tuple[str, Fault]] = []
        self._released = threading.Event()

    def release(self) -> None:
        """End the responses that hang."""
        self._released.set()

    def wait_for_release(self) -> None:
        self._released.wait()

    def dataset(self, name: str, files: dict[str, bytes], **card: Any) -> Repository:
        """Add a dataset of one commit; its configuration `default` has the files below `data/` as split `train`."""
        repository = Repository({"license": "odc-by", "configs": {"default": {"train": "data/*"}}} | card)
        repository.commit(files)
        self.repositories[name] = repository
        return repository

    def inject(self, path: str, *faults: Fault) -> None:
        """Inject one fault each into the next requests whose path matches the pattern."""
        self.faults += [(path, fault) for fault in faults]

    def fault(self, request: Request) -> Fault | None:
        with self.lock:
            self.requests.append(request)
            for index, (path, fault) in enumerate(self.faults):
                if fnmatch(request.path, path):
                    del self.faults[index]
                    return fault
        return None

    def received(self, path: str, method: str = "GET") -> list[Request]:
        """The requests so far whose path matches the pattern."""
        return [request for request in self.requests if request.method == method and fnmatch(request.path, path)]


def is_large(name: str) -> bool:
    """Whether the Hub stores a file outside git and publishes its sha256."""
    return Path(name).suffix in (".parquet", ".arrow", ".bin", ".gz", ".zst", ".bz2", ".xz")


def entry(name: str, body: bytes) -> dict[str, Any]:
    """A file's entry in a listing."""
    blob = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()  # noqa: S324  # git's
    fields: dict[str, Any] = {"type": "file", "oid": blob, "size": len(body), "path": name}
    if is_large(name):
        fields["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
    return fields


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # which delays each response by 40 ms
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

    def do_PUT(self) -> None:
        self.do_POST()

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        host = headers["host"].split(":")[0]
        self._fault = self.hub.fault(Request(host, self.command, path, headers))
        if self._fault == "reset":
            self._hang_up()
            return
        if self._fault in ("429", "429 later", "400", "500", "503"):
            later = {"Retry-After": "1"} if self._fault == "429 later" else {}
            self._json({"error": "not now"}, int(self._fault.split()[0]), later)
            return
        if self.command in ("POST", "PUT") and "paths-info" not in path:
            self._upload(path)
            return
        for name, repository in self.hub.repositories.items():
            if f"datasets/{name}/" in f"{path}/" and repository.private and not self._has_token():
                break
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

    def _hang_up(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _upload(self, path: str) -> None:
        if path == "/api/repos/create":
            self._create(json.loads(self._posted))
        elif path == "/api/validate-yaml":
            yaml.safe_load(json.loads(self._posted)["content"].split("---")[1])
            self._json({"errors": [], "warnings": []})
        for name, repository in self.hub.repositories.items():
            if path == f"/api/datasets/{name}/preupload/main":
                self._preupload(repository)
            elif path == f"/datasets/{name}.git/info/lfs/objects/batch":
                self._batch(name, repository)
            elif path.startswith(f"/sent/{name}/"):
                self._store(repository, path.rpartition("/")[2])
            elif path == f"/api/datasets/{name}/commit/main":
                self._commit(name, repository)

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        with self.hub.lock:
            is_new = name not in self.hub.repositories
            if is_new and self._has_token():
                private = asked.get("visibility") == "private"
                self.hub.repositories[name] = Repository({"license": "unknown"}, private=private)
                self.hub.repositories[name].add({".gitattributes": b"*.bin filter=lfs"})
        self._json({"url": f"{ENDPOINT}/datasets/{name}"}, (200 if is_new else 409) if self._has_token() else 401)

    def _preupload(self, repository: Repository) -> None:
        files, answer = repository.files("main")[1], []  # type: ignore[index]  # main exists
        for path in (file["path"] for file in json.loads(self._posted)["files"]):
            known = entry(path, files[path]) if path in files else {}
            oid = known["lfs"]["oid"] if "lfs" in known else known.get("oid")
            mode = "lfs" if is_large(path) else "regular"
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": answer})

    def _batch(self, name: str, repository: Repository) -> None:
        objects = json.loads(self._posted)["objects"]
        for file in objects:
            if file["oid"] not in repository.stored:
                file["actions"] = {"upload": {"href": f"{STORAGE}/sent/{name}/{file['oid']}?signature=sekret"}}
        self._json({"transfer": "basic", "objects": objects})

    def _store(self, repository: Repository, oid: str) -> None:
        if hashlib.sha256(self._posted).hexdigest() != oid:
            self._json({"error": "wrong checksum"}, 400)
            return
        repository.stored[oid] = self._posted
        self._json({})

    def _commit(self, name: str, repository: Repository) -> None:
        header, *lines = (json.loads(line) for line in self._posted.splitlines())
        with self.hub.lock:
            head, files = repository.files("main")  # type: ignore[misc]  # main exists
            if not self._has_token() or header["value"].get("parentCommit", head) != head:
                self._json({"error": "A commit has happened since."}, 412 if self._has_token() else 403)
                return
            files = dict(files)
            for file in (line["value"] for line in lines):
                content = base64.b64decode(file["content"]) if "content" in file else repository.stored[file["oid"]]
                files[file["path"]] = content
            commit = repository.add(files)
        self._json({"commitUrl": f"{ENDPOINT}/datasets/{name}/commit/{commit}", "commitOid": commit})

    def _api(self, name: str, repository: Repository, verb: str, rest: str, query: str) -> None:
        revision, _, folder = rest.partition("/")
        tree = repository.files(revision)
        if tree is None:
            self._json({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
            return
        commit, files = tree
        if verb == "revision":
            card = {"license": repository.card["license"]}
            siblings = [{"rfilename": file} for file in files]
            facts = {"id": name, "sha": commit, "private": repository.private, "disabled": False, "siblings": siblings}
            self._json(facts | {"gated": "manual" if repository.gated else False, "cardData": card, "tags": []})
        elif verb == "tree":
            self._tree(files, folder, parse_qs(query))
        else:
            paths = parse_qs(self._posted.decode())["paths"]
            self._json([entry(path, files[path]) for path in paths if path in files])

    def _tree(self, files: dict[str, bytes], folder: str, query: dict[str, list[str]]) -> None:
        prefix = f"{folder}/" if folder else ""
        inside = [entry(file, body) for file, body in sorted(files.items()) if file.startswith(prefix)]
        names = {str(Path(item["path"]).parent) for item in inside} - {folder or "."}
        folders = {part for name in names for part in [name, *map(str, Path(name).parents)] if part.startswith(prefix)}
        items = inside + [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in folders - {"."}]
        if query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            items = [item for item in items if "/" not in item["path"].removeprefix(prefix)]
        if not items:
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        start = int(query.get("cursor", ["0"])[0])
        more = {}
        if start + PAGE_ENTRIES < len(items):
            flags = "&".join(f"{name}={value[0]}" for name, value in query.items() if name != "cursor")
            more = {"Link": f'<{ENDPOINT}{urlsplit(self.path).path}?{flags}&cursor={start + PAGE_ENTRIES}>; rel="next"'}
        self._json(items[start : start + PAGE_ENTRIES], 200, more)

    def _resolve(self, repository: Repository, rest: str) -> None:
        revision, _, file = rest.partition("/")
        tree = repository.files(revision)
        if tree is None or file not in tree[1]:
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        if repository.gated and not self._has_token():
            self._json({"error": "gated"}, 401, {"X-Error-Code": "GatedRepo"})
            return
        commit, files = tree
        fields = entry(file, files[file])
        headers = {"X-Repo-Commit": commit, "ETag": f'"{fields["oid"]}"'}
        if "lfs" not in fields:
            self._body(files[file], headers)
            return
        name = next(name for name, other in self.hub.repositories.items() if other is repository)
        headers |= {"X-Linked-Size": str(fields["size"]), "X-Linked-ETag": f'"{fields["lfs"]["oid"]}"'}
        headers["Location"] = f"{STORAGE}/stored/{name}/{commit}/{file}"
        self._json({}, 302, headers)

    def _body(self, body: bytes, headers: dict[str, str]) -> None:
        status = 200
        byte_range = self.headers.get("Range")
        if byte_range and self._fault != "whole":
            first, _, last = byte_range.removeprefix("bytes=").partition("-")
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
            self.hub.wait_for_release()
        if self._fault in ("cut", "hang"):
            self.close_connection = True

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        if self._fault == "lost":
            self._hang_up()
            return
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
        """Tests disconnect clients on purpose."""


@contextmanager
def serving() -> Iterator[Hub]:
    """A fake Hub that listens at ENDPOINT while the block runs."""
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

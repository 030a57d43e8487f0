"""An S3 server of a few lines that says yes to everything: it ignores conditions and sums, as half of them do."""

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "Dishonest/1.0", ""
    objects: ClassVar[dict[str, bytes]] = {}

    def do_PUT(self) -> None:
        self.objects[self._key()] = self.rfile.read(int(self.headers["content-length"]))
        self._answer(200)

    def do_GET(self) -> None:
        self._answer(200 if self._key() in self.objects else 404, body=self._key() in self.objects)

    def do_HEAD(self) -> None:
        self._answer(200 if self._key() in self.objects or self._key().count("/") == 1 else 404)

    def do_DELETE(self) -> None:
        self.objects.pop(self._key(), None)
        self._answer(204)

    def _key(self) -> str:
        return self.path.partition("?")[0]

    def _answer(self, status: int, *, body: bool = False) -> None:
        content = self.objects.get(self._key(), b"")
        self.send_response(status)
        self.send_header("ETag", f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"')
        self.send_header("Content-Length", str(len(content) if body else 0))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nobody reads it."""


@contextmanager
def dishonest_server() -> Iterator[tuple[str, dict[str, bytes]]]:
    """Its endpoint, and what it holds by path."""
    held: dict[str, bytes] = {}
    handler = type("Handler", (_Handler,), {"objects": held})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", held
        finally:
            server.shutdown()

"""A minimal S3 server that accepts every request: it ignores conditions, checksums and ranges."""

import hashlib
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
        self.send_header("Content-Length", str(len(content) if body or self.command == "HEAD" else 0))
        self.send_header("Last-Modified", self.date_time_string())
        self.end_headers()
        if body:
            self.wfile.write(content)

    def handle(self) -> None:
        with suppress(OSError):  # a client that distrusts the certificate disconnects
            super().handle()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def dishonest_server(tls: ssl.SSLContext | None = None) -> Iterator[tuple[str, dict[str, bytes]]]:
    """The endpoint of a running server, and its objects by path."""
    objects: dict[str, bytes] = {}
    handler = type("Handler", (_Handler,), {"objects": objects})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}", objects
        finally:
            server.shutdown()

"""A fault-injecting proxy in front of a real S3 server, which records every request.

It handles one request per connection and forwards the bytes unchanged. Signatures stay valid, because they cover
neither `Connection` nor `Expect`.
"""

import socket
import socketserver
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

Fault = Literal[
    "503",  # busy
    "503 later",  # busy, with Retry-After: 1
    "429",
    "500",
    "409",  # another write of the key is in progress
    "reset",  # the connection ends, the request is not executed
    "lost",  # the request is executed, then the connection ends without a response
    "stall",  # the request is executed, but no byte of the response arrives
    "cut",  # half of the body, then the connection ends
    "stall in body",  # half of the body, then nothing
    "flip",  # one wrong bit in the response body
    "flip up",  # one wrong bit in the request body
]
ERROR_CODES = {"503": "SlowDown", "503 later": "SlowDown", "429": "TooManyRequests", "500": "InternalError",
               "409": "ConditionalRequestConflict"}  # fmt: skip


class Request(NamedTuple):
    """A received request: its number, method, path with query, and headers by lower-case name."""

    number: int
    method: str
    path: str
    headers: dict[str, str]


Plan = Callable[[Request], Fault | None]


class Proxy(socketserver.ThreadingTCPServer):
    """Forwards to `server`. `plan` chooses each request's fault; `requests` and `injected` record both."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, server: str, plan: Plan) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(server)
        self.plan = plan
        self.requests: list[Request] = []
        self.injected: list[Fault] = []
        self.ended = threading.Event()
        self._lock = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def choose_fault(self, method: str, path: str, headers: dict[str, str]) -> Fault | None:
        with self._lock:
            request = Request(len(self.requests), method, path, headers)
            self.requests.append(request)
            if (fault := self.plan(request)) is not None:
                self.injected.append(fault)
            return fault

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Tests disconnect clients on purpose."""


@contextmanager
def running_proxy(server: str, plan: Plan) -> Iterator[Proxy]:
    """A running proxy in front of the server."""
    with Proxy(server, plan) as proxy:
        threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        try:
            yield proxy
        finally:
            proxy.ended.set()
            proxy.shutdown()


class _Handler(socketserver.StreamRequestHandler):
    server: Proxy

    def handle(self) -> None:
        first = self.rfile.readline()
        if not first:
            return None
        method, path, _ = first.decode().split(" ", 2)
        lines = []
        while (line := self.rfile.readline()) not in (b"\r\n", b""):
            lines.append(line)
        pairs = (line.decode().split(":", 1) for line in lines)
        headers = {name.lower(): value.strip() for name, value in pairs}
        fault = self.server.choose_fault(method, path, headers)
        if headers.get("expect") == "100-continue":
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = self.rfile.read(int(headers.get("content-length", 0)))
        if fault == "reset":
            return self._reset()
        if fault in ERROR_CODES:
            return self._refuse(fault)
        forwarded = [line for line in lines if line.split(b":")[0].lower() not in (b"connection", b"expect")]
        sent_body = _flipped(body) if fault == "flip up" and body else body
        response = self._forward(first + b"".join(forwarded) + b"Connection: close\r\n\r\n" + sent_body)
        if fault == "lost":
            return self._reset()
        if fault == "stall":
            return self._wait()
        head, _, content = response.partition(b"\r\n\r\n")
        head += b"\r\n\r\n"
        if fault == "flip" and content:
            content = _flipped(content)
        if fault in ("cut", "stall in body"):
            self.wfile.write(head + content[: len(content) // 2])
            return self._wait() if fault == "stall in body" else self._reset()
        self.wfile.write(head + content)
        return None

    def _forward(self, request: bytes) -> bytes:
        address = (self.server.upstream.hostname, self.server.upstream.port)
        with socket.create_connection(address) as upstream:
            with suppress(ConnectionError):  # a server may respond and close before it has read the whole body
                upstream.sendall(request)
            return b"".join(iter(lambda: upstream.recv(1 << 20), b""))

    def _refuse(self, fault: str) -> None:
        body = f"<Error><Code>{ERROR_CODES[fault]}</Code><Message>injected</Message></Error>".encode()
        later = "Retry-After: 1\r\n" if fault == "503 later" else ""
        head = f"HTTP/1.1 {fault[:3]} Injected\r\nContent-Length: {len(body)}\r\n{later}Connection: close\r\n\r\n"
        self.wfile.write(head.encode() + body)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _wait(self) -> None:
        """Send nothing until the client disconnects."""
        self.connection.settimeout(0.2)
        while not self.server.ended.is_set():
            try:
                if not self.connection.recv(1):
                    return
            except TimeoutError:
                continue


def _flipped(body: bytes) -> bytes:
    middle = len(body) // 2
    return body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1 :]

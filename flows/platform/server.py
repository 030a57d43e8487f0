"""A local Prefect server: on a port of 127.0.0.1, with its database in `.gpt2`."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import httpx

from storage.stores.opening import CREDENTIALS

HOME = Path(".gpt2")
SERVED = HOME / "server.json"  # the port of `gpt2 serve` while it runs
START_SECONDS = 120.0  # the first start creates the database: 15 s on two busy cores
SETTINGS = Path(__file__).with_name("prefect.env")


def prefect_environment(port: int | None = None) -> dict[str, str]:
    """Prefect's settings as environment variables, for the local server and its clients."""
    lines = SETTINGS.read_text().splitlines()
    environment = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    environment |= {"PREFECT_SERVER_LOGGING_LEVEL": "WARNING", "PREFECT_HOME": str((HOME / "prefect").absolute())}
    if port is not None:
        url = f"http://127.0.0.1:{port}/api"
        environment |= {"PREFECT_API_URL": url, "PREFECT_SERVER_UI_API_URL": url}  # the UI's default is port 4200
    return environment


@contextmanager
def prefect_server() -> Iterator[str]:
    """Choose a Prefect server, set PREFECT_API_URL to its address and yield the address. Raises ValueError on failure.

    In this order: the server at PREFECT_API_URL, the server of `gpt2 serve`, a new server for the block.
    """
    if url := os.environ.get("PREFECT_API_URL"):
        _check_named(url)
        yield url
        return
    served = served_port()
    port = served or free_port()
    os.environ.update(prefect_environment(port))
    with nullcontext() if served else running_server(port):
        yield os.environ["PREFECT_API_URL"]


def _check_named(url: str) -> None:
    """Raise ValueError when no Prefect server answers at PREFECT_API_URL, or when it refuses this user."""
    if CREDENTIALS.search(url):
        raise ValueError("PREFECT_API_URL contains a password. Put user:password into PREFECT_API_AUTH_STRING instead.")
    from prefect.client.orchestration import get_client

    try:
        with get_client(sync_client=True) as client:
            client.api_version()
    except httpx.HTTPError as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"PREFECT_API_URL = {url!r}: this Prefect server cannot be used: {reason}. Start the server, set "
            f"PREFECT_API_AUTH_STRING=user:password if it requires one, or unset PREFECT_API_URL."
        ) from error


def named_server() -> bool:
    """Whether PREFECT_API_URL or a running `gpt2 serve` names a server."""
    return bool(os.environ.get("PREFECT_API_URL")) or served_port() is not None


def served_port() -> int | None:
    """The port of this folder's `gpt2 serve`, or None when no server answers there."""
    try:
        port = int(json.loads(SERVED.read_text())["port"])
    except (OSError, ValueError, KeyError):
        return None
    return port if _is_healthy(port) else None


@contextmanager
def serving(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server while the block lasts, and let every `gpt2` command in this folder use it."""
    os.environ.update(prefect_environment(port))
    with running_server(port) as process:
        SERVED.write_text(json.dumps({"port": port}))
        try:
            yield process
        finally:
            SERVED.unlink(missing_ok=True)


@contextmanager
def running_server(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server on that port while the block lasts. Raises ValueError when it does not start."""
    process = start("server", port, "server", "start", "--host", "127.0.0.1", "--port", str(port))
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _is_healthy(port):
            code = process.poll()
            if code is not None or time.monotonic() > deadline:
                reason = f"no answer in {START_SECONDS:.0f} s" if code is None else f"exit code {code}"
                log = log_path("server")
                raise ValueError(f"Prefect's server did not start on port {port}: {reason}. See its log: {log}")
            time.sleep(0.2)
        yield process
    finally:
        stop(process)


def start(name: str, port: int, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a `prefect` command for the server at that port. It ends with this process and logs to `log_path(name)`."""
    HOME.mkdir(exist_ok=True)
    argv = [sys.executable, "-m", "flows.platform.command", str(os.getpid()), *arguments]
    environment = os.environ | prefect_environment(port)
    with log_path(name).open("ab") as log:
        return subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=environment
        )


def log_path(name: str) -> Path:
    """The log file of the process with this name."""
    return HOME.absolute() / f"{name}.log"


def stop(process: subprocess.Popen[bytes], grace_seconds: float = 10) -> None:
    """Stop a process and its group: SIGTERM, and SIGKILL after the grace period."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(grace_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def free_port() -> int:
    """An unused port of 127.0.0.1."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _is_healthy(port: int) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(f"http://127.0.0.1:{port}/api/health", timeout=2).is_success
    return False

"""A local Prefect server: on a port of 127.0.0.1, with its database in `.gpt2`.

python -m flows.platform.server --port 4210 --parent PID      the server process; ends with its parent
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from model.processes.parent import end_with_parent

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
    """Choose a Prefect server and set PREFECT_API_URL to its address. Yields the address. Raises ValueError.

    The first of: the server of PREFECT_API_URL, that of `gpt2 serve`, a new one that runs while the block lasts.
    """
    if url := os.environ.get("PREFECT_API_URL"):
        _check_named(url)
        yield url
        return
    if (port := served_port()) is not None:
        os.environ.update(prefect_environment(port))
        yield os.environ["PREFECT_API_URL"]
        return
    port = free_port()
    os.environ.update(prefect_environment(port))
    with running_server(port):
        yield os.environ["PREFECT_API_URL"]


def _check_named(url: str) -> None:
    """Raise ValueError when no Prefect server answers at PREFECT_API_URL, or when it refuses this user."""
    import httpx
    from prefect.client.orchestration import get_client

    try:
        with get_client(sync_client=True) as client:
            client.api_version()
    except httpx.HTTPError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"PREFECT_API_URL = {url!r}: no Prefect server can be used there: {reason}. Start the server, set "
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
    return port if healthy(port) else None


def start(name: str, module: str, arguments: list[str], settings: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start one of our modules as a process that ends with this one and writes to the log file `name`."""
    HOME.mkdir(exist_ok=True)
    argv = [sys.executable, "-m", module, *arguments, "--parent", str(os.getpid())]
    with _log(name).open("ab") as log:
        return subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=os.environ | settings
        )


def _log(name: str) -> Path:
    return HOME / f"{name}.log"


@contextmanager
def running_server(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server on that port while the block lasts. Raises ValueError when it does not start."""
    process = start("server", "flows.platform.server", ["--port", str(port)], prefect_environment(port))
    try:
        deadline = time.monotonic() + START_SECONDS
        while not healthy(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ValueError(
                    f"Prefect's server did not start on port {port} (exit code {process.poll()}). See its log: "
                    f"{_log('server').absolute()}"
                )
            time.sleep(0.2)
        yield process
    finally:
        stop(process)


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


def wait_for_end(processes: dict[str, subprocess.Popen[bytes]]) -> None:
    """Return at Ctrl-C or SIGTERM. Raises ValueError when a process ends before that."""
    stopping = threading.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: stopping.set())
    while not stopping.wait(1):
        for name, process in processes.items():
            if process.poll() is not None:
                raise ValueError(
                    f"gpt2 serve: {name} ended unexpectedly with exit code {process.returncode}. See its log: "
                    f"{_log(name).absolute()}. Start gpt2 serve again; retried runs resume."
                )


def free_port() -> int:
    """An unused port of 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_port(port: int) -> None:
    """Raise ValueError when the port is in use."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # ignore connections in TIME_WAIT
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(
                f"port {port} of 127.0.0.1 is not available: {error.strerror}. Stop the process that uses it, or "
                f"choose another port: --port {port + 1}"
            ) from error


def healthy(port: int) -> bool:
    """Whether a Prefect server answers on that port."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def stop(process: subprocess.Popen[bytes], grace_seconds: float = 10) -> None:
    """Stop a process and its group: SIGTERM, and SIGKILL after the grace period."""
    for signum, seconds in ((signal.SIGTERM, grace_seconds), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, signum)
            process.wait(seconds)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def main() -> None:
    """Run Prefect's server in this process until its parent ends."""
    parser = argparse.ArgumentParser(prog="python -m flows.platform.server")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    args = parser.parse_args()
    end_with_parent(args.parent)
    import uvicorn
    from prefect.server.api.server import create_app

    uvicorn.run(create_app(final=True), host="127.0.0.1", port=args.port, timeout_keep_alive=5, log_level="warning")


if __name__ == "__main__":
    main()

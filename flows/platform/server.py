"""A Prefect server of one's own: on a free port of this host, with its database in `.gpt2`. Knows no flow.

python -m flows.platform.server --port 4210 --parent PID      the server process; ends when its parent dies
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
SERVED = HOME / "server.json"  # where `gpt2 serve` is, while it runs
START_SECONDS = 120.0  # the first start makes the database: 15 s on two busy cores
SETTINGS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
    # kept in memory, leases of slots are gone when a server is started again, which then ends the runs that hold them
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    # likewise which events automations have seen: those after the start would wait 15 minutes for those before it
    "PREFECT_SERVER_EVENTS_CAUSAL_ORDERING": "flows.platform.event_ordering",
    # task runs are recorded one by one by default, 25 to 30 a second; in batches the records keep up
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
}


def prefect_environment(port: int | None = None) -> dict[str, str]:
    """Prefect's settings for this project, for the server and for its clients."""
    environment = SETTINGS | {"PREFECT_HOME": str((HOME / "prefect").absolute())}
    if port is not None:
        url = f"http://127.0.0.1:{port}/api"
        # the UI asks port 4200 for its data unless it is told otherwise
        environment |= {"PREFECT_API_URL": url, "PREFECT_SERVER_UI_API_URL": url}
    return environment


@contextmanager
def prefect_server() -> Iterator[str]:
    """The address of a Prefect server that this process may use, put into its environment; its own is stopped again.

    Taken in this order: the one PREFECT_API_URL names, the one `gpt2 serve` keeps, a new one on a free port.
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
    """Raise ValueError when no Prefect server is there, or none that lets this user in."""
    import httpx
    from prefect.client.orchestration import get_client

    try:
        with get_client(sync_client=True) as client:
            client.api_version()
    except httpx.HTTPError as error:
        why = str(error).splitlines()[0]
        raise ValueError(
            f"PREFECT_API_URL = {url!r}: a Prefect server was expected there, found: {why}. Start it, mend it, "
            f"set PREFECT_API_AUTH_STRING=user:password where it asks for one, or unset PREFECT_API_URL."
        ) from error


def named_server() -> bool:
    """Whether there is a server to use already: the one of PREFECT_API_URL, or of `gpt2 serve`."""
    return bool(os.environ.get("PREFECT_API_URL")) or served_port() is not None


def served_port() -> int | None:
    """The port of the server that `gpt2 serve` keeps for this folder, when it answers."""
    try:
        port = int(json.loads(SERVED.read_text())["port"])
    except (OSError, ValueError, KeyError):
        return None
    return port if healthy(port) else None


def start(name: str, module: str, words: list[str], settings: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a module of ours that ends with this process; what it says goes into a log of that name."""
    HOME.mkdir(exist_ok=True)
    command = [sys.executable, "-m", module, *words, "--parent", str(os.getpid())]
    with _log(name).open("ab") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, env=os.environ | settings
        )


def _log(name: str) -> Path:
    return HOME / f"{name}.log"


@contextmanager
def running_server(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A server on that port for as long as the block lasts. Raises ValueError when it does not come up."""
    process = start("server", "flows.platform.server", ["--port", str(port)], prefect_environment(port))
    try:
        deadline = time.monotonic() + START_SECONDS
        while not healthy(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ValueError(
                    f"Prefect's server was asked for on port {port}, it did not come up (exit code {process.poll()}). "
                    f"Its log says why: {_log('server').absolute()}"
                )
            time.sleep(0.2)
        yield process
    finally:
        stop(process)


@contextmanager
def serving(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A server that the verbs of this folder find and use, for as long as the block lasts."""
    os.environ.update(prefect_environment(port))
    with running_server(port) as process:
        SERVED.write_text(json.dumps({"port": port}))
        try:
            yield process
        finally:
            SERVED.unlink(missing_ok=True)


def wait_for_end(processes: dict[str, subprocess.Popen[bytes]]) -> None:
    """Return at Ctrl-C or SIGTERM. Raises ValueError when one of the processes ends before."""
    asked = threading.Event()
    for sign in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sign, lambda *_: asked.set())
    while not asked.wait(1):
        for name, process in processes.items():
            if process.poll() is not None:
                raise ValueError(
                    f"gpt2 serve: {name} was to run until Ctrl-C, it ended with exit code {process.returncode}. "
                    f"Its log says why: {_log(name).absolute()}. Start gpt2 serve again: the runs go on."
                )


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_port(port: int) -> None:
    """Raise ValueError when somebody listens on the port already."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of one that has just stopped are none
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ValueError(
                f"port {port} of 127.0.0.1 was asked for, it cannot be had: {error.strerror}. "
                f"Stop what listens there, or choose another: --port {port + 1}"
            ) from error


def healthy(port: int) -> bool:
    """Whether a Prefect server answers there."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/health", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def stop(process: subprocess.Popen[bytes], patience_seconds: float = 10) -> None:
    """End a process and its group."""
    for sign, seconds in ((signal.SIGTERM, patience_seconds), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, sign)
            process.wait(seconds)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def main() -> None:
    """Become Prefect's server, and end with the process that asked for it."""
    parser = argparse.ArgumentParser(prog="python -m flows.platform.server")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--parent", type=int, required=True)
    asked = parser.parse_args()
    end_with_parent(asked.parent)
    import uvicorn
    from prefect.server.api.server import create_app

    uvicorn.run(create_app(final=True), host="127.0.0.1", port=asked.port, timeout_keep_alive=5, log_level="warning")


if __name__ == "__main__":
    main()

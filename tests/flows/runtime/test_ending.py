"""What a verb does when its Prefect server ends: a real process, whose server is a socket that listens."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress

import httpx
import pytest

from flows.console import options
from flows.platform import automations, server
from flows.runtime import ending
from model.runs.job import JobFailed
from tests.polling import poll

SCRIPT = """
import atexit, logging, multiprocessing, signal, socket, sys, threading, time
from flows.runtime import ending
signal.signal(signal.SIGINT, signal.SIG_IGN)  # a job in the background
ending.CHECK_SECONDS, ending.STOP_SECONDS, ending.ANSWER_SECONDS, ending.SILENCES = 0.05, 1.0, 0.2, 3
multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,)).start()  # it keeps this output open
listener = socket.create_server(("127.0.0.1", 0))
atexit.register(time.sleep, 600)  # Prefect's exit handlers wait for the server
with ending.ending_with_server(f"http://127.0.0.1:{listener.getsockname()[1]}/api"):
    try:
        if sys.argv[2] == "ended":
            listener.close()
        threading.Event().wait(600)
    finally:
        logging.error("a request failed")
        print("cleaned up")
        time.sleep(float(sys.argv[1]))
"""


@pytest.mark.parametrize("state", ["ended", "does not answer"])
@pytest.mark.parametrize("hanging_seconds", [0, 600], ids=["clean-up ends", "clean-up hangs"])
def test_a_verb_ends_soon_after_its_server_cleans_up_and_says_why(hanging_seconds: int, state: str) -> None:
    argv = [sys.executable, "-c", SCRIPT, str(hanging_seconds), state]
    buffered = os.environ | {"PYTHONUNBUFFERED": ""}
    result = subprocess.run(argv, env=buffered, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "cleaned up\n"), result.stderr
    assert result.stderr.startswith("error: ")
    for part in (state, "server.log", "same command again"):
        assert part in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_thread_of_a_stopped_block_keeps_no_process_alive() -> None:
    """Such as a stalled shard job, if Ctrl-C raises where nothing waits for its thread."""
    script = (
        "import os, signal, threading\nfrom flows.runtime import ending\nending.STOP_SECONDS = 0.2\n"
        "with ending.ending():\n    threading.Thread(target=threading.Event().wait).start()\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n    threading.Event().wait()\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 130, result.stderr
    assert "stopped; run the same command again" in result.stderr


def test_the_processes_of_a_killed_pool_end() -> None:
    """Else they would keep the lock of a run that was started with --detach."""
    script = (
        "import os, signal\nfrom concurrent.futures import ProcessPoolExecutor\n"
        "from multiprocessing import get_context\n"
        "from flows.runtime import ending\nwith ProcessPoolExecutor(1, get_context('spawn')) as pool:\n"
        "    pool.submit(ending._fault, 'http://127.0.0.1:1').result()\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120, check=False)
    assert result.returncode == -signal.SIGKILL, result.stderr  # once every process has closed its output


def test_a_server_that_restarts_in_between_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "CHECK_SECONDS", 0.01)
    faults = ["ended", "ended", ""] * 3
    asked = threading.Event()

    def next_fault(_url: str) -> str:
        if not faults:
            asked.set()
        return faults.pop(0) if faults else ""

    monkeypatch.setattr(ending, "_fault", next_fault)
    with ending.ending_with_server("http://127.0.0.1:1/api"):
        poll(asked.is_set)


def test_a_server_that_fails_ends_a_verb_with_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one whose disk is full, or one at PREFECT_API_URL that went away."""
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    monkeypatch.setattr(server, "prefect_server", lambda: nullcontext("http://127.0.0.1:1/api"))
    with pytest.raises(JobFailed, match=r"127.0.0.1:1.*500.*disk.*same command"), options.prefect(verbose=True):
        raise httpx.HTTPError("500 Internal Server Error")


def test_a_server_too_busy_to_answer_has_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "ANSWER_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener, ExitStack() as waiting:
        address = listener.getsockname()
        with suppress(TimeoutError):
            for _ in range(100):
                waiting.enter_context(socket.create_connection(address, 0.1))
        assert ending._fault(f"http://127.0.0.1:{address[1]}/api").startswith("does not answer")
    assert ending._fault(f"http://127.0.0.1:{address[1]}/api") == "ended"


@pytest.mark.parametrize("named", ["", "http://127.0.0.1:1/api"], ids=["own", "PREFECT_API_URL"])
def test_only_a_server_of_this_folder_is_watched(named: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server at PREFECT_API_URL may restart, as in the Compose stack: the verb then continues."""

    @contextmanager
    def prefect_server() -> Iterator[str]:
        yield "http://127.0.0.1:1/api"

    watched = []

    @contextmanager
    def end_with_server(url: str) -> Iterator[None]:
        watched.append(url)
        yield

    monkeypatch.setenv("PREFECT_API_URL", named)
    monkeypatch.setenv("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "")
    monkeypatch.setattr(server, "prefect_server", prefect_server)
    monkeypatch.setattr(ending, "ending_with_server", end_with_server)
    with options.prefect(verbose=True):
        seconds = int(os.environ["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
        assert 3 * seconds <= automations.HEARTBEAT_LIMIT_SECONDS  # Prefect's 180 would make every run count as dead
        assert watched == ([] if named else ["http://127.0.0.1:1/api"])

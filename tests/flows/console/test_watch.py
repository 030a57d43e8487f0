"""What a verb does when its Prefect server ends: a real process, whose server is a socket that listens."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from flows.console import options, watch
from flows.platform import server
from tests.polling import poll

SCRIPT = """
import atexit, signal, socket, sys, threading, time
from flows.console import watch
signal.signal(signal.SIGINT, signal.SIG_IGN)  # a job in the background
watch.CHECK_SECONDS, watch.STOP_SECONDS = 0.05, 1.0
listener = socket.create_server(("127.0.0.1", 0))
atexit.register(time.sleep, 600)  # Prefect's exit handlers wait for the server
with watch.end_with_server(f"http://127.0.0.1:{listener.getsockname()[1]}/api"):
    try:
        listener.close()
        threading.Event().wait(600)
    finally:
        print("cleaned up", flush=True)
        time.sleep(float(sys.argv[1]))
"""


@pytest.mark.parametrize("hanging_seconds", [0, 600], ids=["clean-up ends", "clean-up hangs"])
def test_a_verb_ends_soon_after_its_server_cleans_up_and_says_why(hanging_seconds: int) -> None:
    argv = [sys.executable, "-c", SCRIPT, str(hanging_seconds)]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (1, "cleaned up\n"), result.stderr
    assert result.stderr.startswith("error: ")
    for part in ("server.log", "same command again"):
        assert part in result.stderr
    assert "Traceback" not in result.stderr


def test_a_server_that_restarts_in_between_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "CHECK_SECONDS", 0.01)
    answers = [True, True, False] * 3
    asked = threading.Event()

    def refuses(_url: str) -> bool:
        if not answers:
            asked.set()
        return bool(answers) and answers.pop(0)

    monkeypatch.setattr(watch, "_refuses", refuses)
    with watch.end_with_server("http://127.0.0.1:1/api"):
        poll(asked.is_set)


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
    monkeypatch.setattr(watch, "end_with_server", end_with_server)
    with options.prefect(verbose=True):
        assert watched == ([] if named else ["http://127.0.0.1:1/api"])

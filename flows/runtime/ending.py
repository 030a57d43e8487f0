"""Ends this process where it would hang: after a signal, without its Prefect server or parent, without memory."""

import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from flows.platform.server import log_path
from model.runs.job import OUT_OF_MEMORY

STOP_SECONDS = 9.0  # Prefect expects a cancelled run to end within 10 s, and training has 8 s to save a checkpoint
CHECK_SECONDS = 1.0
REFUSALS = 3  # so that `gpt2 serve` may restart in between
ANSWER_SECONDS, SILENCES = 5.0, 24  # 144 s: a busy server is slow, but a frozen one never answers


@contextmanager
def ending() -> Iterator[None]:
    """End this process if it hangs after SIGTERM or Ctrl-C in the block. Only for work that can be repeated."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    left = threading.Event()

    def watch() -> None:
        for signum in iter(lambda: os.read(reader, 1), b""):
            if signum[0] in (signal.SIGTERM, signal.SIGINT) and not left.wait(STOP_SECONDS):
                _say("stopped; run the same command again to continue")
                _exit(128 + signum[0])
        os.close(reader)

    threading.Thread(target=watch, daemon=True).start()
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
        left.set()  # not after an error: a thread of the block may keep the interpreter from its end
    finally:
        signal.set_wakeup_fd(-1)
        os.close(writer)


@contextmanager
def ending_with_server(url: str) -> Iterator[None]:
    """If nothing listens at `url` any more, say so, interrupt the block and exit: Prefect would retry 20 minutes."""
    signal.signal(signal.SIGUSR1, signal.default_int_handler)  # SIGINT may be ignored, as in a background job
    left = threading.Event()
    watcher = threading.Thread(target=_watch, args=(url, left), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        left.set()
        watcher.join()


def _watch(url: str, left: threading.Event) -> None:
    faults: list[str] = []  # since the last answer
    while faults.count("ended") < REFUSALS and len(faults) < SILENCES:
        if left.wait(CHECK_SECONDS):
            return
        fault = _fault(url)
        faults = [*faults, fault] if fault else []
    remedy = f"See its log: {log_path('server')}. Run the same command again."
    _say(f"error: Prefect's server at {url} {faults[-1]}. {remedy}")
    logging.disable()  # else Prefect logs every request that fails
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
    left.wait(STOP_SECONDS)
    with suppress(OSError):
        sys.stdout.flush()
    _exit(1)  # Prefect's threads and exit handlers would still wait for the server


def _fault(url: str) -> str:
    """What is wrong with the server; empty if it answers."""
    try:
        with socket.create_connection(("127.0.0.1", urlsplit(url).port or 80), ANSWER_SECONDS) as client:
            client.sendall(b"GET / HTTP/1.0\r\n\r\n")
            client.recv(1)
    except ConnectionRefusedError:
        return "ended"
    except TimeoutError:
        return f"does not answer; to end it: fuser -k {log_path('server')}"
    except OSError:
        pass
    return ""


def _on_unraisable(raised: Any) -> None:
    """End this process if a thread dies before it starts: the code that started it, as in Prefect, waits forever."""
    if issubclass(raised.exc_type, MemoryError):
        _say(f"error: {OUT_OF_MEMORY}")
        _exit(1)
    sys.__unraisablehook__(raised)


def _say(text: str) -> None:
    with suppress(OSError):  # nobody reads it
        os.write(2, f"{text}\n".encode())  # takes no lock, which a thread may hold for ever


def _exit(code: int) -> None:
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(code)


def _end_with_parent(parent: Any) -> None:
    parent.join()
    _exit(1)


sys.unraisablehook = _on_unraisable  # at import, since a task runner's processes only import the tasks
if parent_process := multiprocessing.parent_process():  # killed, it cannot end its pool, whose processes wait for tasks
    threading.Thread(target=_end_with_parent, args=(parent_process,), daemon=True).start()

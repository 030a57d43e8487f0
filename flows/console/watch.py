"""Ends this process soon after its local Prefect server, whose loss Prefect's clients would retry for 20 minutes."""

import logging
import multiprocessing
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from flows.platform.server import log_path

CHECK_SECONDS = 1.0
REFUSALS = 3  # consecutive ones, so that `gpt2 serve` may restart in between
STOP_SECONDS = 10.0  # Processes gives training 8 s to save a checkpoint


@contextmanager
def end_with_server(url: str) -> Iterator[None]:
    """If nothing listens at `url` any more, print why, interrupt the block like Ctrl-C and exit with code 1."""
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
    refusals = 0
    while refusals < REFUSALS:
        if left.wait(CHECK_SECONDS):
            return
        refusals = refusals + 1 if _refuses(url) else 0
    remedy = f"See its log: {log_path('server')}. Run the same command again to continue."
    print(f"error: Prefect's server at {url} ended. {remedy}", file=sys.stderr, flush=True)
    logging.disable()  # else Prefect logs every request that fails
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)
    left.wait(STOP_SECONDS)
    for worker in multiprocessing.active_children():
        worker.terminate()
    sys.stdout.flush()
    os._exit(1)  # Prefect's threads and exit handlers would still wait for the server


def _refuses(url: str) -> bool:
    address = urlsplit(url)
    try:
        socket.create_connection((str(address.hostname), address.port or 80), CHECK_SECONDS).close()
    except OSError as error:
        return isinstance(error, ConnectionRefusedError)
    return False

"""One host of a training on several: waits until the others are there, and meets them again when one was lost.

    python -m model.processes.pod STORE_URL JOB_KEY    a pod of deploy/kubernetes.yaml; JOB_COMPLETION_INDEX, POD_IP

`python -m model` waits for the first host a minute only, and answers 0 for a stop at a checkpoint, too. Here the exit
codes are what a group of hosts needs: 0 the job has its result, 2 what a user can mend, 1 anything else: run it again.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from model.runs.job import Job, read_job, read_result
from storage.errors import StorageError
from storage.stores.opening import open_store

LOST = "error: resources.rendezvous"  # how `python -m model` begins to say that hosts did not meet
LOOK_SECONDS = 1.0


class Host:
    """This host, by its number; the first one's name ends in `-0`, the others' in `-1` and so on."""

    def __init__(self, job: Job, index: int, address: str) -> None:
        asked = job.how["resources"]
        first, _, port = asked["rendezvous"].rpartition(":")
        self.names = [first.replace("-0.", f"-{number}.", 1) for number in range(asked["nodes"])]
        self._port, self._index, self._address = int(port), index, address
        self._process: subprocess.Popen[str] | None = None
        self.stopped = False

    def stop(self, *_: Any) -> None:
        """Let every host save and end: one that is told to go takes the others along."""
        self.stopped = True
        if self._process is not None:
            self._process.terminate()

    def ready(self) -> bool:
        """Whether all hosts have an address, and the first one listens."""
        try:
            found = [socket.getaddrinfo(name, self._port)[0][4][0] for name in self.names]
            if self._index == 0:
                return found[0] == self._address  # else the name still stands for the pod before this one
            socket.create_connection((self.names[0], self._port), timeout=5).close()
        except OSError:
            return False
        return True

    def train(self, store_url: str, job_key: str) -> int | None:
        """Run the job here. Returns its exit code, or None when the hosts missed or lost each other."""
        words = [sys.executable, "-m", "model", store_url, job_key]
        self._process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, errors="replace")
        assert self._process.stderr is not None
        if self.stopped:  # since it was looked at last
            self._process.terminate()
        parted = False
        for line in self._process.stderr:
            print(line, end="", file=sys.stderr, flush=True)
            parted = parted or line.startswith(LOST)
        code = self._process.wait()
        return None if parted and code == 2 else code


def main() -> int:
    """Be this host until the job is done, is stopped, or has failed. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m model.processes.pod", description="Run a job on one of several hosts."
    )
    parser.add_argument("store_url")
    parser.add_argument("job_key", help="what gpt2 train --ask prints")
    asked = parser.parse_args()
    code: int | None = None
    try:
        store = open_store(asked.store_url)
        job = read_job(store, asked.job_key)
        host = Host(job, int(os.environ.get("JOB_COMPLETION_INDEX", "0")), os.environ.get("POD_IP", ""))
        signal.signal(signal.SIGTERM, host.stop)
        print(f"waits for {', '.join(host.names)}", flush=True)
        while code is None and not host.stopped and read_result(store, job) is None:
            time.sleep(LOOK_SECONDS)
            if host.ready():
                code = host.train(asked.store_url, asked.job_key)
        done = read_result(store, job) is not None
    except (ValueError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0 if done else 2 if code == 2 else 1


if __name__ == "__main__":
    sys.exit(main())

"""One pod of a training run on several hosts (deploy/kubernetes.yaml): waits for the other pods, then trains with them.

    python -m model.processes.pod STORE_URL JOB_KEY      reads JOB_COMPLETION_INDEX and POD_IP

torchrun waits only one minute for the first host and ignores SIGTERM while it waits; a node may take hours to start.
The exit code tells the Kubernetes Job what to do: 0 the job has its result, 2 a user must fix something, 1 run again.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time

from model.processes.output import drop_failing_output, fail
from model.runs.job import USER_ERROR, read_job, read_result
from storage.errors import StorageError
from storage.stores.opening import open_store

RUN_AGAIN = 1
POLL_SECONDS = 1.0


def run(store_url: str, job_key: str, index: int, address: str) -> int:
    """Run as the pod with this index and IP address. Returns the exit code; raises ValueError or StorageError."""
    store = open_store(store_url)
    job = read_job(store, job_key)
    resources = job.how.resources
    first, _, port = resources.rendezvous.rpartition(":")  # has `-0` where the other pods' names have their index
    hosts = [first.replace("-0.", f"-{pod}.", 1) for pod in range(resources.nodes)]
    print(f"waiting for {', '.join(hosts)}", flush=True)
    while read_result(store, job) is None:
        if ready(hosts, port, index, address):
            code = train(store_url, job_key)
            if read_result(store, job) is None:  # `python -m model` also returns 0 when it was stopped
                return USER_ERROR if code == USER_ERROR else RUN_AGAIN
        else:
            time.sleep(POLL_SECONDS)
    return 0


def ready(hosts: list[str], port: str, index: int, address: str) -> bool:
    """Whether every pod has an address and, except on the first pod itself, whether the first pod listens."""
    try:
        addresses = [socket.getaddrinfo(host, port)[0][4][0] for host in hosts]
        if index == 0:
            return addresses[0] == address  # DNS may still have the address of this pod's predecessor
        socket.create_connection((hosts[0], port), timeout=5).close()
    except OSError:
        return False
    return True


def train(store_url: str, job_key: str) -> int:
    """Run the job on this host and forward a SIGTERM, so that every host saves and ends. Returns the exit code."""
    argv = [sys.executable, "-m", "model", store_url, job_key, "--parent", str(os.getpid())]
    with subprocess.Popen(argv) as process:
        signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        return process.wait()


def main() -> int:
    """Parse the arguments and run as one pod. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m model.processes.pod", description="Run a job on several hosts.")
    parser.add_argument("store_url")
    parser.add_argument("job_key", help="printed by gpt2 train --ask")
    args = parser.parse_args()
    drop_failing_output()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(RUN_AGAIN))  # as PID 1 a process has no default handler
    index, address = int(os.environ.get("JOB_COMPLETION_INDEX", "0")), os.environ.get("POD_IP", "")
    try:
        return run(args.store_url, args.job_key, index, address)
    except (ValueError, StorageError) as error:
        return fail(f"error: {error}", USER_ERROR)


if __name__ == "__main__":
    sys.exit(main())

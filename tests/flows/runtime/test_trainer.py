"""The boundary of the compose stack: a training process is another user than its flow and reads none of its secrets.

Runs deploy/entrypoint as the service `train` does: as root, which becomes the worker, which starts a process.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pydantic
import pytest

from tests.polling import poll

ROOT = Path(__file__).parents[3]
PYTHON = Path("/mnt/python") / Path(sys.executable).resolve().relative_to(sys.base_prefix)
SECRETS = {
    "PREFECT_API_AUTH_STRING": "of-prefect",
    "AWS_SECRET_ACCESS_KEY": "of-pipeline",
    "TRAINER_SECRET_ACCESS_KEY": "of-trainer",
}
# As in the image: secret files that everybody may read, in a folder that only the worker may enter. The interpreter and
# the project are mounted where other users can reach them.
CONTAINER = f"""
mount -t tmpfs tmpfs /run
install --directory --mode=$1 --owner=10001 --group=10001 /run/secrets
{"".join(f"echo {value} > /run/secrets/{name}; chmod 444 /run/secrets/{name}; " for name, value in SECRETS.items())}
mount -t tmpfs -o mode=755 tmpfs /mnt
install --directory --owner=10001 --group=10001 /mnt/work
touch /mnt/work/of-worker
mkdir /mnt/python /mnt/project /mnt/packages
mount --bind {sys.base_prefix} /mnt/python
mount --bind {ROOT} /mnt/project
mount --bind {Path(pydantic.__file__).parents[1]} /mnt/packages
exec /mnt/project/deploy/entrypoint {PYTHON} -c "$0"
"""
# What a training process could try. Everything it can read comes back as its output.
SPY = """id -u; cat /proc/$PPID/environ /proc/$1/environ /run/secrets/*; ls /mnt/work; cat /proc/self/environ
grep Cap /proc/self/status"""
ENDLESS = """
import os, signal, sys
from model.processes.parent import end_with_parent
end_with_parent(os.getppid()); print(os.getpid(), flush=True); signal.pause()
"""
WORKER = f"""
import json, os, pathlib, signal, sys
from flows.runtime.processes import TRACKERS, Processes, _as_trainer, _environment, _start

def spied():
    with _start([*_as_trainer(), "sh", "-c", {SPY!r}, "sh", str(tracker.pid)], _environment()) as process:
        return process.stdout.read().replace(chr(0), chr(10))

def endless():
    process = _start([*_as_trainer(), sys.executable, "-c", {ENDLESS!r}], _environment())
    return process, int(process.stdout.readline())

tracker = _start(["sh", "-c", "echo; exec sleep 600"], _environment(TRACKERS))
tracker.stdout.readline()
report = {{"trainer": spied(), "tracker": pathlib.Path(f"/proc/{{tracker.pid}}/environ").read_text()}}
with Processes("store") as processes:
    process, _ = endless()
    processes._started.append(process)
report["stopped_by"] = -process.returncode
_, report["orphan"] = endless()
del os.environ["TRAINER_USER"]
report["same_user"] = spied()
tracker.kill()
print(json.dumps(report), flush=True)
signal.pause()
"""


def can_mount() -> bool:
    argv = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return sys.platform == "linux" and subprocess.run(argv, check=False, capture_output=True).returncode == 0


@contextmanager
def started(mode: int) -> Iterator[subprocess.Popen[str]]:
    """The worker, in a container whose folder of secrets has this mode."""
    if not can_mount():
        pytest.skip("needs root on Linux, to change users and mount folders")
    environment = {
        "PATH": os.environ["PATH"], "HOME": "/mnt/work", "PYTHONPATH": "/mnt/project:/mnt/packages",
        "PYTHONSAFEPATH": "1", "LD_LIBRARY_PATH": "/mnt/python/lib",  # of a shared libpython
        "AWS_ENDPOINT_URL_S3": "http://s3:9000", "AWS_ACCESS_KEY_ID": "pipeline", "HF_TOKEN": "of-hub",
        "WANDB_API_KEY": "of-wandb",
        "TRAINER_USER": "nobody", "TRAINER_ACCESS_KEY_ID": "trainer",
    }  # fmt: skip
    argv = ["unshare", "--mount", "sh", "-euc", CONTAINER, WORKER, f"{mode:o}"]
    with subprocess.Popen(argv, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture(scope="module")
def worker() -> Iterator[subprocess.Popen[str]]:
    with started(0o700) as process:
        yield process


@pytest.fixture(scope="module")
def report(worker: subprocess.Popen[str]) -> dict[str, Any]:
    assert worker.stdout is not None
    result: dict[str, Any] = json.loads(worker.stdout.readline())
    return result


def test_the_trainer_can_read_no_secret_but_its_own(report: dict[str, Any]) -> None:
    lines = report["trainer"].splitlines()
    assert int(lines[0]) not in (0, 10001)
    for value in ("of-prefect", "of-pipeline", "of-hub", "of-wandb", "of-worker"):
        assert value not in report["trainer"]
        assert value in report["same_user"]  # without the boundary, the same commands find it
    assert "AWS_SECRET_ACCESS_KEY=of-trainer" in lines
    sets = ("CapInh", "CapPrm", "CapEff", "CapAmb")
    assert [int(line.split()[1], 16) for line in lines if line.startswith(sets)] == [0, 0, 0, 0]


def test_a_tracker_has_its_own_secrets_and_the_trainers_access_to_the_store(report: dict[str, Any]) -> None:
    for value in ("of-wandb", "of-hub", "AWS_SECRET_ACCESS_KEY=of-trainer", "AWS_ACCESS_KEY_ID=trainer"):
        assert value in report["tracker"]
    for value in ("of-prefect", "of-pipeline"):
        assert value not in report["tracker"]


def test_the_worker_does_not_start_when_the_trainer_could_read_the_secret_files() -> None:
    with started(0o755) as process:
        _, errors = process.communicate()
    assert process.returncode == 1
    assert "/run/secrets" in errors


def test_a_process_ends_when_its_flow_stops_it_and_when_its_flow_is_killed(
    report: dict[str, Any], worker: subprocess.Popen[str]
) -> None:
    assert report["stopped_by"] == signal.SIGTERM
    command = Path(f"/proc/{report['orphan']}/cmdline")
    assert command.read_bytes()
    worker.kill()  # as by a lack of memory
    poll(lambda: not command.exists() or not command.read_bytes())

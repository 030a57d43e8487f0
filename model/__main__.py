"""One process of a job: `python -m model <store url> <job key>`, or `torchrun -m model …` for many ranks.

Started by hand on one host or on each of several, it starts torchrun's own launcher with as many ranks as the job was
asked to have. A process that was started by another one ends when that one dies, however it dies. Exit codes: 0 done
or stopped at a checkpoint, 2 what a user can mend.
"""

import argparse
import os
import signal
import socket
import sys
import traceback
from datetime import timedelta

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.run import main as torchrun

from model.config import ResourcesConfig
from model.evaluation.jobs import evaluate
from model.processes.distributed import DDPConfig
from model.processes.parent import end_with_parent
from model.runs.job import put_result, read_job, read_result
from model.training.trainer import Trainer
from storage.errors import StorageError
from storage.stores.opening import open_store

USER_ERROR = 2


def run_job(store_url: str, job_key: str) -> int:
    """Do the job as this rank. Returns the exit code."""
    rank = os.environ.get("RANK", "0")
    try:
        store = open_store(store_url)
        job = read_job(store, job_key)
        if read_result(store, job) is not None:
            return 0
        resources = ResourcesConfig.model_validate(job.how.get("resources", {}))
        ddp = DDPConfig.detect(os.environ, resources.device)
        if ddp.is_main:
            print(f"{job.job_id}: {ddp.ranks} process{'es' * (ddp.ranks > 1)} on {ddp.device_name}", flush=True)
        with ddp.process_group(timedelta(minutes=resources.unsaved_minutes)):
            result = Trainer(store, job, ddp).fit() if job.kind == "train" else evaluate(store, job, ddp)
        if not ddp.is_main:
            return 0
        if result is None:
            print(f"{job.job_id}: stopped as asked, saved; the same command goes on from here", flush=True)
            return 0
        put_result(store, job, result)
    except (ValueError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    except torch.OutOfMemoryError as error:
        print(f"error: {_too_large(error, job.kind)}", file=sys.stderr, flush=True)
        return USER_ERROR
    except Exception as error:
        if _is_of_another_rank(error):
            why = str(error).strip().partition("\n")[0]
            print(f"rank {rank} ends, as another rank may have before it: {why}", file=sys.stderr, flush=True)
        else:
            print(f"rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return 1
    return 0


def _too_large(error: torch.OutOfMemoryError, kind: str) -> str:
    said = str(error).partition(". ")[0]
    if kind != "train":
        return (
            f"the GPU's memory does not hold the evaluation {kind}: {said}. Let fewer run at once, --set "
            f"resources.concurrent_evaluations=1, or leave the GPU out: --set resources.device=cpu"
        )
    return (
        f"the GPU's memory does not hold one forward and backward pass: {said}. Write --set "
        f"train.micro_batch_sequences=… with half of what it is: the batch stays what it is, and the run goes on."
    )


def _is_of_another_rank(error: Exception) -> bool:
    """Whether the process group broke: gloo says so in a RuntimeError of its own."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def launch(store_url: str, job_key: str, resources: ResourcesConfig, processes: int) -> int:
    """Start torchrun's launcher for this host's ranks. Returns the exit code."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(cores // processes, 1)))  # torchrun would take 1, and warn
    hosts = ["--standalone"]
    if resources.nodes > 1:
        hosts = ["--nnodes", str(resources.nodes), "--rdzv-id", job_key.rpartition("/")[2]]
        hosts += ["--rdzv-backend", "c10d", "--rdzv-endpoint", resources.rendezvous]
        here, is_first = _address(resources.rendezvous)
        hosts += ["--rdzv-conf", f"is_host={is_first}", "--local-addr", here]
    # torchrun kills ranks 30 s after it passed a SIGTERM on: a last save to a slow store may take longer
    hosts += ["--shutdown-timeout", str(round(60 * resources.unsaved_minutes) + 30)]
    words = [*hosts, "--nproc-per-node", str(processes), "-m", "model", store_url, job_key]
    try:
        torchrun([*words, "--parent", str(os.getpid())])
    except ChildFailedError as error:  # the rank has said why
        return USER_ERROR if any(found.exitcode == USER_ERROR for found in error.failures.values()) else 1
    except SignalException as error:  # passed on to the ranks, which save at SIGTERM and at no other
        return 0 if error.sigval == signal.SIGTERM else 1
    except RendezvousError as error:
        raise ValueError(
            f"resources.rendezvous = {resources.rendezvous!r}: {resources.nodes} hosts were to meet there, found "
            f"{str(error).rstrip('.')}. Start the same command on each of them within a minute, the first one first."
        ) from error
    return 0


def _address(rendezvous: str) -> tuple[str, bool]:
    """This host's address on the way to the first one, and whether it is the first one itself.

    torchrun would ask this host's name for both, which Debian, for one, lets stand for 127.0.1.1.
    """
    host, _, port = rendezvous.rpartition(":")
    try:
        first = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(first[0], socket.SOCK_DGRAM) as way:  # sends nothing
            way.connect(first[4])
            here = way.getsockname()[0]
    except (OSError, ValueError) as error:
        raise ValueError(
            f"resources.rendezvous = {rendezvous!r}: HOST:PORT of the first host was expected, found {error}. "
            f"Give an address that each host can reach: --set resources.rendezvous=HOST:29500"
        ) from error
    return str(here), here == first[4][0]


def main() -> int:
    """Parse the words, then be one rank or torchrun's launcher of many."""
    parser = argparse.ArgumentParser(prog="python -m model", description="Run one job of the store.")
    parser.add_argument("store_url", help="the store: ./data or s3://bucket/prefix")
    parser.add_argument("job_key", help="the job's key: runs/NAME/jobs/JOB.json")
    parser.add_argument("--processes", type=int, help="ranks on this host; 0: one a GPU, else 1; else as it was asked")
    parser.add_argument("--parent", type=int, help="end when this process, which must have started this one, dies")
    asked = parser.parse_args()
    if asked.parent is not None:
        # A killed launcher's ranks end at once: one that still saved, or waited, would be in the next ones' way.
        end_with_parent(asked.parent, signal.SIGKILL if "RANK" in os.environ else signal.SIGTERM)
    if "RANK" not in os.environ:
        try:
            job = read_job(open_store(asked.store_url), asked.job_key)
        except (ValueError, StorageError) as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            return USER_ERROR
        resources = ResourcesConfig.model_validate(job.how.get("resources", {}))
        if job.kind != "train":
            resources = resources.model_copy(update={"processes": resources.evaluation_processes, "nodes": 1})
        wanted = resources.processes if asked.processes is None else asked.processes
        processes = wanted or (torch.cuda.device_count() if resources.device in ("auto", "cuda") else 0) or 1
        if processes * resources.nodes > 1:
            try:
                return launch(asked.store_url, asked.job_key, resources, processes)
            except ValueError as error:
                print(f"error: {error}", file=sys.stderr, flush=True)
                return USER_ERROR
        return run_job(asked.store_url, asked.job_key)
    code = run_job(asked.store_url, asked.job_key)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a thread of gloo's may abort an orderly exit, rarely


if __name__ == "__main__":
    sys.exit(main())

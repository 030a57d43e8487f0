"""Runs one job of a store: `python -m model STORE_URL JOB_KEY`, or `torchrun -m model …` as one of many ranks.

A job of several ranks is started through torchrun's launcher; on several hosts, run the same command on each.
Exit codes: 0 done, or stopped at a checkpoint; 2 an error that a user can fix; 1 any other error.
"""

import argparse
import os
import signal
import sys
import traceback
from datetime import timedelta

import torch

from model.config import ResourcesConfig
from model.evaluation.jobs import evaluate
from model.processes.distributed import DDPConfig
from model.processes.parent import end_with_parent
from model.processes.torchrun import launch
from model.runs.job import USER_ERROR, Job, put_result, read_job, read_result
from model.training.setup import build_trainer
from storage.errors import StorageError
from storage.stores.opening import open_store


def run_job(store_url: str, job_key: str) -> int:
    """Run the job as this rank. Returns the exit code."""
    rank = os.environ.get("RANK", "0")
    try:
        store = open_store(store_url)
        job = read_job(store, job_key)
        if read_result(store, job) is not None:
            return 0
        resources = ResourcesConfig.model_validate(job.how.get("resources", {}))
        ddp = DDPConfig.detect(os.environ, resources.device)
        if ddp.is_main:
            processes = "1 process" if ddp.ranks == 1 else f"{ddp.ranks} processes"
            print(f"{job.job_id}: {processes} on {ddp.device_name}", flush=True)
        with ddp.process_group(timedelta(minutes=resources.unsaved_minutes)):
            result = build_trainer(store, job, ddp).fit() if job.kind == "train" else evaluate(store, job, ddp)
        if not ddp.is_main:
            return 0
        if result is None:
            print(f"{job.job_id}: stopped after saving a checkpoint; run the same command again to resume", flush=True)
            return 0
        put_result(store, job, result)
    except (ValueError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    except torch.OutOfMemoryError as error:
        print(f"error: {_out_of_memory(error, job.kind)}", file=sys.stderr, flush=True)
        return USER_ERROR
    except Exception as error:
        if _is_from_process_group(error):
            reason = str(error).strip().partition("\n")[0]
            print(f"rank {rank} stops, probably because another rank failed: {reason}", file=sys.stderr, flush=True)
        else:
            print(f"rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return 1
    return 0


def _out_of_memory(error: torch.OutOfMemoryError, kind: str) -> str:
    reason = str(error).partition(". ")[0]
    if kind != "train":
        return (
            f"the GPU ran out of memory in the evaluation {kind}: {reason}. Run fewer evaluations at once, --set "
            f"resources.concurrent_evaluations=1, or use the CPU: --set resources.device=cpu"
        )
    return (
        f"the GPU ran out of memory in a forward and backward pass: {reason}. Halve the micro-batch: --set "
        f"train.micro_batch_sequences=N. The batch stays the same, and the run resumes."
    )


def _is_from_process_group(error: Exception) -> bool:
    """Whether a collective failed. gloo raises a plain RuntimeError."""
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def _resources(job: Job) -> ResourcesConfig:
    resources = ResourcesConfig.model_validate(job.how.get("resources", {}))
    if job.kind == "train":
        return resources
    return resources.model_copy(update={"processes": resources.evaluation_processes, "nodes": 1})


def _rank_count(resources: ResourcesConfig) -> int:
    """How many ranks to start on this host: resources.processes, or one per GPU, or one."""
    gpus = torch.cuda.device_count() if resources.device in ("auto", "cuda") else 0
    return resources.processes or gpus or 1


def main() -> int:
    """Parse the arguments; be one rank, or start the ranks. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m model", description="Run one job of the store.")
    parser.add_argument("store_url", help="the store: ./data or s3://bucket/prefix")
    parser.add_argument("job_key", help="the job's key: runs/NAME/jobs/JOB.json")
    parser.add_argument("--processes", type=int, help="ranks on this host, 0 for one per GPU (default: the job's own)")
    parser.add_argument("--parent", type=int, help="end when this process, which started this one, dies")
    args = parser.parse_args()
    is_rank = "RANK" in os.environ
    if args.parent is not None:
        # Ranks get a SIGKILL: one that still saves or waits would collide with the ranks of the restarted job.
        end_with_parent(args.parent, signal.SIGKILL if is_rank else signal.SIGTERM)
    if is_rank:
        code = run_job(args.store_url, args.job_key)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # in rare cases a thread of gloo aborts an orderly exit
    try:
        resources = _resources(read_job(open_store(args.store_url), args.job_key))
        if args.processes is not None:
            resources = resources.model_copy(update={"processes": args.processes})
        ranks = _rank_count(resources)
        if ranks * resources.nodes > 1:
            return launch(args.store_url, args.job_key, resources, ranks)
    except (ValueError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return USER_ERROR
    return run_job(args.store_url, args.job_key)


if __name__ == "__main__":
    sys.exit(main())

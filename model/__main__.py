"""Runs one job of a store: `python -m model STORE_URL JOB_KEY`, or `torchrun -m model …` as one of many ranks.

Exit codes: 0 done, or stopped at a checkpoint; 2 an error that a user can fix; 1 any other error.
"""

import argparse
import os
import sys
import traceback
from dataclasses import asdict

import torch

from model.evaluation.jobs import evaluate
from model.processes.distributed import DDPConfig
from model.processes.output import drop_failing_output, fail
from model.processes.parent import end_with_parent
from model.processes.torchrun import launch
from model.runs.job import USER_ERROR, put_result, read_job, read_result
from model.training.trainer import Trainer
from storage.errors import StorageError
from storage.stores.opening import open_store

SMALLER_BATCH = "Try a smaller micro-batch: --set train.micro_batch_sequences=N. No batch changes; the run resumes."
FEWER_AT_ONCE = "Use the CPU (resources.device=cpu) or one evaluation at a time (resources.concurrent_evaluations=1)"


def run_job(store_url: str, job_key: str) -> int:
    """Run the job as this rank. Returns the exit code."""
    rank = os.environ.get("RANK", "0")
    try:
        store = open_store(store_url)
        job = read_job(store, job_key)
        if read_result(store, job) is not None:
            return 0
        resources = job.how.resources
        ddp = DDPConfig.detect(os.environ, resources.device)
        if ddp.is_main:
            processes = "1 process" if ddp.ranks == 1 else f"{ddp.ranks} processes"
            print(f"{job.job_id}: {processes} on {ddp.device_name}", flush=True)
        with ddp.process_group(resources.unsaved_minutes):
            result = Trainer(store, job, ddp).fit() if job.kind == "train" else evaluate(store, job, ddp)
        if ddp.is_main and result is not None:
            put_result(store, job, asdict(result))
        elif ddp.is_main:
            print(f"{job.job_id}: stopped after saving a checkpoint; run the same command again to resume", flush=True)
        return 0
    except (ValueError, StorageError) as error:
        return fail(f"error: {error}", USER_ERROR)
    except torch.OutOfMemoryError as error:
        remedy = SMALLER_BATCH if job.kind == "train" else FEWER_AT_ONCE
        cause = str(error).partition(". ")[0]  # CUDA out of memory
        return fail(f"error: {cause} in the {job.kind} job. {remedy}", USER_ERROR)
    except Exception as error:
        if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):  # gloo raises a plain RuntimeError
            reason = str(error).strip().partition("\n")[0]
            return fail(f"rank {rank} stops, probably because another rank failed: {reason}", 1)
        return fail(f"rank {rank} failed:\n{traceback.format_exc()}", 1)


def main() -> int:
    """Run the job as one rank, or start its ranks. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m model", description="Run one job of the store.")
    parser.add_argument("store_url", help="the store: ./data or s3://bucket/prefix")
    parser.add_argument("job_key", help="the job's key: runs/NAME/jobs/JOB.json")
    parser.add_argument("--processes", type=int, help="ranks on this host (0 = one per GPU; default: the job's own)")
    parser.add_argument("--parent", type=int, help="exit when the parent process with this PID dies")
    args = parser.parse_args()
    drop_failing_output()
    if args.parent is not None:
        end_with_parent(args.parent)
    if "RANK" in os.environ:
        os._exit(run_job(args.store_url, args.job_key))  # a gloo thread aborts 1 of 50 normal exits (torch 2.15)
    try:
        job = read_job(open_store(args.store_url), args.job_key)
        resources = job.how.resources
        if job.kind != "train":
            resources = resources.model_copy(update={"processes": resources.evaluation_processes, "nodes": 1})
        gpus = torch.cuda.device_count() if resources.device in ("auto", "cuda") else 0
        ranks = (resources.processes if args.processes is None else args.processes) or gpus or 1
        if ranks * resources.nodes > 1:
            return launch(args.store_url, args.job_key, resources, ranks)
        return run_job(args.store_url, args.job_key)
    except (ValueError, StorageError) as error:
        return fail(f"error: {error}", USER_ERROR)


if __name__ == "__main__":
    sys.exit(main())

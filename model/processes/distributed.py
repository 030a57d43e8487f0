"""Ranks and devices: reads torchrun's environment variables, picks the device, joins the process group."""

import platform
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class DDPConfig:
    """This process's rank, the number of ranks in the job, and this rank's device."""

    rank: int
    ranks: int
    device: torch.device
    init_method: str = "env://"

    @classmethod
    def detect(cls, environment: Mapping[str, str], device: str = "auto") -> "DDPConfig":
        """Read torchrun's variables. "auto" is CUDA, else MPS, else the CPU. Raises ValueError for a missing device."""
        rank, local_rank = (int(environment.get(name, "0")) for name in ("RANK", "LOCAL_RANK"))
        ranks = int(environment.get("WORLD_SIZE", "1"))
        init_method = environment.get("INIT_METHOD", "env://")
        available = ["cuda"] if torch.cuda.is_available() else []
        available += ["mps"] if torch.backends.mps.is_available() and ranks == 1 else []  # MPS has no collectives
        available += ["cpu"]
        device = available[0] if device == "auto" else device
        if device not in available:
            condition = " (MPS needs a single process)" if device == "mps" else ""
            problem = f"torch {torch.__version__} has no such device here{condition}, only {', '.join(available)}"
            remedy = "Use --set resources.device=auto, or check the driver with nvidia-smi."
            raise ValueError(f"resources.device = {device!r}: {problem}. {remedy}")
        if device != "cuda":
            return cls(rank, ranks, torch.device(device), init_method)
        gpus = torch.cuda.device_count()
        if local_rank >= gpus:
            problem = f"process {local_rank} of this host has no GPU: the host has {gpus}"
            remedy = f"--set resources.processes={gpus} (for evaluations: resources.evaluation_processes)"
            raise ValueError(f"{problem}. Start at most one process per GPU: {remedy}")
        torch.cuda.set_device(local_rank)
        return cls(rank, ranks, torch.device("cuda", local_rank), init_method)

    @property
    def is_main(self) -> bool:
        return self.rank == 0  # the only rank that writes and logs

    @property
    def device_name(self) -> str:
        """A GPU's product name, else the type of the device."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    @property
    def environment(self) -> dict[str, str | int]:
        """Hardware and versions, for comparing results."""
        versions = {"system": platform.platform(), "python": platform.python_version(), "torch": str(torch.__version__)}
        return {"device": self.device_name, "ranks": self.ranks, **versions}

    def memory_bytes(self) -> int:
        """Peak memory of this process: on its GPU if it has one, otherwise on the host."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB

    @contextmanager
    def process_group(self, last_save_minutes: float) -> Iterator[None]:
        """Join the group of all ranks, if there are several, while the block lasts. If a rank dies, the others fail."""
        if self.ranks == 1:
            yield
            return
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        timeout = timedelta(minutes=last_save_minutes + 10)  # the main rank may be storing the last checkpoint
        dist.init_process_group(backend, self.init_method, timeout, self.ranks, self.rank)
        yield
        dist.barrier()  # no rank leaves while the main rank still writes
        # Not in a `finally`: after an error NCCL would wait here for ranks that wait for this rank.
        dist.destroy_process_group()

    def agree(self, value: int) -> bool:
        """Whether all ranks have the same value, which must be below 2 ** 63."""
        bounds = torch.tensor([value, -value], device=self.device)  # int64, which MPS has, unlike float64
        if self.ranks > 1:
            dist.all_reduce(bounds, dist.ReduceOp.MAX)
        return bounds.sum().item() == 0

    def sum(self, values: Tensor) -> Tensor:
        if self.ranks > 1:
            dist.all_reduce(values)
        return values

"""Ranks and devices: what torchrun says of this process, and the process group. Computes nothing.

RANK, WORLD_SIZE, LOCAL_RANK (torchrun)  →  DDPConfig  →  device, backend, process group
"""

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
    """This process among all processes of the job, and the device it computes on."""

    rank: int
    ranks: int
    device: torch.device

    @classmethod
    def detect(cls, environment: Mapping[str, str], device: str = "auto") -> "DDPConfig":
        """Read torchrun's variables and take the device that is asked for, or the best there is.

        That is CUDA, else MPS (one process only), else the CPU. Raises ValueError when a device is asked for that is
        not there, or more processes were started than there are GPUs.
        """
        rank = int(environment.get("RANK", "0"))
        ranks = int(environment.get("WORLD_SIZE", "1"))
        local_rank = int(environment.get("LOCAL_RANK", "0"))
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available() and ranks == 1}
        if device == "auto":
            device = next((name for name, is_there in there.items() if is_there), "cpu")
        if not there.get(device, True):
            alone = " (in a training of one process)" if device == "mps" else ""
            found = [name for name, is_there in there.items() if is_there]
            raise ValueError(
                f"resources.device = {device!r}: torch {torch.__version__} finds no such device here{alone}, found "
                f"{', '.join([*found, 'cpu'])}. Write --set resources.device=auto, or mend the driver: gpt2 doctor"
            )
        if device != "cuda":
            return cls(rank, ranks, torch.device(device))
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {local_rank} of this host was started, found {torch.cuda.device_count()} GPUs. "
                f"Start at most one a GPU: --set resources.processes={torch.cuda.device_count()} (of an evaluation: "
                f"resources.evaluation_processes)"
            )
        torch.cuda.set_device(local_rank)
        return cls(rank, ranks, torch.device("cuda", local_rank))

    @property
    def is_main(self) -> bool:
        """Whether this is the one rank that writes and logs."""
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """The device in words: a GPU's own name, else its kind."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    @property
    def environment(self) -> dict[str, str | int]:
        """What computes here, for people who compare numbers."""
        versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
        return {"device": self.device_name, "ranks": self.ranks, "system": platform.platform(), **versions}

    def memory_bytes(self) -> int:
        """The most memory that this process has used: of its GPU, else of its host."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self.device))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB

    @contextmanager
    def process_group(self, patience: timedelta) -> Iterator[None]:
        """The group of all ranks, for as long as the block lasts; none is needed for one rank.

        The ranks wait for each other as long as `patience`, and ten minutes more: the main rank may be storing the
        last checkpoint. One that dies is noticed at once.
        """
        if self.ranks == 1:
            yield
            return
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=patience + timedelta(minutes=10))
        yield
        dist.barrier()  # nobody leaves while the main rank still writes
        # After an error the process just ends: with NCCL this would wait for ranks that wait for this one.
        dist.destroy_process_group()

    def agree(self, value: int) -> bool:
        """Whether all ranks have the same value, of less than 2 ** 53."""
        bounds = torch.tensor([value, -value], dtype=torch.float64, device=self.device)
        if self.ranks > 1:
            dist.all_reduce(bounds, dist.ReduceOp.MAX)
        return bounds.sum().item() == 0

    def sum(self, values: Tensor) -> Tensor:
        """The tensor summed over all ranks, in place."""
        if self.ranks > 1:
            dist.all_reduce(values)
        return values

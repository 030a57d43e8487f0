"""Ranks and devices: what torchrun says of this process, and the process group. Computes nothing.

RANK, WORLD_SIZE, LOCAL_RANK (torchrun)  →  DDPConfig  →  device, backend, process group
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

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
    def detect(cls, environment: Mapping[str, str]) -> "DDPConfig":
        """Read torchrun's variables and take the best device there is: CUDA, MPS (one process only), else the CPU.

        Raises ValueError when more processes were started than there are GPUs.
        """
        rank = int(environment.get("RANK", "0"))
        ranks = int(environment.get("WORLD_SIZE", "1"))
        local_rank = int(environment.get("LOCAL_RANK", "0"))
        if torch.cuda.is_available():
            found = torch.cuda.device_count()
            if local_rank >= found:
                raise ValueError(
                    f"process {local_rank} of this host was started, found {found} GPUs. "
                    f"Start at most one a GPU: --set resources.processes={found}"
                )
            torch.cuda.set_device(local_rank)
            return cls(rank, ranks, torch.device("cuda", local_rank))
        if torch.backends.mps.is_available() and ranks == 1:
            return cls(rank, ranks, torch.device("mps"))
        return cls(rank, ranks, torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this is the one rank that writes and logs."""
        return self.rank == 0

    @contextmanager
    def process_group(self) -> Iterator[None]:
        """The group of all ranks, for as long as the block lasts; none is needed for one rank."""
        if self.ranks == 1:
            yield
            return
        dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        try:
            yield
            dist.barrier()  # nobody leaves while the main rank still writes
        finally:
            dist.destroy_process_group()

    def sum(self, values: Tensor) -> Tensor:
        """The tensor summed over all ranks, in place."""
        if self.ranks > 1:
            dist.all_reduce(values)
        return values

"""Starts torchrun's launcher with this host's ranks, on one host or on each of several."""

import os
import signal
import socket
import sys
from tempfile import TemporaryDirectory

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.run import main as torchrun

from model.config import ResourcesConfig
from model.processes.output import fail
from model.processes.parent import stop_signals
from model.runs.job import USER_ERROR

SHUTDOWN_SECONDS = 30  # torchrun's own default, on top of the time for a last checkpoint


def launch(store_url: str, job_key: str, resources: ResourcesConfig, ranks: int) -> int:
    """Run the job on `ranks` processes of this host. Returns the exit code."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(cores // ranks, 1)))  # torchrun's default is 1, with a warning
    # After this time torchrun kills ranks that got a SIGTERM; a last checkpoint may take all of unsaved_minutes.
    shutdown_seconds = round(60 * resources.unsaved_minutes) + SHUTDOWN_SECONDS
    argv = ["--shutdown-timeout", str(shutdown_seconds), "--nproc-per-node", str(ranks)]
    argv += ["--signals-to-handle", ",".join(signum.name for signum in stop_signals())]
    argv += ["-m", "model", store_url, job_key, "--parent", str(os.getpid())]
    hosts = ["--rdzv-backend", "c10d", "--rdzv-id", job_key.rpartition("/")[2]]
    try:
        with TemporaryDirectory() as folder:  # which other users cannot enter
            if resources.nodes > 1:
                address, is_first = local_address(resources.rendezvous)
                hosts += ["--nnodes", str(resources.nodes), "--rdzv-endpoint", resources.rendezvous]
                hosts += ["--rdzv-conf", f"is_host={is_first}", "--local-addr", address]
            else:  # files: torchrun's ports are open to every network and unpickle what anyone sends them
                hosts += ["--rdzv-conf", "store_type=file", "--rdzv-endpoint", f"{folder}/launcher"]
                os.environ |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "INIT_METHOD": f"file://{folder}/ranks"}
                os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
            torchrun([*hosts, *argv])
    except ChildFailedError as error:  # the rank has printed its own error, unless a signal killed it
        for rank, failure in sorted(error.failures.items()):
            if failure.exitcode < 0:
                hint = ", often out of memory" if failure.exitcode == -signal.SIGKILL else ""
                print(f"error: rank {rank} was killed, signal {-failure.exitcode}{hint}", file=sys.stderr, flush=True)
        return USER_ERROR if any(failure.exitcode == USER_ERROR for failure in error.failures.values()) else 1
    except SignalException:  # torchrun has forwarded the signal, and the ranks have saved a checkpoint
        return 0
    except RendezvousError as error:
        problem = f"the {resources.nodes} hosts did not connect, or their connection was lost: {str(error).rstrip('.')}"
        remedy = "Give an address of the first host that the other hosts can reach. "
        remedy += "Start the same command on all hosts within a minute, beginning with the first host."
        return fail(f"error: resources.rendezvous = {resources.rendezvous!r}: {problem}. {remedy}", 1)
    return 0


def local_address(rendezvous: str) -> tuple[str, bool]:
    """This host's address on the network of the first host, and whether it is the first. Raises RendezvousError."""
    # torchrun would resolve this host's own name instead, which is 127.0.1.1 on Debian.
    host, _, port = rendezvous.rpartition(":")
    try:
        family, _, _, _, first = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:  # connecting a UDP socket sends nothing
            probe.connect(first)
            address = str(probe.getsockname()[0])
    except OSError as error:
        raise RendezvousError(str(error)) from error
    return address, address == first[0]

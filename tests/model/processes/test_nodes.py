"""Two hosts train one run. Each is a network namespace that runs the same command.

Needs root and iproute2, as `make test-full` does.
"""

import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousTimeoutError

from model.config import ResourcesConfig
from model.processes import torchrun
from model.processes.torchrun import launch, local_address
from tests.model.training_runs import STEPS, StoredDataset, assert_equal_runs, checkpoints, kill_all, processes_of
from tests.polling import poll

ADDRESSES = ("10.97.31.1", "10.97.31.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces, each with a loopback and one end of a veth pair."""
    names = [f"gpt2-{secrets.token_hex(3)}" for _ in ADDRESSES]
    ends = [f"v{name[5:]}" for name in names]
    for name in names:
        ip("netns", "add", name)
    try:
        ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(names, ends, ADDRESSES, strict=True):
            ip("link", "set", end, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "name", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            ip("netns", "del", name)


def kill_host(host: str) -> None:
    """SIGKILL to every process on the host."""
    for pid in subprocess.check_output(["ip", "netns", "pids", host], text=True).split():
        os.kill(int(pid), signal.SIGKILL)


def start(host: str, dataset: StoredDataset, key: str, folder: Path) -> subprocess.Popen[bytes]:
    """Run the command that `gpt2 train` prints, on that host."""
    argv = ["ip", "netns", "exec", host, sys.executable, "-m", "model", dataset.store.url, key]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "cable", "OMP_NUM_THREADS": "1"}  # like two ranks on one host
    with (folder / host).open("wb") as out:
        return subprocess.Popen(argv, stdout=out, stderr=out, env=environment, start_new_session=True)


@pytest.mark.full
def test_two_hosts_train_like_two_processes_of_one_host_and_resume_after_one_dies(
    dataset: StoredDataset, undisturbed: Callable[[int], str], hosts: list[str], tmp_path: Path
) -> None:
    settings = ("resources.nodes=2", "resources.processes=1", f"resources.rendezvous={ADDRESSES[0]}:29500")
    key = dataset.put_job("two-hosts", *settings)

    def output(host: str) -> str:
        return (tmp_path / host).read_text()

    try:
        first, second = (start(host, dataset, key, tmp_path) for host in hosts)
        poll(lambda: any("step      6/" in output(host) for host in hosts), failure="no step was run")
        kill_host(hosts[1])
        second.wait()
        poll(lambda: first.poll() is not None, failure="the other host is still running")
        assert first.returncode == 1, output(hosts[0])
        assert "Traceback" not in output(hosts[0])
        poll(lambda: not processes_of(dataset.store, key), failure="a rank outlives its host's launcher")
        assert checkpoints(dataset.store, "two-hosts")[-1].step >= 4
        restarted = [start(host, dataset, key, tmp_path) for host in hosts]
        assert [process.wait() for process in restarted] == [0, 0], [output(host) for host in hosts]
    finally:
        kill_all(dataset.store, key)
    assert "2 processes on cpu" in output(hosts[0]) + output(hosts[1])
    assert checkpoints(dataset.store, "two-hosts")[-1].step == STEPS
    assert_equal_runs(dataset.store, "two-hosts", undisturbed(2))


def test_the_first_host_is_the_one_with_the_rendezvous_address() -> None:
    assert local_address("127.0.0.1:29500") == ("127.0.0.1", True)
    assert local_address("localhost:29500")[1]


@pytest.mark.parametrize("is_ignored", [False, True])
def test_a_launcher_forwards_the_signals_that_make_ranks_save_and_succeeds(
    monkeypatch: pytest.MonkeyPatch, is_ignored: bool
) -> None:
    """SIGHUP is ignored under nohup; torchrun would replace that with a handler of its own."""

    def stopped(argv: list[str]) -> None:
        forwarded = {signal.Signals[name] for name in argv[argv.index("--signals-to-handle") + 1].split(",")}
        assert forwarded == {signal.SIGTERM, signal.SIGINT} | (set() if is_ignored else {signal.SIGHUP})
        raise SignalException("stopped", signal.SIGTERM)

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torchrun, "torchrun", stopped)
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    try:
        assert launch("./store", "runs/tiny/jobs/train.json", ResourcesConfig(), 2) == 0
    finally:
        signal.signal(signal.SIGHUP, handler)


def test_a_rank_that_was_killed_is_named_with_the_likely_cause(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def out_of_memory(_: list[str]) -> None:
        raise ChildFailedError("model", {1: ProcessFailure(1, 77, -signal.SIGKILL, "")})

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torchrun, "torchrun", out_of_memory)
    assert launch("./store", "runs/tiny/jobs/train.json", ResourcesConfig(), 2) == 1
    assert re.search("^error: rank 1 was killed, signal 9, often out of memory$", capsys.readouterr().err, re.MULTILINE)


def test_hosts_that_do_not_meet_fail_with_a_remedy_and_can_be_restarted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def alone(argv: list[str]) -> None:
        assert "127.0.0.1:29500" in argv
        raise RendezvousTimeoutError("nobody came")

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torchrun, "torchrun", alone)
    for rendezvous, reason in (("127.0.0.1:29500", "nobody came"), ("no.such.host.invalid:29500", "Errno")):
        resources = ResourcesConfig(nodes=2, rendezvous=rendezvous)
        assert launch("./store", "runs/tiny/jobs/train.json", resources, 1) == 1
        error = capsys.readouterr().err
        for fact in ("error: resources.rendezvous", rendezvous, "2 hosts", reason, "beginning with the first host"):
            assert fact in error

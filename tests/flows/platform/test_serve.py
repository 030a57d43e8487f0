"""`gpt2 serve`: one process tree, on this host only, that Ctrl-C stops; and a server with a password."""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from flows.platform import server
from storage.keys import RunKeys
from storage.stores.opening import open_store
from storage.stores.store import read_json
from tests.flows.client import gpt2, run_gpt2
from tests.flows.deployments import ended, run, set_state, start
from tests.making import document, tiny_config, write_parquet
from tests.polling import poll
from tests.ports import free_port
from tests.processes import family

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]


@contextmanager
def serving(folder: Path, port: int, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`gpt2 serve` in a folder, once it has printed the address of its UI."""
    process = gpt2("serve", "--port", str(port), *arguments, cwd=folder)
    assert process.stdout is not None
    try:
        assert f"http://127.0.0.1:{port}" in process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def listening(pids: list[int]) -> set[str]:
    """The addresses on which these processes listen."""
    inodes = set()
    for pid in pids:
        for handle in Path(f"/proc/{pid}/fd").iterdir():
            try:
                inodes.add(str(handle.readlink()).removeprefix("socket:[").removesuffix("]"))
            except OSError:
                continue
    addresses = set()
    for table, kind in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            local, state, inode = line.split()[1], line.split()[3], line.split()[9]
            if state == "0A" and inode in inodes:  # LISTEN
                packed = bytes.fromhex(local.partition(":")[0])
                words = [packed[start : start + 4][::-1] for start in range(0, len(packed), 4)]
                addresses.add(socket.inet_ntop(kind, b"".join(words)))
    return addresses


def test_a_click_runs_ctrl_c_stops_all_and_a_retry_after_the_next_start_resumes(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "source" / "file.parquet", [document(number, 90) for number in range(80)])
    config = tiny_config(
        str(tmp_path / "data"), str(source), "train.max_steps=600", "train.validate_every_steps=0",
        "train.checkpoint_every_steps=1000", "resources.processes=2",
    )  # fmt: skip
    port = free_port()
    api = f"http://127.0.0.1:{port}/api"
    store = open_store(config.store_url, create=True)

    def steps() -> int:
        return int((read_json(store, RunKeys("tiny").progress) or {"step": 0})["step"])

    with serving(tmp_path, port) as process:
        tree = family(process.pid)
        assert len(tree) >= 4  # gpt2, server, two workers
        assert listening(tree) == {"127.0.0.1"}
        flow_run = start(api, "pretrain", config)
        poll(lambda: steps() > 20, 120)
        tree = family(process.pid)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 0, output
        assert "cancelling active runs" in output
        assert [pid for pid in tree if Path(f"/proc/{pid}").exists()] == []
    saved = steps()
    assert saved < 600
    with serving(tmp_path, port) as process:
        assert run(api, flow_run)["state_name"] == "Cancelled"
        set_state(api, flow_run, "SCHEDULED", "AwaitingRetry")
        assert ended(api, flow_run, 2)["state_name"] == "Completed"
        assert steps() == 600
        tree = family(process.pid)
        process.kill()  # the other processes notice by themselves
        process.wait()
        poll(lambda: [pid for pid in tree if Path(f"/proc/{pid}").exists()] == [], 30)


@pytest.mark.parametrize("name", ["server", pytest.param("worker-train", marks=pytest.mark.nightly)])
def test_a_process_that_ends_unexpectedly_stops_all_with_a_remedy(tmp_path: Path, name: str) -> None:
    argument = name.removeprefix("worker-")
    with serving(tmp_path, free_port()) as process:
        tree = family(process.pid)
        argv = {pid: Path(f"/proc/{pid}/cmdline").read_text().split("\0") for pid in tree}
        os.kill(next(pid for pid in tree if argument in argv[pid]), signal.SIGKILL)
        output, _ = process.communicate(timeout=60)
        assert [pid for pid in tree if Path(f"/proc/{pid}").exists()] == []
    assert process.returncode == 2
    assert f"{name} ended unexpectedly" in output
    assert f"{name}.log" in output
    assert "Traceback" not in output


@pytest.fixture
def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server with a password."""
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "gpt2:secret")
    monkeypatch.setattr(server, "HOME", tmp_path / ".gpt2")
    port = free_port()
    with server.running_server(port):
        yield f"http://127.0.0.1:{port}/api"


def test_with_a_password_no_call_works_without_it(
    guarded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = {"flow_runs/filter": "POST", "deployments/filter": "POST", "admin/version": "GET", "logs/filter": "POST"}
    expected = [(None, 401), (("gpt2", "other"), 401), (("gpt2", "secret"), 200)]
    for path, method in methods.items():
        for auth, status in expected:
            response = httpx.request(method, f"{guarded}/{path}", json={}, auth=auth, timeout=60)
            assert response.status_code == status, (path, auth)
    code, output = run_gpt2("bootstrap", cwd=tmp_path, api=guarded)
    assert (code, "401" in output, "PREFECT_API_AUTH_STRING" in output) == (2, True, True), output
    code, output = run_gpt2("bootstrap", cwd=tmp_path, api=guarded, password="gpt2:secret")  # noqa: S106
    assert code == 0, output

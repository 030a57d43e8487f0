"""`gpt2 serve`: a platform in one process tree, on this host alone, that Ctrl-C ends; a server with a password."""

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
from tests.flows.client import gpt2, poll, run_gpt2
from tests.flows.deployments import ended, run, set_state, start
from tests.making import document, tiny_config, write_parquet
from tests.processes import family
from tests.servers import free_port

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]


@contextmanager
def serving(folder: Path, port: int, *words: str) -> Iterator[subprocess.Popen[str]]:
    """`gpt2 serve` in a folder, once it has said where its UI is."""
    process = gpt2("serve", "--port", str(port), *words, cwd=folder)
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
    found = set()
    for table, kind in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            place, state, inode = line.split()[1], line.split()[3], line.split()[9]
            if state == "0A" and inode in inodes:
                packed = bytes.fromhex(place.partition(":")[0])
                words = [packed[start : start + 4][::-1] for start in range(0, len(packed), 4)]
                found.add(socket.inet_ntop(kind, b"".join(words)))
    return found


def test_a_click_runs_ctrl_c_ends_all_and_the_next_start_goes_on(tmp_path: Path) -> None:
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
        found = family(process.pid)
        assert len(found) >= 4  # server, two workers
        assert listening(found) == {"127.0.0.1"}
        flow_run = start(api, "pretrain", config)
        poll(lambda: steps() > 20, 120)
        found = family(process.pid)
        process.send_signal(signal.SIGINT)
        said, _ = process.communicate(timeout=60)
        assert process.returncode == 0, said
        assert "cancelled" in said
        assert [pid for pid in found if Path(f"/proc/{pid}").exists()] == []
    saved = steps()
    assert saved < 600
    with serving(tmp_path, port) as process:
        assert run(api, flow_run)["state_name"] == "Cancelled"
        set_state(api, flow_run, "SCHEDULED", "AwaitingRetry")
        assert ended(api, flow_run, 2)["state_name"] == "Completed"
        assert steps() == 600
        found = family(process.pid)
        process.kill()  # nothing can be said any more: the others notice
        process.wait()
        poll(lambda: [pid for pid in found if Path(f"/proc/{pid}").exists()] == [], 30)


@pytest.mark.parametrize("name", ["worker-train", "server"])
def test_what_ends_before_it_should_ends_all_with_a_remedy(tmp_path: Path, name: str) -> None:
    word = {"worker-train": "flows.platform.worker", "server": "flows.platform.server"}[name]
    with serving(tmp_path, free_port()) as process:
        found = family(process.pid)
        words = {pid: Path(f"/proc/{pid}/cmdline").read_text().split("\0") for pid in found}
        os.kill(next(pid for pid in found if word in words[pid] and "data" not in words[pid]), signal.SIGKILL)
        said, _ = process.communicate(timeout=60)
        assert [pid for pid in found if Path(f"/proc/{pid}").exists()] == []
    assert process.returncode == 2
    assert f"{name} was to run until Ctrl-C" in said
    assert f"{name}.log" in said
    assert "Traceback" not in said


@pytest.fixture
def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a server that asks for a password."""
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "gpt2:secret")
    monkeypatch.setattr(server, "HOME", tmp_path / ".gpt2")
    port = free_port()
    with server.running_server(port):
        yield f"http://127.0.0.1:{port}/api"


def test_with_a_password_no_call_works_without_it(
    guarded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"flow_runs/filter": "POST", "deployments/filter": "POST", "admin/version": "GET", "logs/filter": "POST"}
    for path, method in asked.items():
        assert httpx.request(method, f"{guarded}/{path}", json={}).status_code == 401, path
        assert httpx.request(method, f"{guarded}/{path}", json={}, auth=("gpt2", "other")).status_code == 401, path
        assert httpx.request(method, f"{guarded}/{path}", json={}, auth=("gpt2", "secret")).status_code == 200, path
    code, said = run_gpt2("bootstrap", cwd=tmp_path, api=guarded)
    assert (code, "401" in said, "PREFECT_API_AUTH_STRING" in said) == (2, True, True), said
    code, said = run_gpt2("bootstrap", cwd=tmp_path, api=guarded, password="gpt2:secret")  # noqa: S106
    assert code == 0, said

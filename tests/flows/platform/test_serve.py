"""`gpt2 serve`: one process tree, on this host only, that Ctrl-C stops; closed to others."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from storage.keys import RunKeys
from storage.stores.opening import open_store
from tests.browser import browser
from tests.flows.client import call_api, gpt2
from tests.flows.deployments import ended, run, set_state, start
from tests.making import document, read_json, tiny_config, write_parquet
from tests.polling import poll
from tests.ports import free_port
from tests.processes import family, listening

pytestmark = pytest.mark.full


@contextmanager
def serving(folder: Path, port: int, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """`gpt2 serve` in a folder, once it has printed the address of its UI."""
    process = gpt2("serve", "--port", str(port), *arguments, cwd=folder)
    assert process.stdout is not None
    try:
        assert any(f"http://127.0.0.1:{port}" in line for line in process.stdout)  # a slow start says so first
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def login(folder: Path) -> str:
    return (folder / ".gpt2" / "login").read_text()


def test_a_click_runs_ctrl_c_stops_all_and_a_retry_after_the_next_start_resumes(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "source" / "file.parquet", [document(number, 90) for number in range(80)])
    config = tiny_config(
        str(tmp_path / "data"), str(source), "train.max_steps=200", "train.validate_every_steps=0",
        "train.checkpoint_every_steps=1000", "resources.processes=2",
    )  # fmt: skip
    port = free_port()
    store = open_store(config.store_url, create=True)

    def steps() -> int:
        return int((read_json(store, RunKeys("tiny").progress) or {"step": 0})["step"])

    with serving(tmp_path, port) as process:
        tree = family(process.pid)
        assert len(tree) >= 4  # gpt2, server, two workers
        assert listening(tree) == {("127.0.0.1", port)}
        api = f"http://{login(tmp_path)}@127.0.0.1:{port}/api"
        flow_run = start(api, "pretrain", config)
        reached = poll(steps)
        tree = family(process.pid)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate()
        assert process.returncode == 0, output
        assert "cancelling active runs" in output
        assert [pid for pid in tree if Path(f"/proc/{pid}").exists()] == []
    assert reached <= steps() < 200
    with serving(tmp_path, port) as process:
        assert run(api, flow_run)["state_name"] == "Cancelled"
        set_state(api, flow_run, "SCHEDULED", "AwaitingRetry")
        assert ended(api, flow_run, 2)["state_name"] == "Completed"
        assert steps() == 200
        tree = family(process.pid)
        process.kill()  # the other processes notice by themselves
        process.wait()
        poll(lambda: [pid for pid in tree if Path(f"/proc/{pid}").exists()] == [])
    password = login(tmp_path).partition(":")[2].encode()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.name for path in files if password in path.read_bytes()] == ["login"]


@pytest.mark.parametrize(
    ("name", "argument"),
    [("server", "flows.platform.app"), pytest.param("worker-train", "train", marks=pytest.mark.nightly)],
)
def test_a_process_that_ends_unexpectedly_stops_all_with_a_remedy(tmp_path: Path, name: str, argument: str) -> None:
    with serving(tmp_path, free_port()) as process:
        tree = family(process.pid)
        argv = {pid: Path(f"/proc/{pid}/cmdline").read_text().split("\0") for pid in tree}
        os.kill(next(pid for pid in tree if argument in argv[pid]), signal.SIGKILL)
        output, _ = process.communicate()
        assert [pid for pid in tree if Path(f"/proc/{pid}").exists()] == []
    assert process.returncode == 2
    assert f"{name} ended unexpectedly" in output
    assert f"{name}.log" in output
    assert "Traceback" not in output


HANGUP = """
import os, signal, sys, threading
from flows.platform import serve
signal.signal(signal.SIGHUP, getattr(signal, sys.argv[1]))
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGHUP)).start()
threading.Timer(3.0, os._exit, (7,)).start()
serve.wait_for_end({})
os._exit(0)
"""


@pytest.mark.parametrize(("action", "code"), [("SIG_DFL", 0), ("SIG_IGN", 7)], ids=["terminal closes", "nohup"])
def test_a_closed_terminal_stops_all_like_ctrl_c(action: str, code: int) -> None:
    """Else the runs' processes go on, and repeat their requests to a server that has ended."""
    argv = [sys.executable, "-c", HANGUP, action]
    assert subprocess.run(argv, check=False).returncode == code


HOSTILE_PAGE = """<script>
const attempts = {
  read: () => fetch(API + "/flows/filter", {method: "POST", headers: {"Content-Type": "application/json"}, body: "{}"}),
  write: () => fetch(API + "/variables/", {method: "POST", headers: {"Content-Type": "application/json"}, body: BODY}),
  write_without_preflight: () => fetch(API + "/variables/", {method: "POST", body: BODY}),
  settings: () => fetch(API + "/../ui-settings"),
  health: () => fetch(API + "/health"),
  listen: () => new Promise((open, fail) => {
    const socket = new WebSocket(API.replace("http", "ws") + "/events/out", "prefect")
    socket.onopen = open, socket.onclose = fail
  }),
}
async function succeeded() {
  const names = []
  for (const [name, attempt] of Object.entries(attempts)) await attempt().then(() => names.push(name), () => {})
  return names
}
</script>"""


class HostileSite(BaseHTTPRequestHandler):
    page = ""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(self.page.encode())

    def log_message(self, *_: object) -> None:
        pass


def test_a_browser_shows_the_ui_after_the_login_and_a_hostile_page_gets_nothing(tmp_path: Path) -> None:
    port = free_port()
    api = f"http://127.0.0.1:{port}/api"
    body = json.dumps({"name": "hostile", "value": "written"})
    HostileSite.page = f"<script>const API = {api!r}, BODY = {body!r}</script>{HOSTILE_PAGE}"
    everywhere = "--host-resolver-rules=MAP *.example 127.0.0.1"
    with (
        serving(tmp_path, port),
        ThreadingHTTPServer(("127.0.0.1", 0), HostileSite) as site,
        browser(tmp_path / "profile", everywhere) as page,
    ):
        threading.Thread(target=site.serve_forever, daemon=True).start()
        for host in ("evil.example", "127.0.0.1"):  # of another site, and of another port of this host
            page.visit(f"http://{host}:{site.server_port}/")
            assert page.run("succeeded()") == []
        site.shutdown()
        page.visit(f"http://evil.example:{port}/")  # DNS rebinding
        assert "answers only" in page.text()
        for host in ("127.0.0.1", "localhost"):
            page.visit(f"http://{host}:{port}/deployments")
            page.type("input[type=password]", login(tmp_path))
            poll(lambda: "dataset-refresh" in page.text())
        page.screenshot(tmp_path / "deployments.png")
        assert call_api(f"http://{login(tmp_path)}@127.0.0.1:{port}/api", "/variables/filter", {}) == []

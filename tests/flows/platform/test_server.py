"""A folder has one Prefect server with one login, shared by all commands; a server that cannot start says why."""

import json
import os
import re
import socket
import stat
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prefect.client import orchestration

from flows.console import options
from flows.platform import server
from tests.polling import poll
from tests.ports import free_port
from tests.processes import kill, parent, with_arguments

COMMAND = "from flows.platform import server\nwith server.prefect_server() as url:\n    print(url, flush=True); input()"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(server, "HOME", tmp_path / ".gpt2")
    return tmp_path / ".gpt2"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_login_is_random_lasting_and_its_owner_s(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.mkdir(mode=0o755)  # like every version before this one
    with ThreadPoolExecutor(8) as pool:
        [login] = set(pool.map(lambda _: server.login(), range(8)))
    assert re.fullmatch(r"\w+:\w{32}", login)
    assert [path.name for path in home.iterdir()] == ["login"]
    for _ in range(2):
        assert (mode(home), mode(home / "login")) == (0o700, 0o600)
        home.chmod(0o755)
        (home / "login").chmod(0o644)
        assert server.login() == login
    monkeypatch.setattr(server, "HOME", home / "another")
    assert server.login() != login


@pytest.mark.parametrize("text", [b"", b"\n", b":", b"gpt2:", b"gpt2:a\nb", "gpt2:ä".encode(), b"gpt2:\xff"])
def test_a_file_without_a_usable_login_is_refused(home: Path, text: bytes) -> None:
    server.login()
    (home / "login").write_bytes(text)
    with pytest.raises(ValueError, match="USER:PASSWORD"):
        server.login()


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder"])
def test_only_a_regular_file_is_a_login(home: Path, kind: str) -> None:
    home.mkdir()
    if kind == "folder":
        (home / "login").mkdir()
    else:
        (home / "login").symlink_to("../public")
    if kind == "link":
        (home.parent / "public").write_text("gpt2:public")
        (home.parent / "public").chmod(0o644)
    with pytest.raises(ValueError, match="USER:PASSWORD"):
        server.login()
    assert kind != "link" or mode(home.parent / "public") == 0o644


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes a file of another user")
@pytest.mark.parametrize("name", [".gpt2", ".gpt2/login", ".gpt2/prefect"])
@pytest.mark.parametrize("linked", [False, True], ids=["itself", "a link"])
def test_what_another_user_put_there_is_refused(home: Path, name: str, linked: bool) -> None:
    """They may have written it while the folder was open to them, or move the link later."""
    server.login()
    (home / "prefect").mkdir()
    place = home.parent / name
    if linked:
        place.rename(home.parent / "elsewhere")
        place.symlink_to(home.parent / "elsewhere")
    os.chown(place, 65534, 65534, follow_symlinks=False)
    with pytest.raises(ValueError, match=f"{name}.*another user.*Delete"):
        server.login()


def test_a_login_that_others_could_know_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.login()
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: home.stat().st_uid + 1)
        with pytest.raises(ValueError, match="belongs to"):
            server.login()


@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY"])
@pytest.mark.parametrize(("given", "set_to"), [("", "127.0.0.1,"), ("a.b", "127.0.0.1,a.b"), ("*", "*")])
def test_no_proxy_gets_the_login(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, given: str, set_to: str
) -> None:
    for other in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, given)
    for _ in range(2):  # of a command, then of a command that it starts
        for variable, value in (os.environ | server.prefect_environment(1)).items():
            monkeypatch.setenv(variable, value)
        assert os.environ[name] == set_to
    if given != "*":
        assert urllib.request.getproxies_environment()["no"] == set_to


def test_a_full_disk_is_named_when_the_server_does_not_start(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "start", lambda *_, **how: subprocess.Popen(["true"], start_new_session=True, **how))
    monkeypatch.setattr(server, "FREE_BYTES", 1 << 62)
    with pytest.raises(ValueError, match=rf"disk of {home} is full"), server.running_server():
        pass


@pytest.mark.parametrize("url", ["{api}/", "http://localhost:{port}/api"])
def test_the_login_of_this_folder_s_server_is_read_for_each_of_its_addresses(
    api: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_AUTH_STRING")
    monkeypatch.setenv("PREFECT_API_URL", url.format(api=api, port=server.running_port()))
    with server.prefect_server():
        assert os.environ["PREFECT_API_AUTH_STRING"] == server.login()


def test_an_invalid_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_client(**_: Any) -> None:
        raise httpx.InvalidURL("non-printable character")

    monkeypatch.setattr(orchestration, "get_client", get_client)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/\x1b")
    with pytest.raises(ValueError, match="PREFECT_API_URL"), server.prefect_server():
        pass


def test_a_log_is_its_owner_s(home: Path) -> None:
    server.login()
    server.log_path("old").touch(mode=0o644)
    for name in ("old", "new"):
        assert server.start(name, 1, "this").wait() == 0
        assert mode(server.log_path(name)) == 0o600


@pytest.mark.parametrize(("port", "reason"), [(65535, "in use"), (80, "denied")])
def test_an_unusable_port_is_refused_with_a_usable_one(
    home: Path, monkeypatch: pytest.MonkeyPatch, port: int, reason: str
) -> None:
    create = socket.create_server

    def as_a_plain_user(address: tuple[str, int], **how: Any) -> socket.socket:
        if 0 < address[1] < 1024:
            raise PermissionError(13, "Permission denied")
        return create(address, **how)

    monkeypatch.setattr(socket, "create_server", as_a_plain_user)
    refusal = pytest.raises(ValueError, match=f"{port}.*{reason}")
    with create(("127.0.0.1", 65535)), refusal as refused, server.running_server(port):
        pass
    other = re.search(r"--port (\d+)", str(refused.value))
    assert other is not None
    as_a_plain_user(("127.0.0.1", int(other[1]))).close()


@pytest.mark.parametrize(("code", "reason"), [("import time; time.sleep(60)", "no answer in 1 s"), ("", "has ended")])
def test_a_server_that_does_not_start_is_named_with_its_log(
    home: Path, monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    started = []

    def start(*_: Any, **how: Any) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen([sys.executable, "-c", code], start_new_session=True, **how))
        return started[0]

    monkeypatch.setattr(server, "start", start)
    monkeypatch.setattr(server, "START_SECONDS", 0.6)
    with pytest.raises(ValueError, match=rf"{reason}.*{home}/server\.log"), server.running_server(free_port()):
        pass
    assert started[0].poll() is not None


def test_a_start_says_that_it_may_take_long(capsys: pytest.CaptureFixture[str]) -> None:
    with options.starting("the server"):
        assert "first start" in capsys.readouterr().out


def test_a_second_server_is_refused_with_the_port_of_the_first(api: str) -> None:
    with pytest.raises(ValueError, match=f"port {server.running_port()}"), server.serving(free_port()):
        pass
    assert httpx.get(f"{api}/health").is_success
    assert api == f"http://127.0.0.1:{json.loads((server.HOME / 'server.json').read_text())['port']}/api"


@pytest.mark.parametrize("named", [False, True])
def test_a_command_uses_the_running_server_and_reads_its_login(
    api: str, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ["PREFECT_API_AUTH_STRING", *([] if named else ["PREFECT_API_URL"])]:
        monkeypatch.delenv(name)
    with server.prefect_server() as url:
        assert (url, os.environ["PREFECT_API_AUTH_STRING"]) == (api, server.login())
    assert httpx.get(f"{api}/health").is_success


@pytest.mark.full
def test_commands_that_start_together_share_a_server_which_ends_with_the_last(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    commands = [
        subprocess.Popen(
            [sys.executable, "-c", COMMAND], cwd=tmp_path, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for _ in range(3)
    ]  # fmt: skip
    try:
        [url] = {command.stdout.readline().strip() for command in commands if command.stdout}
        [pid] = with_arguments("flows.platform.app", str(tmp_path / ".gpt2" / "users"))
        kill([starter := parent(Path(f"/proc/{pid}"))])
        others = [command for command in commands if command.pid != starter]
        others[0].communicate("\n")
        assert len(others) == 2
        assert httpx.get(f"{url}/health", timeout=60).is_success
        others[1].communicate("\n")
        poll(lambda: not Path(f"/proc/{pid}").exists())
    finally:
        for command in commands:
            command.kill()
            command.communicate()

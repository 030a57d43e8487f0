"""A job's process: its environment, and its end with the block that started it."""

import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from flows.runtime import processes
from flows.runtime.processes import Processes, _environment
from model.runs.job import JobFailed
from tests.polling import poll

KEY = "runs/tiny/jobs/train-00000000.json"
ENDLESS = "import signal; signal.signal(signal.SIGTERM, signal.{}); print('started', flush=True); signal.pause()"


def test_a_process_has_the_identity_of_the_trainer_if_one_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    flow_identity = {"AWS_ACCESS_KEY_ID": "pipeline", "AWS_SECRET_ACCESS_KEY": "p"}
    flow_identity |= {"AWS_SESSION_TOKEN": "t", "AWS_PROFILE": "x"}
    flow_identity |= {"AWS_WEB_IDENTITY_TOKEN_FILE": "/f", "PREFECT_API_AUTH_STRING": "gpt2:secret"}
    flow_identity |= {"HF_TOKEN": "h", "HUGGING_FACE_HUB_TOKEN": "h", "WANDB_API_KEY": "w"}
    kept = {
        "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9000",
        "PATH": "/bin",
        "https_proxy": "http://p",
        "NCCL_DEBUG": "INFO",
    }
    for name in os.environ:
        monkeypatch.delenv(name)
    for name, value in (flow_identity | kept).items():
        monkeypatch.setenv(name, value)
    assert _environment() == dict(os.environ)
    monkeypatch.setenv("TRAINER_USER", "trainer")
    assert _environment() == kept  # a trainer without credentials does not get the flow's
    monkeypatch.setenv("TRAINER_ACCESS_KEY_ID", "trainer")
    monkeypatch.setenv("TRAINER_SECRET_ACCESS_KEY", "s")
    assert _environment() == kept | {"AWS_ACCESS_KEY_ID": "trainer", "AWS_SECRET_ACCESS_KEY": "s"}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "print('error: a store failed'); print('rank 0 stops'); print('error: rank 1 was killed, signal 9'); "
            "sys.exit(1)",
            "rank 1 was killed, signal 9: a store failed: job.*code 1. Run .* again to resume it.",
        ),
        ("os.kill(os.getpid(), 9)", "job.*signal 9, often out of memory. Run .* again to resume it.*step 10"),
        ("sys.exit(3)", "job.*code 3.*step 10"),
    ],
)
def test_a_failure_begins_with_its_cause(monkeypatch: pytest.MonkeyPatch, code: str, message: str) -> None:
    start = processes._start
    script = f"import os, sys; [print('step', number, flush=True) for number in range(50)]; {code}"
    monkeypatch.setattr(processes, "_start", lambda argv, env: start([argv[0], "-c", script], env))
    with Processes("./store") as running, pytest.raises(JobFailed) as caught:
        running.run(KEY, lambda _: None)
    assert re.fullmatch(message, str(caught.value).partition("\nstep 11")[0], re.DOTALL)


@pytest.mark.parametrize(("on_sigterm", "ended_by"), [("SIG_DFL", "signal 15"), ("SIG_IGN", "signal 9")])
def test_leaving_the_block_ends_a_running_process_and_starts_no_other(
    monkeypatch: pytest.MonkeyPatch, on_sigterm: str, ended_by: str
) -> None:
    start = processes._start
    monkeypatch.setattr(processes, "_start", lambda argv, env: start([argv[0], "-c", ENDLESS.format(on_sigterm)], env))
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.5)
    lines: list[str] = []
    with ThreadPoolExecutor(1) as task_threads:
        with Processes("./store") as running:
            task = task_threads.submit(running.run, KEY, lines.append)
            poll(lambda: lines == ["started"])
        with pytest.raises(JobFailed, match=rf"{KEY}.* {ended_by}\. "):
            task.result()
    with pytest.raises(JobFailed, match="not started"):
        running.run(KEY, lines.append)

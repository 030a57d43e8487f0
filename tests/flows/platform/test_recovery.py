"""Runs of the deployments under real workers: cancelled, killed, orphaned by a dead worker, retried."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.platform import automations
from flows.platform.bootstrap import bootstrap
from model.checkpoints.records import checkpoints
from model.config import RunConfig
from model.form import DEFAULT
from storage.keys import RunKeys
from storage.stores.opening import open_store
from tests.flows.client import call_api
from tests.flows.deployments import automation, ended, run, set_state, start, states, worker
from tests.making import build_dataset, document, read_json, tiny_config, write_parquet
from tests.polling import poll
from tests.processes import kill, matching, with_arguments

pytestmark = pytest.mark.full

STEPS = 300
END_SECONDS = 25.0  # Prefect kills a cancelled run after 30 s
DIED = "rank 1 was killed, signal 9, often out of memory"
HEARTBEAT_LIMIT_SECONDS = 45  # half of the usual: Prefect's heartbeats come every 30 s


@pytest.fixture(scope="module", autouse=True)
def registered(api: str) -> None:
    list(bootstrap(DEFAULT, RunConfig(), scheduled=False))


@pytest.fixture
def one_worker(tmp_path: Path, registered: None) -> Iterator[int]:
    """The process id of a running worker of the pool `train`."""
    with worker("train", tmp_path / "worker.log") as process:
        yield process.pid


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    """A training of some seconds on two ranks that saves a checkpoint only when it is stopped."""
    source = write_parquet(tmp_path / "source" / "file.parquet", [document(number, 90) for number in range(80)])
    steps = (f"train.max_steps={STEPS}", "train.checkpoint_every_steps=1000", "train.validate_every_steps=0")
    return tiny_config(str(tmp_path / "store"), str(source), *steps, "resources.processes=2")


def first_step(config: RunConfig) -> int:
    """Wait until the training shows its progress. Returns the step that it has reached."""
    store = open_store(config.store_url, create=True)
    return int(poll(lambda: read_json(store, RunKeys(config.name).progress))["step"])


def of_flow_run(flow_run: str) -> list[int]:
    """The processes that Prefect started for a flow run, which have its id in their environment."""
    return matching(lambda folder: flow_run.encode() in (folder / "environ").read_bytes())


def assert_cancellable(api: str, flow_run: str, config: RunConfig) -> None:
    """Cancel the run as the UI does. All its processes must end in time, and it must become Cancelled."""
    assert with_arguments(config.store_url)
    started_at = time.monotonic()
    set_state(api, flow_run, "CANCELLING")
    poll(lambda: not with_arguments(config.store_url), END_SECONDS)
    assert ended(api, flow_run)["state_name"] == "Cancelled"
    poll(lambda: not of_flow_run(flow_run), max(END_SECONDS - (time.monotonic() - started_at), 1))


def test_a_cancelled_training_saves_and_its_retry_resumes(api: str, config: RunConfig, tmp_path: Path) -> None:
    with worker("train", tmp_path / "worker.log"):
        flow_run = start(api, "pretrain", config)
        reached = first_step(config)
        assert_cancellable(api, flow_run, config)
    store = open_store(config.store_url)
    [saved] = checkpoints(store, config.name)
    assert reached <= saved.step < STEPS
    assert run(api, flow_run)["run_count"] == 1
    set_state(api, flow_run, "SCHEDULED", "AwaitingRetry")
    # Another worker: for some seconds, the first may report the cancelled process again, which would cancel the retry.
    with worker("train", tmp_path / "worker.log"):
        assert ended(api, flow_run, 2)["state_name"] == "Completed"
    assert checkpoints(store, config.name)[-1].step == STEPS
    stages = call_api(api, "/flow_runs/filter", {"flow_runs": {"parent_flow_run_id": {"any_": [flow_run]}}})
    assert sorted(stage["name"].partition("-")[0] for stage in stages if stage["state_name"] == "Completed") == sorted(
        ["download", "tokenise", "download", "tokenise", "train", "evaluate", "report"]
    )


@pytest.mark.nightly
def test_a_cancelled_evaluation_ends_at_once(api: str, one_worker: int, config: RunConfig) -> None:
    unending = config.evaluation.model_copy(update={"sample_tokens": 10**6})
    quick = config.train.model_copy(update={"max_steps": 4, "warmup_steps": 1})
    unending_config = config.model_copy(update={"evaluation": unending, "train": quick})
    flow_run = start(api, "pretrain", unending_config)

    def samples(folder: Path) -> bool:
        argv = (folder / "cmdline").read_text()
        return config.store_url in argv and "samples" in argv

    poll(lambda: matching(samples))
    assert_cancellable(api, flow_run, unending_config)


def test_a_killed_flow_ends_with_its_processes_and_is_restarted(api: str, one_worker: int, config: RunConfig) -> None:
    build_dataset(config)
    flow_run = start(api, "train", config)
    first_step(config)
    kill(of_flow_run(flow_run))
    poll(lambda: not with_arguments(config.store_url))
    end = ended(api, flow_run, 2)
    assert end["state_name"] == "Completed", (end["state"]["message"], states(api, flow_run))
    assert "Crashed" in states(api, flow_run)
    assert checkpoints(open_store(config.store_url), config.name)[-1].step == STEPS


@pytest.mark.nightly  # waits for Prefect's heartbeats
def test_a_run_that_died_with_its_worker_becomes_crashed_and_frees_its_slot(
    api: str, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_dataset(config)
    monkeypatch.setattr(automations, "HEARTBEAT_LIMIT_SECONDS", HEARTBEAT_LIMIT_SECONDS)
    list(bootstrap(DEFAULT, RunConfig(), scheduled=False))
    restart = automation(api, automations.RESTART)["id"]
    call_api(api, f"/automations/{restart}", {"enabled": False}, "PATCH")
    try:
        with worker("train", tmp_path / "worker.log") as process:
            flow_run = start(api, "train", config)
            first_step(config)
            kill([process.pid, *of_flow_run(flow_run)])
            process.wait()
        died_at = time.monotonic()
        short = config.train.model_copy(update={"max_steps": 4, "warmup_steps": 1})
        waiting = start(api, "train", config.model_copy(update={"name": "after", "train": short}))
        assert run(api, flow_run)["state_name"] == "Running"
        with worker("train", tmp_path / "worker.log"):
            poll(lambda: run(api, flow_run)["state_name"] == "Crashed", HEARTBEAT_LIMIT_SECONDS + 30)
            assert "No heartbeat" in run(api, flow_run)["state"]["message"]
            assert time.monotonic() - died_at > HEARTBEAT_LIMIT_SECONDS - 30 - 5  # its last heartbeat may be 30 s old
            assert ended(api, waiting)["state_name"] == "Completed"
            set_state(api, flow_run, "SCHEDULED", "AwaitingRetry")
            assert ended(api, flow_run, 2)["state_name"] == "Completed"
    finally:
        call_api(api, f"/automations/{restart}", {"enabled": True}, "PATCH")
        monkeypatch.undo()
        list(bootstrap(DEFAULT, RunConfig(), scheduled=False))


@pytest.mark.nightly  # waits for PENDING_LIMIT_SECONDS
def test_a_run_that_died_with_its_worker_before_it_started_is_restarted(
    api: str, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_dataset(config)
    monkeypatch.setattr(automations, "PENDING_LIMIT_SECONDS", 60)
    list(bootstrap(DEFAULT, RunConfig(), scheduled=False))
    try:
        with worker("train", tmp_path / "worker.log") as process:
            short = config.train.model_copy(update={"max_steps": 4, "warmup_steps": 1})
            flow_run = start(api, "train", config.model_copy(update={"train": short}))
            poll(lambda: of_flow_run(flow_run))
            kill([process.pid, *of_flow_run(flow_run)])
            process.wait()
        assert run(api, flow_run)["state_type"] == "PENDING"
        with worker("train", tmp_path / "worker.log"):
            poll(lambda: run(api, flow_run)["state_name"] == "Completed")
            assert "Crashed" in states(api, flow_run)
    finally:
        monkeypatch.undo()
        list(bootstrap(DEFAULT, RunConfig(), scheduled=False))


def test_a_killed_rank_fails_the_run_with_a_message_that_names_it(api: str, one_worker: int, config: RunConfig) -> None:
    build_dataset(config)
    flow_run = start(api, "train", config)
    first_step(config)
    rank = next(
        pid for pid in with_arguments(config.store_url) if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()
    )
    kill([rank])
    end = ended(api, flow_run)
    assert end["state_name"] == "Failed"
    assert DIED in end["state"]["message"]
    poll(lambda: not with_arguments(config.store_url))

    def log() -> str:
        body = {"task_runs": {"name": {"any_": ["train-tiny"]}}, "sort": "EXPECTED_START_TIME_DESC", "limit": 1}
        [task] = call_api(api, "/task_runs/filter", body)
        lines: list[dict[str, Any]] = call_api(api, "/logs/filter", {"logs": {"task_run_id": {"any_": [task["id"]]}}})
        return "\n".join(line["message"] for line in lines)

    poll(lambda: "2 processes on cpu" in log() and DIED in log())

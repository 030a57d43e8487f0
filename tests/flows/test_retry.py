"""Shard jobs that failed are run again alone, by every way to ask; and the deployment whose runs a worker takes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from model.config import RunConfig
from storage import keys
from storage.canonical import canonical_json
from storage.layout import open_store
from storage.manifest import latest_manifest
from storage.shards import Record
from storage.store import Store
from tests.flows.console import ask, poll, shard_runs
from tests.making import build_dataset, document, tiny_config, write_parquet

pytestmark = [pytest.mark.full, pytest.mark.timeout(600)]

ROOT = Path(__file__).parent.parent.parent
PREFECT = str(Path(sys.executable).with_name("prefect"))


def prefect(*words: str, **environment: str) -> str:
    done = subprocess.run(
        [PREFECT, *words], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def deployment(api: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The id of the project's own deployment, whose runs a worker waits for."""
    prefect("work-pool", "create", "data", "--type", "process")
    prefect("--no-prompt", "deploy", "--all", "--prefect-file", "deploy/prefect.yaml", APP_DIR=str(ROOT))
    [found] = ask(api, "/deployments/filter", {"deployments": {"name": {"any_": ["dataset-refresh"]}}})
    log = (tmp_path_factory.mktemp("worker") / "log").open("wb")
    words = [PREFECT, "worker", "start", "--pool", "data"]
    with (
        log,
        subprocess.Popen(
            words, cwd=ROOT, env=os.environ | {"PREFECT_WORKER_QUERY_SECONDS": "1"}, stdout=log, stderr=log
        ) as worker,
    ):
        yield str(found["id"])
        worker.terminate()


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    for number in range(4):
        texts = [document(number * 100 + row) for row in range(40)]
        write_parquet(tmp_path / "source" / f"file_{number}.parquet", texts)
    return tiny_config(str(tmp_path / "store"), str(tmp_path / "source"), "data.shard_tokens=500")


def started(api: str, deployment: str, config: RunConfig) -> str:
    """The id of a new run of the deployment."""
    asked = {"parameters": {"config": config.model_dump(mode="json")}}
    return str(ask(api, f"/deployments/{deployment}/create_flow_run", asked)["id"])


def ended(api: str, flow_run: str, attempt: int = 1) -> str:
    """The type of the state in which the run's attempt ended."""

    def found() -> Any:
        run = ask(api, f"/flow_runs/{flow_run}")
        return run["state_type"] in ("COMPLETED", "FAILED", "CRASHED") and run["run_count"] >= attempt and run

    return str(poll(found, 180)["state_type"])


def completed(api: str, since: datetime) -> dict[str, str]:
    """The names of the shard tasks that ended well, by id, of the flows started since then."""
    found = shard_runs(api, {"start_time": {"after_": since.isoformat()}})
    return {run["id"]: run["name"] for run in found if run["state_type"] == "COMPLETED"}


def spoil(store: Store, shard_id: str) -> None:
    """Let a record say other bytes than its job makes: the job fails for good."""
    record = Record(shard_id, 3, 1, 0, 1, "0" * 64, "x", {}, {})
    store.put_new(keys.record("small", shard_id), canonical_json(asdict(record)))


def mend(store: Store, shard_ids: list[str]) -> None:
    for shard_id in shard_ids:
        store.delete(keys.record("small", shard_id))


@pytest.mark.parametrize("how", ["ui", "command"])
def test_a_retry_runs_what_failed(api: str, deployment: str, config: RunConfig, tmp_path: Path, how: str) -> None:
    expected = build_dataset(config.model_copy(update={"store_url": str(tmp_path / "other")}))
    store = open_store(config.store_url, create=True)
    failing = expected.shard_ids[3::10]  # one of ten
    assert len(failing) >= 2
    for shard_id in failing:
        spoil(store, shard_id)
    since = datetime.now(UTC)
    flow_run = started(api, deployment, config)
    assert ended(api, flow_run) == "FAILED"
    assert latest_manifest(store, "small") is None
    poll(lambda: len(completed(api, since)) == len(expected.shard_ids) - len(failing))
    mend(store, failing)
    before = completed(api, since)
    if how == "ui":  # what its button sends
        state = {"type": "SCHEDULED", "name": "AwaitingRetry"}
        ask(api, f"/flow_runs/{flow_run}/set_state", {"state": state})
    else:
        prefect("flow-run", "retry", flow_run)
    assert ended(api, flow_run, 2) == "COMPLETED"
    expected_runs = sorted(f"shard-{shard_id}" for shard_id in failing)
    poll(lambda: sorted(name for one, name in completed(api, since).items() if one not in before) == expected_runs)
    sealed = latest_manifest(store, "small")
    assert sealed is not None
    assert sealed.digest == expected.digest


def test_the_schedule_makes_runs_with_its_parameters(api: str, deployment: str) -> None:
    def scheduled() -> Any:
        runs = ask(api, "/flow_runs/filter", {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}})
        return [run for run in runs if run["deployment_id"] == deployment and run["auto_scheduled"]]

    ours = poll(scheduled, 120)
    config = RunConfig.model_validate(ours[0]["parameters"]["config"])
    assert (config.data.source, config.data.config) == ("HuggingFaceFW/fineweb-edu", "sample-10BT")

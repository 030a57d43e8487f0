"""Every way to retry a deployment's run reruns only the failed shard jobs."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from flows.platform.bootstrap import bootstrap
from model.config import ResourcesConfig, RunConfig
from model.form import DEFAULT
from storage.datasets.manifest import latest_manifest
from storage.keys import DatasetKeys
from storage.stores.opening import open_store
from storage.stores.store import Store
from tests.flows.client import call_api, shard_runs
from tests.flows.deployments import ended, set_state, start, worker
from tests.flows.jobs import put_wrong_record
from tests.making import build_dataset, document, tiny_config, write_parquet
from tests.polling import poll

pytestmark = pytest.mark.full

ROOT = Path(__file__).parent.parent.parent
PREFECT = str(Path(sys.executable).with_name("prefect"))


def prefect(*arguments: str, **environment: str) -> str:
    ended = subprocess.run(
        [PREFECT, *arguments], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture(scope="module", autouse=True)
def workers(api: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    list(bootstrap(DEFAULT, RunConfig(), scheduled=False))
    folder = tmp_path_factory.mktemp("worker")
    with worker("data", folder / "data.log"), worker("train", folder / "train.log"):
        yield


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    for number in range(4):
        texts = [document(number * 100 + row, 90) for row in range(40)]
        write_parquet(tmp_path / "source" / f"file_{number}.parquet", texts)
    return tiny_config(str(tmp_path / "store"), str(tmp_path / "source"), "data.shard_tokens=500", "data.val_shards=4")


def completed(api: str, since: datetime) -> dict[str, str]:
    """The names of the completed shard tasks, by id, of the flows started since then."""
    runs = shard_runs(api, {"start_time": {"after_": since.isoformat()}})
    return {run["id"]: run["name"] for run in runs if run["state_type"] == "COMPLETED"}


def delete_records(store: Store, shard_ids: list[str]) -> None:
    for shard_id in shard_ids:
        store.delete(DatasetKeys("small").record(shard_id))


def shown_as_failed(api: str, flow_run: str) -> set[str]:
    """The failed shards in the table of the tokenise stage. Asserts that each row has its reason and command."""
    [stage] = call_api(
        api,
        "/flow_runs/filter",
        {"flow_runs": {"parent_flow_run_id": {"any_": [flow_run]}, "name": {"like_": "tokenise"}}},
    )
    query = {"artifacts": {"flow_run_id": {"any_": [stage["id"]]}, "key": {"any_": ["shard-status"]}}}
    [table] = call_api(api, "/artifacts/filter", query)
    rows = [row for row in json.loads(table["data"]) if row["state"] == "Failed"]
    assert all(row["why"] and row["to run it again"] == f"prefect flow-run retry {flow_run}" for row in rows)
    return {row["shards"] for row in rows}


@pytest.mark.parametrize(
    ("how", "name", "runner"),
    [
        ("ui", "pretrain", "threads"),
        pytest.param("command", "dataset-refresh", "processes", marks=pytest.mark.nightly),
        pytest.param("ui", "dataset-refresh", "dask", marks=pytest.mark.nightly),
    ],
)
def test_a_retry_reruns_only_failed_jobs(
    api: str, config: RunConfig, tmp_path: Path, how: str, name: str, runner: str
) -> None:
    config = config.model_copy(update={"resources": ResourcesConfig(runner=runner, workers=2)})  # type: ignore[arg-type]
    expected = build_dataset(config.model_copy(update={"store_url": str(tmp_path / "other")}))
    store = open_store(config.store_url, create=True)
    failing = [row.shard_id for row in expected.rows("train")][3::10]  # one of ten
    assert len(failing) >= 2
    stems = {digest[:12]: Path(name).stem for name, digest in expected.files.items()}
    failing_tasks = sorted(f"shard-{stems[shard_id[:12]]}{shard_id[12:]}" for shard_id in failing)
    for shard_id in failing:
        put_wrong_record(store, "small", shard_id)
    since = datetime.now(UTC)
    flow_run = start(api, name, config)
    assert ended(api, flow_run)["state_type"] == "FAILED"
    assert latest_manifest(store, "small") is None
    assert sorted(shown_as_failed(api, flow_run)) == failing_tasks
    poll(lambda: len(completed(api, since)) == len(expected.shard_ids) - len(failing))
    delete_records(store, failing)
    before = completed(api, since)
    if how == "ui":  # the request of the UI's button
        set_state(api, flow_run, "SCHEDULED", "AwaitingRetry")
    else:
        prefect("flow-run", "retry", flow_run)
    assert ended(api, flow_run, 2)["state_type"] == "COMPLETED"
    poll(
        lambda: (
            sorted(name for task_run, name in completed(api, since).items() if task_run not in before) == failing_tasks
        )
    )
    sealed = latest_manifest(store, "small")
    assert sealed is not None
    assert sealed.digest == expected.digest

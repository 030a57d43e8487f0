"""Several machines: a Dask cluster that loses a worker, and a Prefect server on PostgreSQL."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from flows.platform import server
from flows.pretrain import build_dataset
from storage.datasets.manifest import read_manifest
from storage.stores.opening import open_store
from tests import postgres
from tests.flows.client import call_api, run_gpt2
from tests.flows.deployments import deployment, ended, start, worker
from tests.making import document, settings_of, tiny_config, write_parquet
from tests.polling import poll
from tests.ports import free_port

pytestmark = pytest.mark.nightly


@contextmanager
def dask(log: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process of a Dask cluster."""
    with log.open("ab") as out:
        process = subprocess.Popen([sys.executable, "-m", "dask", *options, "--no-dashboard"], stdout=out, stderr=out)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_dask_cluster_builds_the_same_dataset_despite_a_killed_worker(tmp_path: Path, api: str) -> None:
    texts = [document(number, 2_000) for number in range(400)]
    source = write_parquet(tmp_path / "source" / "file.parquet", texts)
    address = f"tcp://127.0.0.1:{free_port()}"
    with ExitStack() as stack:
        stack.enter_context(dask(tmp_path / "scheduler", "scheduler", "--host", address))
        hosts = [
            stack.enter_context(
                dask(
                    tmp_path / f"worker-{number}",
                    "worker",
                    address,
                    "--nthreads",
                    "1",
                    "--no-nanny",
                    "--local-directory",
                    str(tmp_path / f"host-{number}"),
                )
            )
            for number in range(2)
        ]
        poll(lambda: all("Registered to" in (tmp_path / f"worker-{number}").read_text() for number in range(2)))
        settings = ("resources.runner=dask", f"resources.dask_address={address}", "data.shard_tokens=5000")
        config = tiny_config(str(tmp_path / "store"), str(source), *settings, "resources.workers=2")
        folder = tmp_path / "store" / "datasets" / "small" / "shards"
        flow = subprocess.Popen(
            [sys.executable, "-m", "flows.console.cli", "dataset", "build"]
            + [word for setting in [*settings_of(config), *settings] for word in ("--set", setting)],
            env=os.environ | {"PREFECT_API_URL": api},
        )
        poll(lambda: len(list(folder.glob("*.json"))) > 5)
        hosts[0].kill()
        assert flow.wait(300) == 0
    digest = build_dataset(tiny_config(str(tmp_path / "serial"), str(source), "data.shard_tokens=5000"))
    manifest = read_manifest(open_store(config.store_url), "small", digest)
    assert len(manifest.shard_ids) > 20


@pytest.fixture
def on_postgresql(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The API address of a Prefect server on PostgreSQL."""
    database = postgres.start(tmp_path / "postgres")
    try:
        for name, value in database.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(server, "HOME", tmp_path / ".gpt2")
        monkeypatch.setenv("PREFECT_API_AUTH_STRING", server.login())
        port = free_port()
        with server.running_server(port):
            monkeypatch.setenv("PREFECT_API_URL", url := f"http://127.0.0.1:{port}/api")
            yield url
    finally:
        database.stop()


def test_deployments_run_on_postgresql(on_postgresql: str, tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "source" / "file.parquet", [document(number, 90) for number in range(80)])
    config = tiny_config(str(tmp_path / "store"), str(source))
    for _ in range(2):
        code, output = run_gpt2("bootstrap", cwd=tmp_path, api=on_postgresql)
        assert code == 0, output
    assert "made" not in output
    fields = deployment(on_postgresql, "pretrain")["parameter_openapi_schema"]["properties"]
    assert sorted(fields, key=lambda name: fields[name]["position"])[:3] == ["preset", "name", "source"]
    with worker("train", tmp_path / "worker.log"):
        flow_run = start(on_postgresql, "pretrain", config)
        assert ended(on_postgresql, flow_run)["state_name"] == "Completed"
    stages = call_api(on_postgresql, "/flow_runs/filter", {"flow_runs": {"parent_flow_run_id": {"any_": [flow_run]}}})
    assert {stage["name"].partition("-")[0] for stage in stages} == {
        "download", "tokenise", "train", "evaluate", "report",
    }  # fmt: skip

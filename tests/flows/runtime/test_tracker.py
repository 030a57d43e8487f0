"""A tracker that hangs, refuses, dies or is slow changes no loss and ends with its flow; another gets every step."""

import os
import time
from pathlib import Path

import pytest

from flows.runtime import processes
from flows.runtime.processes import Processes
from model.__main__ import run_job
from model.checkpoints.records import read_metrics
from model.config import RunConfig
from model.runs.job import put_job
from model.runs.run import pin_run, training_job
from storage.stores.opening import open_store
from tests.flows.trackers import import_path, install, sent_steps
from tests.making import build_dataset
from tests.polling import poll
from tests.processes import with_arguments

BROKEN = {
    "hangs-at-import": {"at_import": "time.sleep(1000)"},
    "refuses": {"at_start": "raise ConnectionRefusedError('[Errno 111] nobody listens')"},
    "dies": {"at_step": "os.kill(os.getpid(), signal.SIGKILL)"},
    "is-slow": {"at_step": "time.sleep(1000)"},
}
SAID = {"refuses": ["trackio ends, the training goes on: ConnectionRefusedError: [Errno 111] nobody listens"],
        "dies": ["the tracker's process was killed, signal 9. The training goes on without it."]}  # fmt: skip
COMPUTED = {"step", "loss", "val_loss", "learning_rate", "gradient_norm"}


def train(config: RunConfig, name: str, manifest: str, tracked: list[str] | None = None) -> list[dict[str, object]]:
    """Train a new run, with a tracker beside it if a list for its log is given. Returns what was computed."""
    config = config.model_copy(update={"name": name})
    store = open_store(config.store_url)
    key = put_job(store, training_job(pin_run(store, config, manifest, None)))
    with Processes(store.url) as running:
        if tracked is not None:
            running.start_tracker(name, "trackio:small-models", tracked.append)
        assert run_job(store.url, key) == 0
        if tracked is not None:
            folder = Path(os.environ["PYTHONPATH"].partition(os.pathsep)[0])
            poll(lambda: (folder / "reached").exists() or (folder / name).exists())
            poll(lambda: tracked == SAID.get(name, []))
    return [line.model_dump(include=COMPUTED) for line in read_metrics(store, name)]


def test_no_tracker_changes_a_loss_or_outlives_its_flow(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "GRACE_SECONDS", 1.0)
    monkeypatch.setenv("PYTHONPATH", import_path(tmp_path))
    manifest = build_dataset(config).digest
    undisturbed = train(config, "undisturbed", manifest)
    for name, code in BROKEN.items():
        install(tmp_path, **code)
        (tmp_path / "reached").unlink(missing_ok=True)
        started = time.monotonic()
        assert train(config, name, manifest, tracked=[]) == undisturbed
        assert time.monotonic() - started < 500  # each of them would take 1,000 s
        poll(lambda name=name: not with_arguments("model.tracking", name))


def test_a_tracker_gets_every_step_once(config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the last ones, although the flow ends its tracker when the training has ended. It has its own secrets."""
    monkeypatch.setenv("PYTHONPATH", import_path(tmp_path))
    for name in (
        "TRAINER_ACCESS_KEY_ID",
        "TRAINER_SECRET_ACCESS_KEY",
        "TRACKIO_WRITE_TOKEN",
        "PREFECT_API_AUTH_STRING",
    ):
        monkeypatch.setenv(name, "secret")
    install(tmp_path, at_start="os.environ['TRACKIO_WRITE_TOKEN']; assert 'PREFECT_API_AUTH_STRING' not in os.environ")
    train(config, "tiny", build_dataset(config).digest, tracked=[])
    assert sent_steps(tmp_path, "tiny") == list(range(1, 13))

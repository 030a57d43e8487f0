"""`gpt2 status` shows the failure of an evaluation until the same evaluation succeeds."""

import os
from pathlib import Path

import pytest

from flows.inspection.status import run_status
from model.checkpoints.records import WEIGHTS, CheckpointRecord, put_checkpoint
from model.runs.job import Job, note_failure, put_job
from storage import keys
from storage.keys import RunKeys
from storage.stores.opening import open_store
from storage.stores.store import overwrite


@pytest.mark.parametrize(
    ("written", "failed", "error"),
    [(None, 200, "killed"), (100, 200, "killed"), (200, 200, "killed"), (300, 200, ""), (300, None, "")],
)
def test_a_failure_is_shown_until_the_same_evaluation_is_written_after_it(
    tmp_path: Path, written: int | None, failed: int | None, error: str
) -> None:
    """A job with other settings wrote the evaluation; the failed job itself would have deleted its failure."""
    store = open_store(str(tmp_path / "store"), create=True)
    put_checkpoint(store, "one", {WEIGHTS: b""}, CheckpointRecord(0, "", {}, {}))  # like an imported model
    job = Job("one", "val_loss", {"step": 0})
    put_job(store, job)
    result, answer = RunKeys("one").result(job.job_id), RunKeys("one").evaluation(0, "val_loss")
    note_failure(store, result, "killed")
    overwrite(store, answer, b"{}")
    overwrite(store, RunKeys("one").prefix + "latest.json", b"{}")  # older versions wrote it
    for key, seconds in ((keys.failure(result), failed), (answer, written)):
        path = store.local_path(key)
        assert path is not None
        if seconds is None:
            path.unlink()
        else:
            os.utime(path, (seconds, seconds))
    [line] = [line for line in run_status(store, "one") if line.what.strip() == "val_loss"]
    assert (line.error, line.state) == (error, "missing" if written is None else "done")

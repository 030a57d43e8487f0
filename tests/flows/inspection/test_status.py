"""What `gpt2 status` says of an evaluation that failed and of one that answered, whichever came last."""

import os
from pathlib import Path

import pytest

from flows.inspection.status import run_status
from model.checkpoints.records import put_checkpoint
from model.runs.job import Job, note_failure, put_job
from storage import keys
from storage.keys import RunKeys
from storage.stores.opening import open_store
from storage.stores.store import overwrite


@pytest.mark.parametrize(
    ("answered", "failed", "said"),
    [(None, 200, "killed"), (100, 200, "killed"), (200, 200, "killed"), (300, 200, ""), (300, None, "")],
)
def test_a_failure_counts_until_the_same_is_answered_after_it(
    tmp_path: Path, answered: int | None, failed: int | None, said: str
) -> None:
    """The answer is that of a job with other settings: the one that failed would have taken its note away."""
    store = open_store(str(tmp_path / "store"), create=True)
    about = {"step": 0, "job": "", "model": {}, "train": {}, "cursor": {}, "metrics": []}
    put_checkpoint(store, "one", {}, about)  # as of a model that was imported
    job = Job("one", "val_loss", {"step": 0})
    put_job(store, job)
    result, answer = RunKeys("one").result(job.job_id), RunKeys("one").evaluation(0, "val_loss")
    note_failure(store, result, "killed")
    overwrite(store, answer, b"{}")
    for key, seconds in ((keys.failure(result), failed), (answer, answered)):
        path = store.local_path(key)
        assert path is not None
        if seconds is None:
            path.unlink()
        else:
            os.utime(path, (seconds, seconds))
    [line] = [line for line in run_status(store, "one") if line.what.strip() == "val_loss"]
    assert (line.why, line.state) == (said, "missing" if answered is None else "done")

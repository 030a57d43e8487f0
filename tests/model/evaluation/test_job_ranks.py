"""One evaluation by several ranks, processes of their own in a real group: the same numbers, answers and texts."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from model.checkpoints.records import checkpoints
from model.runs.job import put_job, read_result
from model.runs.run import evaluation_jobs
from storage import keys
from storage.keys import RunKeys
from storage.stores.store import overwrite, read_json
from tests.model.training_runs import House, training

ITEMS = [
    {
        "ctx": f"The model learns {'to write ' * number}", "label": number % 4,
        "activity_label": "Learning", "ctx_a": "The model", "ctx_b": "learns",
        "endings": ["text.", f"one token after {number}.", "because", "another token after another token"],
    }
    for number in range(11)
]  # fmt: skip


def found(house: House, run: str, processes: int, folder: Path) -> dict[str, Any]:
    """What each evaluation of the run keeps, and the rows of HellaSwag, by so many ranks."""
    items = keys.source("1" * 64, "items.jsonl")
    settings = ["evaluation.samples=2", "evaluation.sample_tokens=40", 'evaluation.prompts=["The model", ""]']
    config = house.config(run, *settings, f"resources.evaluation_processes={processes}")
    kept: dict[str, Any] = {}
    for job in evaluation_jobs(config, checkpoints(house.store, run)[-1], house.manifest.digest, items):
        house.store.delete(RunKeys(run).result(job.job_id))
        with training(house.store, put_job(house.store, job), processes, folder) as process:
            assert process.wait() == 0, process.said()
        result = read_result(house.store, job)
        assert result is not None
        kept[job.kind] = read_json(house.store, result["key"])
    rows = house.store.read(RunKeys(run).evaluation_items(kept["hellaswag"]["step"], "hellaswag")).body
    return kept | {"rows": pq.read_table(io.BytesIO(bytes(rows))).to_pylist()}


@pytest.mark.full
@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_find_what_one_process_finds(house: House, tmp_path: Path, ranks: int) -> None:
    run = house.trained_here(f"asked-by-{ranks}")
    overwrite(house.store, keys.source("1" * 64, "items.jsonl"), "\n".join(map(json.dumps, ITEMS)).encode())
    alone, together = (found(house, run, processes, tmp_path / str(processes)) for processes in (1, ranks))
    for kind in ("val_loss", "hellaswag", "samples"):
        assert together[kind]["environment"]["ranks"] == ranks
        assert together[kind]["metrics"] == pytest.approx(alone[kind]["metrics"], rel=1e-6, abs=0)
    assert together["val_loss"]["tokens"] == alone["val_loss"]["tokens"]
    assert together["samples"]["samples"] == alone["samples"]["samples"]
    assert len(together["samples"]["samples"]) == 4  # of 3 ranks one has none to write
    for ours, theirs in zip(together["rows"], alone["rows"], strict=True):
        for name, value in ours.items():
            expected = pytest.approx(theirs[name], rel=1e-5) if name.endswith("_losses") else theirs[name]
            assert value == expected

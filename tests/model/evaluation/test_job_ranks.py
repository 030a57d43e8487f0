"""Several ranks, real processes in a real group, give the numbers, answers and texts of one process."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from model.__main__ import run_job
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


RUN = "evaluated"


def evaluations(house: House, processes: int, evaluate: Callable[[str], int]) -> dict[str, Any]:
    """The stored evaluations of the run by kind, and the answers to HellaSwag as rows; `evaluate` does a job."""
    items = keys.source("1" * 64, "items.jsonl")
    settings = ["evaluation.samples=2", "evaluation.sample_tokens=40", 'evaluation.prompts=["The model", ""]']
    config = house.config(RUN, *settings, f"resources.evaluation_processes={processes}")
    stored: dict[str, Any] = {}
    for job in evaluation_jobs(config, checkpoints(house.store, RUN)[-1], house.manifest.digest, items):
        house.store.delete(RunKeys(RUN).result(job.job_id))
        assert evaluate(put_job(house.store, job)) == 0
        result = read_result(house.store, job)
        assert result is not None
        stored[job.kind] = read_json(house.store, result["key"])
    rows = house.store.read(RunKeys(RUN).evaluation_items(stored["hellaswag"]["step"], "hellaswag")).body
    return stored | {"rows": pq.read_table(io.BytesIO(bytes(rows))).to_pylist()}


@pytest.fixture(scope="module")
def alone(house: House) -> dict[str, Any]:
    """The evaluations by one rank, this process."""
    house.trained_here(RUN)
    overwrite(house.store, keys.source("1" * 64, "items.jsonl"), "\n".join(map(json.dumps, ITEMS)).encode())
    return evaluations(house, 1, lambda job_key: run_job(house.store.url, job_key))


@pytest.mark.full
@pytest.mark.parametrize("ranks", [2, 3])
def test_several_ranks_give_the_results_of_one_process(
    house: House, alone: dict[str, Any], tmp_path: Path, ranks: int
) -> None:
    def evaluate(job_key: str) -> int:
        with training(house.store, job_key, ranks, tmp_path) as process:
            code = process.wait()
            assert code == 0, process.said()
        return code

    together = evaluations(house, ranks, evaluate)
    for kind in ("val_loss", "hellaswag", "samples"):
        assert together[kind]["environment"]["ranks"] == ranks
        assert together[kind]["metrics"] == pytest.approx(alone[kind]["metrics"], rel=1e-6, abs=0)
    assert together["val_loss"]["tokens"] == alone["val_loss"]["tokens"]
    assert together["samples"]["samples"] == alone["samples"]["samples"]
    assert len(together["samples"]["samples"]) == 4  # one of 3 ranks has none to write
    for ours, theirs in zip(together["rows"], alone["rows"], strict=True):
        for name, value in ours.items():
            expected = pytest.approx(theirs[name], rel=1e-5) if name.endswith("_losses") else theirs[name]
            assert value == expected

"""Several ranks, as real processes in a real group, give the same results as one process."""

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
from storage.stores.store import overwrite
from tests.making import read_json
from tests.model.training_runs import StoredDataset, training

ITEMS = [
    {
        "ctx": f"The model learns {'to write ' * number}", "label": number % 4,
        "activity_label": "Learning", "ctx_a": "The model", "ctx_b": "learns",
        "endings": ["text.", f"one token after {number}.", "because", "another token after another token"],
    }
    for number in range(11)
]  # fmt: skip


RUN = "evaluated"


def evaluations(dataset: StoredDataset, processes: int, evaluate: Callable[[str], int]) -> dict[str, Any]:
    """The stored evaluations of the run by kind, and the HellaSwag answers as rows. `evaluate` runs a job."""
    items = keys.source("1" * 64, "items.jsonl")
    settings = ["evaluation.samples=2", "evaluation.sample_tokens=40", 'evaluation.prompts=["The model", ""]']
    config = dataset.config(RUN, *settings, f"resources.evaluation_processes={processes}")
    stored: dict[str, Any] = {}
    for job in evaluation_jobs(config, checkpoints(dataset.store, RUN)[-1], dataset.manifest.digest, items):
        dataset.store.delete(RunKeys(RUN).result(job.job_id))
        assert evaluate(put_job(dataset.store, job)) == 0
        result = read_result(dataset.store, job)
        assert result is not None
        stored[job.kind] = read_json(dataset.store, result["key"])
    rows = dataset.store.read(RunKeys(RUN).evaluation_items(stored["hellaswag"]["step"], "hellaswag")).body
    return stored | {"rows": pq.read_table(io.BytesIO(bytes(rows))).to_pylist()}


@pytest.fixture(scope="module")
def of_one_rank(dataset: StoredDataset) -> dict[str, Any]:
    """The evaluations of one rank, in this process."""
    dataset.train(RUN)
    overwrite(dataset.store, keys.source("1" * 64, "items.jsonl"), "\n".join(map(json.dumps, ITEMS)).encode())
    return evaluations(dataset, 1, lambda job_key: run_job(dataset.store.url, job_key))


@pytest.mark.full
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.nightly)])
def test_several_ranks_give_the_results_of_one_process(
    dataset: StoredDataset, of_one_rank: dict[str, Any], tmp_path: Path, ranks: int
) -> None:
    def evaluate(job_key: str) -> int:
        with training(dataset.store, job_key, ranks, tmp_path) as process:
            code = process.wait()
            assert code == 0, process.output()
        return code

    of_all_ranks = evaluations(dataset, ranks, evaluate)
    for kind in ("val_loss", "hellaswag", "samples"):
        assert of_all_ranks[kind]["environment"]["ranks"] == ranks
        assert of_all_ranks[kind]["metrics"] == pytest.approx(of_one_rank[kind]["metrics"], rel=1e-6, abs=0)
    assert of_all_ranks["val_loss"]["tokens"] == of_one_rank["val_loss"]["tokens"]
    assert of_all_ranks["samples"]["samples"] == of_one_rank["samples"]["samples"]
    assert len(of_all_ranks["samples"]["samples"]) == 4  # one of 3 ranks has no sample to write
    for ours, theirs in zip(of_all_ranks["rows"], of_one_rank["rows"], strict=True):
        for name, value in ours.items():
            expected = pytest.approx(theirs[name], rel=1e-5) if name.endswith("_losses") else theirs[name]
            assert value == expected

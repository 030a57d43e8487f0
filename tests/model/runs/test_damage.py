"""Any JSON value in place of a part of a run's objects is read as before, or refused by the key of the object."""

import copy
import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from model.checkpoints.records import WEIGHTS, checkpoints, read_metrics
from model.config import RunConfig
from model.runs.job import put_job, read_job, read_result
from model.runs.run import evaluation_jobs, find_run, find_start, pinned_run, training_job
from storage.errors import DatasetMismatch, StorageError
from storage.keys import RunKeys
from storage.stores.store import Store
from tests.model.training_runs import SHORT, StoredDataset

RUN = "damaged"
KEYS = RunKeys(RUN)
DELETED = object()
VALUES = (None, True, -1, 10**30, "", "x/y", [[]], {"x": {}}, DELETED)


@pytest.fixture(scope="module")
def config(dataset: StoredDataset) -> RunConfig:
    """The configuration of a finished run."""
    dataset.train(RUN, *SHORT)
    return dataset.config(RUN, *SHORT)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every part of a JSON value."""
    yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in children:
        yield from places(child, (*path, name))


def changed(value: Any, path: tuple[Any, ...], other: Any) -> Any:
    """The JSON value with another part at this path."""
    if not path:
        return other
    result = copy.deepcopy(value)
    parent = result
    for name in path[:-1]:
        parent = parent[name]
    parent[path[-1]] = other
    if other is DELETED:
        del parent[path[-1]]
    return result


def read_checkpoints(store: Store, config: RunConfig) -> None:
    read_metrics(store, RUN)
    child = config.model_copy(update={"train": config.train.model_copy(update={"start_from": RUN})})
    for record in checkpoints(store, RUN):
        assert int(record.attempt, 16) < 2**63
        assert record.files[WEIGHTS].size_bytes
        evaluation_jobs(config, record, None, None)
        with suppress(DatasetMismatch):  # another shape
            find_start(store, child)


def read_run(store: Store, config: RunConfig) -> None:
    run = find_run(store, RUN)
    assert run is not None
    assert isinstance(run.dataset, str)
    assert training_job(run).recipe
    assert {"keep_last", "keep_every_steps", "max_steps"} <= run.config["train"].keys()
    assert run.config["evaluation"]["hellaswag"] is not None
    assert run.config["data"]["source"] is not None
    with suppress(DatasetMismatch):  # other settings
        pinned_run(store, config)


def read_training(store: Store, key: str) -> None:
    assert read_job(store, key).key == key


def objects(store: Store, config: RunConfig) -> dict[str, Callable[[Store, RunConfig], object]]:
    """How each kind of object is read, by an example's key."""
    run = find_run(store, RUN)
    assert run is not None
    job = training_job(run)
    return {
        KEYS.checkpoint_record(12): read_checkpoints,
        checkpoints(store, RUN)[-1].metrics[-1]: read_checkpoints,
        KEYS.config: read_run,
        put_job(store, job): lambda *_: read_training(store, job.key),
        KEYS.result(job.job_id): lambda *_: read_result(store, job),
    }


@pytest.mark.parametrize("index", range(5))
def test_any_other_json_is_read_or_refused_by_its_key(dataset: StoredDataset, config: RunConfig, index: int) -> None:
    store = dataset.store
    key, read = list(objects(store, config).items())[index]
    path_of_object = store.local_path(key)
    assert path_of_object is not None
    before = path_of_object.read_bytes()
    lines = before.splitlines()
    refused = 0
    read(store, config)
    try:
        for path in places(json.loads(lines[0])):
            for other in VALUES if path else VALUES[:-1]:
                body = json.dumps(changed(json.loads(lines[0]), path, other)).encode()
                path_of_object.write_bytes(b"\n".join([body, *lines[1:]]))
                try:
                    read(store, config)
                except (StorageError, ValueError) as error:
                    assert any(repr(name) in str(error) for name in (key, other)), (path, other)  # or a missing segment
                    assert "validation error" not in str(error)
                    refused += 1
        path_of_object.write_bytes(b"[" * 100_000)
        with pytest.raises(StorageError, match=re.escape(repr(key))):
            read(store, config)
    finally:
        path_of_object.write_bytes(before)
    assert refused > len(VALUES)

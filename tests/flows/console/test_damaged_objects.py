"""Damage to one object ends each verb that reads it with a message, and never hides the other objects."""

import io
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prefect.logging import disable_run_logger

from flows import evaluate
from flows.console.cli import main
from flows.inspection.status import store_status
from flows.runtime.processes import Processes
from model import tokenizer
from model.__main__ import run_job
from model.checkpoints.records import WEIGHTS, CheckpointRecord, Progress, checkpoints, put_checkpoint
from model.config import RunConfig
from model.runs.job import Job, JobFailed, note_failure, put_job, read_job, read_result
from model.runs.run import evaluation_jobs, keep_request, pin_run, pinned_run, training_job
from storage import keys
from storage.cache import host
from storage.datasets import building, plan, records
from storage.datasets.lease import claim
from storage.datasets.plan import plan_files, planner
from storage.digests import canonical_json, digest, sha256
from storage.errors import ObjectCorrupt, StorageError
from storage.inspection.leaks import LeakReport, read_leak_report
from storage.keys import DatasetKeys, RunKeys
from storage.sources import reading
from storage.sources.mirror import list_source
from storage.stores.opening import open_store
from storage.stores.store import LIMIT_BYTES, Store, overwrite
from tests.flows.garbage_places import make_old
from tests.making import build_dataset, document, tiny_config, write_parquet

DATASET, RUN = DatasetKeys("small"), RunKeys("tiny")
HUB = ("owner/name", "", "c" * 40, "train")  # a listing of this commit needs no request
FOLDER, OVERSIZED = "a folder", "an oversized object"
WHOLE: list[Any] = [  # in place of an object
    FOLDER, OVERSIZED, b"", b"not JSON", b"\xff\xfe\x00", b'{"a": "\\ud800"}', b"[" * 100_000, b"1" * 5_000, b"NaN",
    b"null", b"[]", b"7", b'"text"', b"{}", b'{"schema": 99}', b'[["shard_id", 1]]',
]  # fmt: skip
DELETED = "deleted"
VALUES: list[Any] = [
    DELETED, None, True, -1, 0, 10**30, 1.5, float("inf"), "", "x", "../../x", "a\x1b[2J", [], [[]], {}, {"x": {}},
]  # fmt: skip


class Place(NamedTuple):
    """A store with one object of each kind, and an example's key of each kind."""

    folder: Path
    config: RunConfig
    examples: dict[str, str]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("damaged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "REMEMBERED", folder / "digests")
        patch.setattr(host, "FOLDER", folder / "cache")
        yield _make(folder)


def _make(folder: Path) -> Place:
    texts = [document(number) for number in range(80)]
    write_parquet(folder / "source" / "file_0.parquet", texts[:40])
    config = tiny_config(str(folder / "store"), str(folder / "source" / "*.parquet"), "train.max_steps=2")
    first = build_dataset(config)
    write_parquet(folder / "source" / "file_1.parquet", texts[40:])
    newest, store = build_dataset(config), open_store(config.store_url)
    report = LeakReport(
        asked=None, dataset="small", documents={"train": 20, "val": 10}, duplicates={"train": 0, "val_in_train": 0},
        examples={}, items=None, leaks=[], manifest=newest.digest,
    )  # fmt: skip
    overwrite(store, DATASET.leaks(newest.digest), report.model_dump_json().encode())
    for made in _plans(store, config):
        plan.put_plan(store, "small", made)
    assert run_job(store.url, put_job(store, training_job(pin_run(store, config, newest.digest, None)))) == 0
    record = checkpoints(store, "tiny")[-1]
    jobs = [job for job in evaluation_jobs(config, record, newest.digest, None) if job.kind != "completion"]
    for job in jobs:
        assert run_job(store.url, put_job(store, job)) == 0
    keep_request(store, RUN.request, config)
    keep_request(store, DATASET.request, config)
    overwrite(store, RUN.progress, Progress(step=1, max_steps=2, since_checkpoint=[]).model_dump_json().encode())
    failed = Job("tiny", "val_loss", {"step": 2, "seed": 3})
    put_job(store, failed)
    for result in (DATASET.record(newest.shard_ids[0]), RUN.result(failed.job_id)):
        note_failure(store, result, "killed")
    weights = store.read(RUN.checkpoint_file(record.step, record.attempt, WEIGHTS)).body
    put_checkpoint(store, "imported", {WEIGHTS: weights}, CheckpointRecord(0, "", record.model, {}))
    files = [{"name": "a.parquet", "size_bytes": 1, "digest": "d" * 64, "place": "hf://datasets/x"}]
    origin = {"dataset": HUB[0], "config": "", "commit": HUB[2], "licence": ""}
    overwrite(store, keys.listing(digest(list(HUB))), canonical_json({"files": files, "origin": origin}))
    overwrite(store, DatasetKeys("other").request, store.read(DATASET.request).body)
    stored = {listed.key for listed in store.list("")}
    examples = {
        "format": keys.FORMAT, "split": DATASET.split, "lease": DATASET.lease, "latest": DATASET.latest,
        "manifest": DATASET.manifest(newest.digest), "parent": DATASET.manifest(first.digest),
        "record": DATASET.record(newest.shard_ids[0]),
        "shard failure": keys.failure(DATASET.record(newest.shard_ids[0])),
        "plan": min(key for key in stored if key.startswith(DATASET.plans)), "leaks": DATASET.leaks(newest.digest),
        "val": next(key for key in stored if "/val/" in key), "dataset request": DATASET.request,
        "listing": keys.listing(digest(list(HUB))), "run": RUN.config, "run request": RUN.request,
        "checkpoint": RUN.checkpoint_record(2), "progress": RUN.progress, "job": put_job(store, failed),
        "training job": training_job(pinned_run(store, config)).key, "result": RUN.result(jobs[0].job_id),  # type: ignore[arg-type]
        "job failure": keys.failure(RUN.result(failed.job_id)), "evaluation": RUN.evaluation(2, "val_loss"),
        "samples": RUN.evaluation(2, "samples"), "metrics": min(key for key in stored if key.startswith(RUN.metrics)),
        "imported": RunKeys("imported").checkpoint_record(0),
    }  # fmt: skip
    assert set(examples.values()) <= stored
    return Place(folder / "store", config, examples)


def _plans(store: Store, config: RunConfig) -> list[plan.FilePlan]:
    spec = config.data.spec(tokenizer.identity())
    listing, _ = list_source(store, config.data.source, "", "", "train")
    return list(
        plan_files(store, "small", listing.files, spec.settings, planner(store, spec.settings, tokenizer.encode))
    )


@pytest.fixture
def place(pristine: Place, tmp_path: Path) -> Place:
    return pristine._replace(folder=tmp_path / "store")


def fresh(pristine: Place, place: Place) -> Store:
    """The undamaged store again."""
    shutil.rmtree(place.folder, ignore_errors=True)
    shutil.copytree(pristine.folder, place.folder)
    return open_store(str(place.folder))


def damage(store: Store, key: str, body: Any) -> None:
    path = store.local_path(key)
    assert path is not None
    path.unlink()
    if body == FOLDER:
        path.mkdir()
    elif body == OVERSIZED:
        with path.open("wb") as file:
            os.truncate(file.fileno(), LIMIT_BYTES + 1)
    else:
        path.write_bytes(body)


def changed(body: bytes, draw: Callable[[int], int]) -> bytes:
    """JSON with one part of it changed or deleted."""
    value = json.loads(body)
    places: list[tuple[Any, Any]] = []

    def walk(part: Any) -> None:
        for name, child in list(part.items() if isinstance(part, dict) else enumerate(part)):
            places.append((part, name))
            if isinstance(child, dict | list):
                walk(child)

    walk(value)
    part, name = places[draw(len(places))]
    other = VALUES[draw(len(VALUES))]
    if other == DELETED:
        del part[name]
    else:
        part[name] = other
    return json.dumps(value).encode()


def verbs(place: Place, kind: str) -> list[list[str]]:
    of_dataset = [
        ["dataset", "show"],
        ["dataset", "log"],
        ["dataset", "verify", "--quick"],
        ["dataset", "diff", "small", "latest"],
    ]
    of_dataset += [["dataset", "trace", "--window", "0"], ["dataset", "verify"]]
    of_run = [["status", "tiny"], ["status", "imported"], ["report", "--to", f"{place.folder}.md"]]
    both = [["status"], ["gc"]]
    if kind in ("format", "manifest"):
        return both + of_dataset + of_run
    return both + (of_dataset if place.examples[kind].startswith(DATASET.prefix) else of_run)


def run_verb(place: Place, argv: list[str]) -> tuple[int, str]:
    """The exit code and the message of a verb. Any other exception fails the test."""
    printed = io.StringIO()
    options = ["--set", f"store_url={place.folder}", "--set", f"data.source={place.config.data.source}"]
    options += ["--set", "name=tiny", "--set", "data.dataset=small"]
    with redirect_stdout(printed), redirect_stderr(printed), pytest.raises(SystemExit) as ended:
        main([*argv, *options])
    assert ended.value.code in (0, 1, 2)
    return int(ended.value.code), printed.getvalue()


def check_verbs(place: Place, kind: str) -> None:
    key = place.examples[kind]
    for argv in verbs(place, kind):
        code, message = run_verb(place, argv)
        assert "validation error" not in message, (argv, message)
        if code:
            assert key in message or key.rpartition("/")[2].removesuffix(".json") in message or "gpt2 " in message, (
                argv, message,
            )  # fmt: skip


def check_functions(place: Place, store: Store) -> None:
    """What builds and trainings read."""
    config = place.config.model_copy(update={"store_url": str(place.folder)})
    spec = config.data.spec(tokenizer.identity())

    def build() -> object:
        plans = _plans(store, config)
        build = building.start_build(store, spec, plans)
        building.put_val_documents(store, "small", build.split, tokenizer.decode_bytes)
        return building.finish_build(store, build, {})

    manifest = place.examples["manifest"].rpartition("/")[2].removesuffix(".json")
    for read in (
        lambda: list_source(store, *HUB),
        lambda: pinned_run(store, config),
        lambda: read_leak_report(store, "small", manifest),
        build,
    ):
        with suppress(StorageError):
            read()


def damaged(body: bytes, key: str, whole: int | None, seed: int) -> Any:
    """The object with other bytes in its place, or with a part of it changed."""
    if whole is not None:
        return WHOLE[whole]
    if key.endswith((".bin", ".jsonl")):
        return bytes([*body[:40], 1, *body[41:]])
    return changed(body, random.Random(seed).randrange)


@pytest.mark.parametrize("examples", [30, pytest.param(20_000, marks=pytest.mark.nightly)])
def test_a_damaged_object_is_read_or_reported(pristine: Place, tmp_path: Path, examples: int) -> None:
    place = pristine._replace(folder=tmp_path / "store")

    @settings(max_examples=examples, deadline=None, derandomize=examples < 1_000, database=None)
    @given(
        kind=st.sampled_from(sorted(set(pristine.examples))),
        whole=st.one_of(st.none(), st.integers(0, len(WHOLE) - 1)),
        seed=st.integers(0, 1 << 32),
    )
    def check(kind: str, whole: int | None, seed: int) -> None:
        key = pristine.examples[kind]
        store = fresh(pristine, place)
        body = damaged(bytes(store.read(key).body), key, whole, seed)
        damage(store, key, body)
        if kind == "manifest" and isinstance(body, bytes):  # under its own digest, or it would never be parsed
            overwrite(store, DATASET.manifest(sha256(body)), body)
            overwrite(store, DATASET.latest, json.dumps({"manifest": sha256(body)}).encode())
        check_verbs(place, kind)
        with suppress(StorageError):
            check_functions(place, open_store(str(place.folder)))

    check()


@pytest.mark.parametrize(
    ("kind", "body"), [*((kind, b"{") for kind in ("run", "checkpoint", "manifest", "latest")), ("latest", FOLDER)]
)
def test_one_damaged_object_hides_and_deletes_nothing_else(
    pristine: Place, place: Place, kind: str, body: bytes | str
) -> None:
    store = fresh(pristine, place)
    key = pristine.examples[kind]
    damage(store, key, body)
    orphan = DatasetKeys("other").shard("orphan")
    store.put_new(orphan, b"1")
    make_old(store, "")
    before = {listed.key for listed in store.list("")}
    lines = store_status(store)
    assert [line.what for line in lines if line.damaged and key in line.error]
    assert {"run imported", "dataset other"} <= {line.what for line in lines if not line.damaged}
    for verb in (["status"], ["gc", "--delete", "--grace-days", "0.06"]):  # 1.4 hours
        code, message = run_verb(place, verb)
        assert (code, key in message) == (1, True), verb
    assert before - {listed.key for listed in store.list("")} == {orphan}


def test_the_shards_of_a_lost_manifest_are_not_deleted(pristine: Place, place: Place) -> None:
    """Its error advises to delete a damaged one: the next build seals it again from its shards."""
    store = fresh(pristine, place)
    store.delete(pristine.examples["manifest"])
    make_old(store, "")
    before = {listed.key for listed in store.list(DATASET.shards)}
    code, message = run_verb(place, ["gc", "--delete", "--grace-days", "0.06"])
    assert (code, "dataset small" in message) == (1, True)
    assert {listed.key for listed in store.list(DATASET.shards)} == before


@pytest.mark.parametrize("body", [OVERSIZED, b"7", FOLDER])
def test_an_object_is_overwritten_whatever_it_holds(pristine: Place, place: Place, body: Any) -> None:
    store = fresh(pristine, place)
    damage(store, RUN.request, body)
    if body == FOLDER:
        with pytest.raises(ObjectCorrupt, match="folder"):
            overwrite(store, RUN.request, b"{}")
    else:
        overwrite(store, RUN.request, b"{}")
        assert store.read(RUN.request).body == b"{}"


def test_a_lost_object_and_a_damaged_request_are_reported_with_a_remedy(pristine: Place, place: Place) -> None:
    for kind, argv, remedy in (
        ("parent", ["dataset", "log"], "gpt2 dataset copy"),
        ("manifest", ["report", "--to", "a.md"], "gpt2 dataset copy"),
        ("record", ["dataset", "show"], "gpt2 dataset verify --repair"),
    ):
        fresh(pristine, place).delete(pristine.examples[kind])
        code, message = run_verb(place, argv)
        assert (code, pristine.examples[kind] in message, remedy in message) == (2, True, True), message
    store = fresh(pristine, place)
    request = json.loads(store.read(RUN.request).body)
    overwrite(store, RUN.request, canonical_json(request | {"train": request["train"] | {"start_from": -1}}))
    code, message = run_verb(place, ["retry", "tiny"])
    assert (code, RUN.request in message, "Delete that object" in message) == (2, True, True), message


def test_a_damaged_evaluation_is_made_again(pristine: Place, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fresh(pristine, place)
    key = place.examples["evaluation"]
    value = json.loads(store.read(key).body)
    job = read_job(store, RUN.job(value["job"]))
    results: list[Any] = []
    monkeypatch.setattr(Processes, "run", lambda *_: results.append(read_result(store, job)))
    assert evaluate.evaluate_checkpoint.fn(job, Processes(store.url)).data["name"] == value["name"]
    overwrite(store, key, canonical_json(value | {"tokens": "many"}))
    with disable_run_logger(), pytest.raises(JobFailed):
        evaluate.evaluate_checkpoint.fn(job, Processes(store.url))
    assert results == [None]


def test_a_build_without_missing_shards_deletes_failure_notes(pristine: Place, place: Place) -> None:
    store = fresh(pristine, place)
    assert records.failures(store, "small")
    check_functions(place, store)
    assert records.failures(store, "small") == {}


def test_a_damaged_lease_is_reported_by_a_build(pristine: Place, place: Place) -> None:
    store = fresh(pristine, place)
    damage(store, DATASET.lease, b"[]")
    with pytest.raises(ObjectCorrupt, match="lease"):
        claim(store, "small", "build")

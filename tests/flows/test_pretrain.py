"""The pipeline under Prefect: five linked stages, artifacts, skipped work, and evaluations that fail alone."""

import json
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows import train
from flows.handoffs import Reported
from flows.inspection.status import run_status
from flows.pretrain import evaluate_and_report, pretrain
from model.__main__ import run_job
from model.config import RunConfig
from model.runs.job import JobRefused, put_job
from model.runs.run import find_run, pin_run, training_job
from storage.errors import ObjectMissing, SourceInvalid
from storage.keys import DatasetKeys, RunKeys
from storage.stores.opening import open_store
from tests.flows.client import NO_CERTIFICATES, call_api
from tests.flows.trackers import import_path, install, sent_steps
from tests.making import build_dataset, build_other, document, read_json, tiny_config, write_parquet
from tests.polling import poll


def newest_run(api: str, name: str) -> str:
    """The id of the newest flow run of that name."""
    body = {"flow_runs": {"name": {"any_": [name]}}, "sort": "START_TIME_DESC", "limit": 1}
    return str(call_api(api, "/flow_runs/filter", body)[0]["id"])


def children(api: str, flow_run: str) -> list[dict[str, Any]]:
    """The nodes of a run's graph, in the order they started."""
    return [node for _, node in call_api(api, f"/flow_runs/{flow_run}/graph-v2")["nodes"]]


def task_states(api: str, flow_run: str) -> dict[str, str]:
    """State names of a flow run's tasks, once all have ended."""

    def ended() -> dict[str, str] | None:
        runs = call_api(api, "/task_runs/filter", {"flow_runs": {"id": {"any_": [flow_run]}}, "limit": 200})
        final = all((run["state"] or {}).get("type") in {"COMPLETED", "FAILED", "CRASHED"} for run in runs)
        return {run["name"]: run["state"]["name"] for run in runs} if runs and final else None

    names: dict[str, str] = poll(ended)
    return names


@pytest.fixture(scope="module")
def finished(api: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RunConfig, Reported]]:
    """A finished run, and the result of its flow."""
    folder = tmp_path_factory.mktemp("finished")
    for index in range(2):
        write_parquet(folder / "source" / f"file_{index}.parquet", [document(index * 40 + n, 90) for n in range(40)])
    ours = ("resources.concurrent_evaluations=3", "resources.tracker=trackio:small-models")
    config = tiny_config(str(folder / "store"), str(folder / "source" / "*.parquet"), *ours)
    install(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", import_path(folder))
        yield config, pretrain(config)


def test_the_tracker_has_every_step(finished: tuple[RunConfig, Any]) -> None:
    assert sent_steps(Path(finished[0].store_url).parent, "tiny") == list(range(1, 13))


def test_the_graph_is_a_chain_of_five_stages(api: str, finished: tuple[RunConfig, Any]) -> None:
    nodes = children(api, newest_run(api, "pretrain-tiny"))
    assert [node["label"].split(" / ")[0] for node in nodes] == ["download", "tokenise", "train", "evaluate", "report"]
    for before, after in pairwise(nodes):
        assert before["id"] in {parent["id"] for parent in after["parents"]}, after["label"]


def test_each_shard_and_each_evaluation_is_a_task(api: str, finished: tuple[RunConfig, Any]) -> None:
    stages = {node["label"].split(" / ")[0]: node["id"] for node in children(api, newest_run(api, "pretrain-tiny"))}
    tokenised = task_states(api, stages["tokenise"])
    store = open_store(finished[0].store_url)
    shard_keys = [listed.key for listed in store.list(DatasetKeys("small").shards) if listed.key.endswith(".bin")]
    assert sum(name.startswith("shard-") for name in tokenised) == len(shard_keys) > 5
    assert set(task_states(api, stages["evaluate"])) == {"val_loss-12", "completion-12", "samples-12"}
    assert set(tokenised.values()) == {"Completed"}


def test_artifacts_show_progress_shards_and_report(api: str, finished: tuple[RunConfig, Any]) -> None:
    artifacts = {artifact["key"]: artifact for artifact in call_api(api, "/artifacts/latest/filter", {})}
    assert {"shard-status", "dataset-manifest", "evaluations", "report"} <= set(artifacts)
    assert {artifacts[key]["type"] for key in ("shard-status", "evaluations")} == {"table"}


def test_the_page_of_the_run_shows_the_whole(api: str, finished: tuple[RunConfig, Any]) -> None:
    query = {"artifacts": {"flow_run_id": {"any_": [newest_run(api, "pretrain-tiny")]}}}
    [page] = call_api(api, "/artifacts/filter", query)
    text = page["data"]
    assert re.findall(r"^\| (\w+) \| done \|", text, re.MULTILINE) == [
        "download",
        "tokenise",
        "train",
        "evaluate",
        "report",
    ]
    assert "| train | done | 12 of 12 steps |" in text
    assert "data:image/svg+xml;base64," in text
    assert "| val_loss_t32 |" in text
    assert "train.max_steps=12" in text
    for name in ("Report", "Dataset card"):
        [link] = re.findall(rf"\[{name}\]\((.*?)\)", text)
        answer = httpx.get(link, verify=NO_CERTIFICATES)  # without the login
        assert (answer.status_code, "<title>" in answer.text) == (200, True)
        assert "sandbox" in answer.headers["Content-Security-Policy"]
        forged = httpx.get(link.replace("signature=", "signature=0"), verify=NO_CERTIFICATES)
        assert forged.status_code == 404


def test_the_report_is_one_page_that_loads_nothing(finished: tuple[RunConfig, Reported]) -> None:
    config, reported = finished
    page = open_store(config.store_url).read(RunKeys("tiny").report("html")).body.decode()
    titles = re.findall("<figcaption>(.*?)</figcaption>", page)
    assert titles == ["Loss", "Learning rate", "Gradient norm", "Speed"]  # the other metrics have one point
    assert "val_loss_t32" in page
    assert reported.dataset is not None
    assert reported.dataset.version.digest in page
    loaded = [part for part in page.split('"') if part.startswith(("http://", "https://"))]
    assert [address for address in loaded if "w3.org" not in address] == []  # XML namespaces
    assert "Content-Security-Policy" in page
    assert "completion_acc_norm" in open_store(config.store_url).read(RunKeys("tiny").report("md")).body.decode()


def test_a_repeated_run_does_nothing_and_returns_the_same_result(api: str, finished: tuple[RunConfig, Any]) -> None:
    config, reported = finished
    assert pretrain(config) == reported
    stages = {node["label"].split(" / ")[0]: node["id"] for node in children(api, newest_run(api, "pretrain-tiny"))}
    assert set(task_states(api, stages["train"]).values()) == {"Skipped"}
    assert set(task_states(api, stages["evaluate"]).values()) == {"Skipped"}
    assert [node for node in children(api, stages["tokenise"]) if node["label"].startswith("shard-")] == []


@pytest.mark.full
def test_a_failed_evaluation_leaves_the_others_and_the_report(tmp_path: Path, api: str) -> None:
    short = write_parquet(
        tmp_path / "short.parquet", [document(number, 30) for number in range(120)]
    )  # too short for items
    config = tiny_config(str(tmp_path / "store"), str(short), "name=short")
    manifest, store = build_dataset(config), open_store(config.store_url)
    assert run_job(store.url, put_job(store, training_job(pin_run(store, config, manifest.digest, None)))) == 0
    with pytest.raises(JobRefused, match="completion set needs 4 val documents"):
        evaluate_and_report(config)
    states = task_states(api, newest_run(api, "evaluate-short"))
    expected = {"val_loss-12": "Completed", "completion-12": "Failed", "samples-12": "Completed"}
    assert states.items() >= expected.items()
    assert "val_loss_t32" in store.read(RunKeys("short").report("html")).body.decode()
    assert [line.what.strip() for line in run_status(store, "short") if line.error] == ["completion"]
    with pytest.raises(JobRefused):  # only the failed evaluation is repeated
        evaluate_and_report(config)
    again = task_states(api, newest_run(api, "evaluate-short"))
    assert again.items() >= {"val_loss-12": "Skipped", "completion-12": "Failed", "samples-12": "Skipped"}.items()


@pytest.mark.usefixtures("evaluating_here")
@pytest.mark.full
def test_a_mix_needs_its_other_datasets_sealed_before_anything_is_built(
    tmp_path: Path, api: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = write_parquet(tmp_path / "long.parquet", [document(number, 90) for number in range(40)])
    config = tiny_config(str(tmp_path / "store"), str(long), "name=mixed", 'train.mix=["small:8", "code:2"]')
    with pytest.raises(ObjectMissing, match="'code'"):
        pretrain(config)
    store = open_store(config.store_url)
    assert list(store.list(DatasetKeys("small").prefix)) == []
    build_other(config.store_url, "code", range(100, 130))
    said: list[str] = []
    monkeypatch.setattr(train, "say", lambda _, text: said.append(text))
    reported = pretrain(config)
    assert "code 20 %, small 80 %" in said[0]  # the weights are normalised
    val_losses = {name for result in reported.evaluations for name in result.metrics if name.startswith("val_loss")}
    assert val_losses == {"val_loss_code_t32", "val_loss_small_t32", "val_loss_mix_t32"}


@pytest.mark.usefixtures("evaluating_here")
@pytest.mark.full
def test_hellaswag_items_are_mirrored_and_scored_under_their_own_name(tmp_path: Path, api: str, source: str) -> None:
    parts = {"ctx": "The cat sat", "activity_label": "Cats", "ctx_a": "The cat sat", "ctx_b": "", "label": 1}
    item = json.dumps(parts | {"endings": ["on the mat.", "in a tree.", "by day.", "at sea."]}) + "\n"
    (tmp_path / "items.jsonl").write_text(item * 3)
    config = tiny_config(str(tmp_path / "store"), source, f"evaluation.hellaswag={tmp_path / 'items.jsonl'}")
    reported = pretrain(config)
    assert [evaluation.name for evaluation in reported.evaluations] == ["val_loss", "hellaswag", "samples"]
    store = open_store(config.store_url)
    run = find_run(store, "tiny")
    assert run.items is not None
    assert store.read(run.items).body == item.encode() * 3
    assert {listed.key.rpartition("/")[2] for listed in store.list(RunKeys("tiny").evaluations + f"{12:06d}/")} == {
        "val_loss.json", "hellaswag.json", "hellaswag.items.parquet", "samples.json",
    }  # fmt: skip
    (tmp_path / "items.jsonl").write_text(item * 2)  # corrected in place
    pretrain(config)
    kept = read_json(store, RunKeys("tiny").evaluation(12, "hellaswag")) or {}
    assert kept["items"] == 2
    (tmp_path / "items.jsonl").unlink()  # the run uses its mirror
    assert pretrain(config) == reported
    (tmp_path / "items.jsonl").write_text(item[:-9])
    with pytest.raises(SourceInvalid, match="line 1 should be a HellaSwag item"):  # before training
        pretrain(config.model_copy(update={"name": "other"}))

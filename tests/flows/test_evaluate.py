"""Evaluations under Prefect: every checkpoint, changed settings, a killed process, imported models; reports."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from flows.console import cli
from flows.inspection.facts import REFERENCES, references, run_facts
from flows.inspection.status import run_status
from flows.pages.run_report import markdown, page
from flows.pretrain import evaluate_and_report
from flows.runtime import processes
from model.__main__ import run_job
from model.checkpoints.records import checkpoints
from model.config import RunConfig
from model.evaluation.results import Evaluation
from model.runs.job import JobFailed, put_job
from model.runs.run import pin_run, training_job
from storage.datasets.manifest import Manifest
from storage.errors import ObjectMissing
from storage.keys import RunKeys
from storage.stores.opening import open_store
from tests.flows.client import call_api
from tests.making import build_dataset, document, read_json, tiny_config, write_parquet
from tests.polling import poll

ROOT = Path(__file__).parent.parent.parent
PREFECT = str(Path(sys.executable).with_name("prefect"))
# A job's process that kills itself during validation
KILLED = """
import os, signal, sys
from datetime import UTC, datetime
from model import __main__
from model.evaluation import jobs

def kill(*_):
    print("killed at", datetime.now(UTC).isoformat(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

jobs.KINDS["val_loss"] = kill
sys.exit(__main__.main())
"""


def trained(folder: Path, *overrides: str) -> tuple[RunConfig, Manifest]:
    """A run of 12 steps with checkpoints of steps 4, 8 and 12, and its dataset."""
    texts = [document(number, 90) for number in range(80)]
    source = write_parquet(folder / "source" / "file.parquet", texts)
    config = tiny_config(str(folder / "store"), str(source), "resources.concurrent_evaluations=2", *overrides)
    manifest = build_dataset(config)
    store = open_store(config.store_url)
    job = training_job(pin_run(store, config, manifest.digest, None))
    assert run_job(store.url, put_job(store, job)) == 0
    return config, manifest


def newest_task(api: str, task: str, state: str) -> dict[str, Any]:
    """The newest run of the task, once it has this state."""
    query = {"task_runs": {"name": {"any_": [task]}}, "sort": "EXPECTED_START_TIME_DESC", "limit": 1}

    def task_run() -> dict[str, Any] | None:
        [newest] = call_api(api, "/task_runs/filter", query)
        return newest if newest["state_name"] == state else None

    newest: dict[str, Any] = poll(task_run)
    return newest


def changed(config: RunConfig, **evaluation: Any) -> RunConfig:
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update=evaluation)})


def items(path: Path, count: int = 6) -> str:
    """A file of HellaSwag items."""
    parts = {"ctx": "The model learns", "activity_label": "Learning", "ctx_a": "The model", "ctx_b": "learns"}
    endings = ["to write text.", "one token after another.", "because", "the of a"]
    path.write_text("\n".join(json.dumps(parts | {"endings": endings, "label": n % 4}) for n in range(count)))
    return str(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return trained(tmp_path_factory.mktemp("run"))[0]


@pytest.mark.usefixtures("evaluating_here")
@pytest.mark.full
def test_every_kept_checkpoint_is_evaluated_and_plotted(api: str, run: RunConfig, tmp_path: Path) -> None:
    """The run is not pinned to HellaSwag items, because it was only trained: the evaluation mirrors them."""
    config = changed(run, checkpoint="every", hellaswag=items(tmp_path / "items.jsonl"))
    reported = evaluate_and_report(config)
    store = open_store(run.store_url)
    listed_names = {listed.key.rpartition("evaluations/")[2] for listed in store.list(RunKeys("tiny").evaluations)}
    names = ("val_loss.json", "hellaswag.json", "hellaswag.items.parquet", "samples.json")
    assert listed_names == {f"{step:06d}/{name}" for step in (4, 8, 12) for name in names}
    assert [evaluation.step for evaluation in reported.evaluations if evaluation.name == "hellaswag"] == [4, 8, 12]
    facts = run_facts(store, "tiny")
    assert [evaluation.step for evaluation in facts.evaluations if evaluation.name == "hellaswag"] == [4, 8, 12]
    assert [evaluation.step for evaluation in facts.samples] == [12, 8, 4]
    text = store.read(RunKeys("tiny").report("html")).body.decode()
    for part in ("hellaswag_harness", "step 4,", "step 8,", "6 items, 5 of them repeated", "0.3114", "harness style"):
        assert part in text
    assert "3.2924" not in text  # the published value for another window length
    lines = {line.what.strip(): line.state for line in run_status(store, "tiny")}
    assert lines["hellaswag"] == lines["val_loss"] == "done, earlier checkpoints done: 2"


@pytest.mark.usefixtures("evaluating_here")
@pytest.mark.full
def test_a_named_checkpoint_is_evaluated_alone_and_a_missing_one_is_refused(api: str, run: RunConfig) -> None:
    reported = evaluate_and_report(changed(run, checkpoint="8", validation_tokens=320))
    assert [evaluation.step for evaluation in reported.evaluations if "val_loss_t32_of_320" in evaluation.metrics] == [
        8
    ]
    with pytest.raises(ObjectMissing, match=r"checkpoint = '5'.*steps 4, 8, 12"):
        evaluate_and_report(changed(run, checkpoint="5"))


@pytest.mark.usefixtures("evaluating_here")
@pytest.mark.nightly
def test_an_evaluation_reruns_when_settings_change_and_when_they_change_back(api: str, run: RunConfig) -> None:
    def prompts(config: RunConfig) -> set[str]:
        evaluate_and_report(config)
        stored = read_json(open_store(run.store_url), RunKeys("tiny").evaluation(12, "samples")) or {}
        return {sample["prompt"] for sample in stored["samples"]}  # type: ignore[union-attr,index,call-overload]

    first, other = changed(run, prompts=("One",)), changed(run, prompts=("Two", ""))
    assert [prompts(config) for config in (first, other, first)] == [{"One"}, {"Two", ""}, {"One"}]


@pytest.mark.full
def test_a_killed_evaluation_fails_at_once_with_its_last_lines_and_its_retry_succeeds(
    api: str, run: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed: list[str] = []
    start = processes._start

    def start_killed(argv: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
        if "val_loss" in argv[4] and not killed:
            killed.append(argv[4])
            argv = [argv[0], "-c", KILLED, *argv[3:]]
        return start(argv, environment)

    monkeypatch.setattr(processes, "_start", start_killed)
    config, store = changed(run, checkpoint="4", validation_tokens=64), open_store(run.store_url)
    before = read_json(store, RunKeys("tiny").evaluation(4, "val_loss"))  # from another test, or None
    with pytest.raises(JobFailed, match=r"val_loss of step 4: .*signal 9.*\n.*1 process on cpu") as failed:
        evaluate_and_report(config)
    killed_at = re.search(r"killed at (\S+)", str(failed.value))
    assert killed_at is not None
    assert read_json(store, RunKeys("tiny").evaluation(4, "val_loss")) == before
    assert read_json(store, RunKeys("tiny").evaluation(4, "samples")) is not None
    assert "signal 9" in {line.what.strip(): line.error for line in run_status(store, "tiny")}["val_loss"]
    ended = datetime.fromisoformat(newest_task(api, "val_loss-4", "Failed")["end_time"])
    assert ended - datetime.fromisoformat(killed_at[1]) < timedelta(seconds=60)
    body = {"flow_runs": {"name": {"any_": ["evaluate-tiny"]}, "parent_task_run_id": {"is_null_": True}}}
    [newest, *_] = call_api(api, "/flow_runs/filter", body | {"sort": "START_TIME_DESC"})
    assert newest["state_type"] == "FAILED"
    arguments = ["flow-run", "retry", newest["id"], "--entrypoint", "flows/pretrain.py:evaluate_and_report"]
    retried = subprocess.run([PREFECT, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert retried.returncode == 0, retried.stdout + retried.stderr
    assert call_api(api, f"/flow_runs/{newest['id']}")["state_type"] == "COMPLETED"
    assert {line.what.strip(): line.error for line in run_status(store, "tiny")}["val_loss"] == ""
    assert newest_task(api, "val_loss-4", "Completed")["end_time"] > ended.isoformat()
    stored = read_json(store, RunKeys("tiny").evaluation(4, "val_loss")) or {}
    assert "val_loss_t32_of_64" in stored["metrics"], stored  # type: ignore[operator]
    newest_task(api, "samples-4", "Skipped")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"ctx": "x", "endings": ["a", "b"', "line 1 should be a HellaSwag item"),
        (b'{"ctx": "x", "endings": ["a", "b", "c", "d"], "label": 1}', "found activity_label: Field required"),
        (None, "no such file or folder"),
    ],
    ids=["cut", "fields missing", "no file"],
)
@pytest.mark.usefixtures("evaluating_here")
def test_items_that_cannot_be_read_fail_hellaswag_alone(
    api: str, run: RunConfig, tmp_path: Path, body: bytes | None, message: str
) -> None:
    path = tmp_path / "items.jsonl"
    if body is not None:
        path.write_bytes(body)
    with pytest.raises((ValueError, JobFailed), match="hellaswag") as error:
        evaluate_and_report(changed(run, hellaswag=str(path), sample_tokens=5))
    assert message in str(error.value)
    store = open_store(run.store_url)
    stored = read_json(store, RunKeys("tiny").evaluation(12, "samples")) or {}
    assert len(stored["samples"]) == 1  # type: ignore[arg-type]
    assert "samples" in store.read(RunKeys("tiny").report("md")).body.decode().lower()


# Imported models


Gpt2 = Callable[..., tuple[object, str, str]]


@pytest.fixture
def gpt2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Gpt2:
    """A function that runs the console in this process and returns its exit code and output."""

    def run_console(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["gpt2", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        output = capsys.readouterr()
        return ended.value.code, output.out, output.err

    return run_console


def published(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=64)).save_pretrained(folder)
    return folder


@pytest.mark.usefixtures("evaluating_here")
@pytest.mark.full
def test_an_imported_model_is_evaluated_without_a_dataset(api: str, gpt2: Gpt2, tmp_path: Path) -> None:
    folder = published(tmp_path / "my model", 1)
    settings = [f"store_url={tmp_path / 'store'}", f"evaluation.hellaswag={items(tmp_path / 'items.jsonl')}",
                "evaluation.samples=1", "evaluation.sample_tokens=3"]  # fmt: skip
    overrides = [argument for setting in settings for argument in ("--set", setting)]
    code, out, err = gpt2("evaluate", "--model", str(folder), *overrides)
    assert code == 0, (out, err)
    assert "so there is no val loss" in out
    assert "hellaswag_harness_acc_norm" in out
    store = open_store(str(tmp_path / "store"))
    assert checkpoints(store, "my_model")[0].model["context_tokens"] == 64
    assert "A model that was imported" in store.read(RunKeys("my_model").report("md")).body.decode()
    assert run_status(store, "my_model")[0].state == "an imported model"
    code, out, _ = gpt2("evaluate", "--model", str(folder), *overrides)
    assert code == 0
    assert "2 of 2 evaluations done, 0 computed now" in out
    other = published(tmp_path / "other" / "my model", 2)
    code, _, err = gpt2("evaluate", "--model", str(other), *overrides)
    assert code == 2
    assert "holds another model" in err


# Reports


def test_two_runs_share_one_page_that_loads_nothing(
    run: RunConfig, gpt2: Gpt2, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(run.store_url)
    other = run.model_copy(update={"name": "second", "train": run.train.model_copy(update={"seed": 7})})
    manifest = pin_run(store, run, "", None).manifest
    assert run_job(store.url, put_job(store, training_job(pin_run(store, other, manifest, None)))) == 0
    in_store = ["--set", f"store_url={run.store_url}"]
    for name in ("both.html", "both.md"):
        assert gpt2("report", "tiny", "second", *in_store, "--to", str(tmp_path / name))[0] == 0
    html, text = ((tmp_path / name).read_text() for name in ("both.html", "both.md"))
    for part in ("Runs tiny, second", "second: train.seed is 7", "tiny training", "second training"):
        assert part in html
    assert "# Run tiny" in text
    assert "# Run second" in text
    addresses = [part for part in html.split('"') if part.startswith(("http://", "https://"))]
    assert [address for address in addresses if "w3.org" not in address] == []
    code, _, err = gpt2("report", "tiny", "second", *in_store, "--to", str(tmp_path / "both.pdf"))
    assert code == 2
    assert ".html or .md" in err
    monkeypatch.chdir(tmp_path)
    assert gpt2("report", "tiny", "second", *in_store)[0] == 0
    assert (tmp_path / "tiny-second.html").read_bytes() == (tmp_path / "both.html").read_bytes()
    code, _, err = gpt2("report", "none-such", *in_store)
    assert code == 2
    assert "none-such" in err


def test_a_published_value_is_shown_beside_the_same_metric_only(run: RunConfig) -> None:
    facts = run_facts(open_store(run.store_url), "tiny")
    assert facts.dataset is not None
    for metric, source, shown in (
        ("val_loss_t1024", "HuggingFaceFW/fineweb-edu", True),
        ("val_loss_t1024", "files/*.parquet", False),
        ("val_loss_t512", "HuggingFaceFW/fineweb-edu", False),
        ("val_loss_t1024_of_8192", "HuggingFaceFW/fineweb-edu", False),
        ("hellaswag_completion_acc_norm", "anything", True),
    ):
        evaluation = Evaluation(
            name="val_loss", step=12, job="job", environment={}, precision="fp32", data="d", tokens=9,
            metrics={metric: 0.5}, conventions={metric: "c"},
        )  # fmt: skip
        published = references([evaluation], replace(facts.dataset, source=source))
        assert (metric in published) == shown
        changed_facts = replace(facts, evaluations=[evaluation], references=published)
        html = page([changed_facts]).decode()
        assert any(f"{reference.value:.4f}" in html for reference in REFERENCES) == shown
        assert markdown([changed_facts]).count("GPT-2 124M") == shown

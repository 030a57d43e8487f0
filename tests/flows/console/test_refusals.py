"""The verbs in sequence, and the console's messages for bad input. One real process for each exit code except 1."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.console.settings import Settings
from flows.items import mirror_items
from flows.platform import server
from model.checkpoints.records import OPTIMIZER, WEIGHTS, CheckpointRecord, put_checkpoint
from model.config_file import load_config
from storage.datasets.manifest import latest_manifest
from storage.keys import DatasetKeys
from storage.stores.opening import open_store
from storage.stores.store import Store
from tests.damage import flip_bit
from tests.flows.client import gpt2 as start_gpt2
from tests.flows.client import run_gpt2
from tests.flows.in_process import Gpt2
from tests.making import build_dataset, document, write_parquet

TINY = {
    "name": "tiny", "data.dataset": "small", "data.source": "source/*.parquet", "data.shard_tokens": "1000",
    "data.val_shards": "2", "model.layers": "1", "model.heads": "2", "model.width": "16", "model.context_tokens": "32",
    "train.sequence_tokens": "32", "train.micro_batch_sequences": "2", "train.batch_tokens": "256",
    "train.max_steps": "8", "train.warmup_steps": "2", "train.checkpoint_every_steps": "4",
    "evaluation.sample_tokens": "4", "evaluation.samples": "1", "evaluation.completion_items": "8",
    "evaluation.hellaswag": "",
}  # fmt: skip


def settings(**changes: str) -> list[str]:
    """The --set arguments of a tiny run; `data__source` stands for data.source."""
    values = TINY | {name.replace("__", "."): value for name, value in changes.items()}
    return [argument for name, value in values.items() for argument in ("--set", f"{name}={value}")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with two source files."""
    for index in range(2):
        texts = [document(index * 40 + number, 90) for number in range(40)]
        write_parquet(tmp_path / "source" / f"file_{index}.parquet", texts)
    return tmp_path


def write_half(path: Path) -> None:
    body = write_parquet(path, [document(number) for number in range(20)]).read_bytes()
    path.write_bytes(body[: len(body) // 2])


BAD_SOURCES = {
    "no such file": (lambda folder: folder, ["bad.parquet", "no readable file there"]),
    "cut in half": (lambda folder: write_half(folder / "bad.parquet"), ["bad.parquet"]),
    "no text column": (
        lambda folder: pq.write_table(pa.table({"body": ["a"], "id": ["b"]}), folder / "bad.parquet"),
        ["'text'", "body, id", "data.text_column"],
    ),
    "null text": (
        lambda folder: pq.write_table(pa.table({"text": ["a", None]}), folder / "bad.parquet"),
        ["null", "row"],
    ),
    "numbers": (
        lambda folder: pq.write_table(pa.table({"text": [1, 2]}), folder / "bad.parquet"),
        ["int64", "strings"],
    ),
    "empty corpus": (
        lambda folder: pq.write_table(pa.table({"text": pa.array([], pa.string())}), folder / "bad.parquet"),
        ["0 rows"],
    ),
    "too few documents": (
        lambda folder: write_parquet(folder / "bad.parquet", ["one document", "another"]),
        ["data.val_shards = 2", "1 shards"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_SOURCES)
def test_a_bad_source_is_refused_with_its_facts(api: str, gpt2: Gpt2, tmp_path: Path, kind: str) -> None:
    write, facts = BAD_SOURCES[kind]
    write(tmp_path)
    outcome = gpt2("pretrain", *settings(data__source="bad.parquet"), cwd=tmp_path)
    assert outcome.code == 2, outcome
    for fact in facts:
        assert fact in outcome.error
    assert "Traceback" not in outcome.error
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name not in {"bad.parquet", "FORMAT"}]
    assert [path for path in files if not {".gpt2", "plans"}.intersection(path.parts)] == []


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["--set", "store_url=taken"], ["'taken'"]),
        (["--set", "store_url=future"], ["layout 9", "Update"]),
        (["--set", "store_url=gs://bucket"], ["'gs'"]),
        (["--set", "train.max_step=5"], ["train.max_step", "Did you mean train.max_steps?"]),
        (["--set", "train.batch_tokens=100"], ["train.batch_tokens = 100", "Try train.batch_tokens = 128"]),
        (["--set", "resources.processes=3"], ["3 ranks", "Try train.batch_tokens"]),
        (["--set", "model.heads=3"], ["model.width = 16", "model.heads = 3"]),
        (["--set", "train.sequence_tokens=64"], ["model.context_tokens"]),
        (["--set", "train.max_steps=0"], ["train.max_steps", "greater than or equal to 1"]),
        (["--set", 'data.filters=["int_score >"]'], ["int_score >", "Write a column"]),
        (["--set", "evaluation.hellaswag=none.jsonl"], ["none.jsonl", "no such file"]),
        (["--config", "none.toml"], ["none.toml", "gpt2-124m"]),
    ],
)
def test_a_bad_setting_is_refused_before_anything_starts(
    gpt2: Gpt2, folder: Path, arguments: list[str], facts: list[str]
) -> None:
    (folder / "taken").write_text("a file")
    (folder / "future").mkdir()
    (folder / "future" / "FORMAT").write_text('{"layout": 9}')
    outcome = gpt2("pretrain", *settings(), *arguments, cwd=folder)
    assert outcome.code == 2, outcome
    for fact in facts:
        assert fact in outcome.error
    assert "Prefect    http" not in outcome.text
    assert not (folder / "data").exists()


def prepare(folder: Path, what: str) -> None:
    """Make an empty store, with the dataset, or with it and a run "parent" that has a checkpoint of step 4."""
    config = load_config(None, [f"store_url={folder}/data", *settings()[1::2], f"data.source={folder}/source"])
    store = open_store(config.store_url, create=True)
    if what != "nothing":
        build_dataset(config)
    if what == "a parent":
        record = CheckpointRecord(4, "train-x", config.model.model_dump(), {})
        put_checkpoint(store, "parent", {WEIGHTS: b"", OPTIMIZER: b""}, record)


@pytest.mark.parametrize(
    ("verb", "there", "changes", "facts"),
    [
        ("train", "nothing", [], ["no sealed version", "gpt2 dataset build"]),
        ("train", "a dataset", ["train.start_from=nobody"], ["train.start_from", "nobody"]),
        ("train", "a parent", ["train.start_from=parent", "model.width=32"], ["train.start_from", "model.width is 16"]),
        ("train", "a dataset", ["resources.tracker=comet"], ["resources.tracker = 'comet'", "trackio, wandb, mlflow"]),
        ("pretrain", "nothing", ["train.start_from=nobody"], ["train.start_from", "nobody", "gpt2 import"]),
        ("pretrain", "a dataset", ["data.text_column=body"], ["text_column is", "data.dataset"]),
        ("pretrain", "nothing", ["data.source=none/*.jsonl"], ["data.source", "none/*.jsonl"]),
        ("dataset build", "nothing", ["data.source=empty"], ["data.source", "no readable file there"]),
        ("dataset build", "nothing", ["evaluation.hellaswag=none.jsonl", "resources.audit=true"], ["none.jsonl"]),
        ("dataset audit", "a dataset", ["evaluation.hellaswag=none.jsonl"], ["evaluation.hellaswag", "none.jsonl"]),
        ("dataset audit", "nothing", [], ["no sealed version"]),
        ("evaluate", "a dataset", [], ["'tiny'", "no checkpoint", "gpt2 train"]),
        ("evaluate", "a parent", ["name=parent", "evaluation.checkpoint=9"], ["evaluation.checkpoint", "steps 4"]),
        ("evaluate", "a parent", ["name=parent", "evaluation.hellaswag=none.jsonl"], ["evaluation.hellaswag"]),
    ],
)
def test_a_missing_input_is_refused_before_a_server_starts(
    gpt2: Gpt2, folder: Path, verb: str, there: str, changes: list[str], facts: list[str]
) -> None:
    prepare(folder, there)
    (folder / "taken").write_text("a file")
    (folder / "empty").mkdir()
    outcome = gpt2(*verb.split(), *settings(), *(word for change in changes for word in ("--set", change)), cwd=folder)
    assert outcome.code == 2, outcome
    for fact in facts:
        assert fact in outcome.error
    assert "PREFECT_API_URL" not in outcome.error  # no server answers there
    assert not {"evaluation.hellaswag", "data.source"} <= set(re.findall(r"[a-z_]+\.[a-z_]+", outcome.error))


def test_a_folder_that_cannot_be_used_is_named(gpt2: Gpt2, folder: Path) -> None:
    prepare(folder, "nothing")
    (folder / ".gpt2").write_text("a file")
    outcome = gpt2("demo", cwd=folder)
    assert (outcome.code, "Traceback" in outcome.text) == (1, False)
    assert ".gpt2" in outcome.error


def test_a_missing_file_of_items_does_not_blame_the_source(store: Store) -> None:
    """In a flow too, which a deployment starts without the checks of the console."""
    with pytest.raises(ValueError, match=r"evaluation\.hellaswag = 'none.jsonl'") as caught:
        mirror_items.fn("none.jsonl", store.url)
    assert "data.source" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "package", "extra"),
    [("resources.runner=dask", "prefect_dask", "dask"), ("resources.tracker=wandb:mine", "wandb", "wandb")],
)
def test_a_missing_package_is_refused_before_a_server_starts(
    gpt2: Gpt2, folder: Path, monkeypatch: pytest.MonkeyPatch, changes: str, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    outcome = gpt2("pretrain", *settings(), "--set", changes, cwd=folder)
    assert (outcome.code, f"pip install -e '.[{extra}]'" in outcome.error) == (2, True), outcome
    assert not (folder / "data").exists()


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["bootstrap"], "PREFECT_API_URL contains a password"),
        (["train", "mine", "s3://key:sekret@bucket"], "unexpected"),
        (["train", "--set", "s3://key:se/kret@bucket"], "value is missing"),
        (["dataset", "copy", "--to", "s3://key:se/kret@bucket"], "credentials"),
        (["dataset", "pull", "s3://key:se/kret@bucket", "mine"], "OWNER/NAME"),
        (["status", "--set", "data.source=s3://key:sekret@bucket"], "data.source"),
        (["import", "s3://key:se/kret@bucket/model", "mine"], "s3://…@bucket/model"),  # a Path has only one "/"
        (["status", "--config", "s3://key:sekret@bucket"], "--config"),
    ],
)
def test_no_message_contains_the_password_of_a_url(
    gpt2: Gpt2, folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], fact: str
) -> None:
    prepare(folder, "nothing")
    monkeypatch.setenv("PREFECT_API_URL", "http://user:sekret@127.0.0.1:1/api")
    outcome = gpt2(*arguments, cwd=folder)
    assert (outcome.code, fact in outcome.error, "kret" in outcome.text) == (2, True, False), outcome


@pytest.mark.full
def test_the_verbs_in_sequence(api: str, gpt2: Gpt2, folder: Path) -> None:
    outcome = gpt2("train", *settings(), cwd=folder)
    assert (outcome.code, "'./data'" in outcome.error) == (2, True)
    outcome = gpt2("dataset", "build", *settings(), cwd=folder)
    assert outcome.code == 0, outcome
    store = open_store(str(folder / "data"))
    assert json.loads(bytes(store.read("FORMAT").body)) == {"layout": 1}
    manifest = latest_manifest(store, "small")
    assert manifest is not None
    shards = len(manifest.shard_ids)
    assert f"{shards} of {shards} shards done" in outcome.out
    outcome = gpt2("evaluate", *settings(), cwd=folder)
    assert (outcome.code, "gpt2 train" in outcome.error) == (2, True)
    outcome = gpt2("train", *settings(), cwd=folder)
    assert outcome.code == 0, outcome
    assert "8 of 8 steps" in outcome.out
    outcome = gpt2("status", "tiny", cwd=folder)
    assert outcome.code == 0
    states = dict(line.split()[:2] for line in outcome.out.splitlines())
    assert (states["train"], states["val_loss"]) == ("done", "missing")
    outcome = gpt2("evaluate", *settings(), cwd=folder)
    assert outcome.code == 0, outcome
    assert "val_loss_t32" in outcome.out
    outcome = gpt2("generate", "--prompt", "The model", *settings(), cwd=folder)
    assert outcome.code == 0, outcome
    assert outcome.out.startswith("The model")
    assert gpt2("generate", "--prompt", "The model", *settings(), cwd=folder).out == outcome.out
    outcome = gpt2("status", "other", cwd=folder)
    assert (outcome.code, "tiny" in outcome.error) == (2, True)
    outcome = gpt2("pretrain", *settings(train__learning_rate="1e-3"), cwd=folder)
    assert outcome.code == 2
    for fact in ("train.learning_rate", "0.0006", "0.001"):
        assert fact in outcome.error


@pytest.mark.full
def test_a_flipped_byte_is_named_and_repaired(api: str, gpt2: Gpt2, folder: Path) -> None:
    assert gpt2("dataset", "build", *settings(), cwd=folder).code == 0
    store = open_store(str(folder / "data"))
    manifest = latest_manifest(store, "small")
    assert manifest is not None
    row = list(manifest.rows("train"))[-1]
    path = store.local_path(DatasetKeys("small").shard(row.shard_id))
    assert path is not None
    intact = path.read_bytes()
    flip_bit(store, DatasetKeys("small").shard(row.shard_id), 10)
    code, text = run_gpt2("pretrain", *settings(), cwd=folder, api=api)  # a real process, which ends with a message
    assert (code, "Traceback" in text) == (2, False), text
    for fact in (row.shard_id, row.sha256, "gpt2 dataset verify --repair"):
        assert fact in text
    outcome = gpt2("dataset", "verify", *settings(), cwd=folder)
    assert (outcome.code, row.shard_id in outcome.out) == (1, True)
    outcome = gpt2("dataset", "verify", "--repair", *settings(), cwd=folder)
    assert outcome.code == 0, outcome
    assert path.read_bytes() == intact
    assert latest_manifest(store, "small") == manifest
    assert gpt2("dataset", "verify", *settings(), cwd=folder).code == 0


def test_doctor_gives_verdicts_with_remedies(gpt2: Gpt2, folder: Path) -> None:
    outcome = gpt2("doctor", cwd=folder)
    assert outcome.code == 0, outcome
    assert "conditions" in outcome.out
    (folder / "taken").write_text("")
    outcome = gpt2("doctor", "--set", "store_url=taken", cwd=folder)
    assert (outcome.code, "bad" in outcome.out, "'taken'" in outcome.out) == (1, True, True)


def test_serve_refuses_a_port_in_use(gpt2: Gpt2, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HOME", folder / ".gpt2")  # the folder of the tests' server has one already
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        outcome = gpt2("serve", "--port", str(port), cwd=folder)
    assert outcome.code == 2
    assert str(port) in outcome.error
    assert "gpt2 serve --port" in outcome.error


def test_a_demo_of_too_many_minutes_is_refused(gpt2: Gpt2, tmp_path: Path) -> None:
    """Its number of steps would be a parameter of over 64 bits of a flow run."""
    outcome = gpt2("demo", "--minutes", "9" * 30, cwd=tmp_path)
    assert (outcome.code, "minutes" in outcome.error, list(tmp_path.iterdir())) == (2, True, []), outcome


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't start new thread")])
def test_a_lack_of_memory_ends_in_words(gpt2: Gpt2, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def load(_: Settings) -> None:
        raise error

    monkeypatch.setattr(Settings, "new", load)
    outcome = gpt2("status")
    assert (outcome.code, "resources.workers=1" in outcome.error, "Traceback" in outcome.err) == (1, True, False)


def test_every_verb_has_help(gpt2: Gpt2) -> None:
    for group in ([], ["dataset"]):
        listed = gpt2(*group, "--help").out
        verbs = re.findall(r"^│ ([a-z]+) ", listed, re.MULTILINE)
        assert len(verbs) > 8
        for verb in verbs:
            outcome = gpt2(*group, verb, "--help")
            assert (outcome.code, len(outcome.out.splitlines()) > 8) == (0, True), verb
            assert "[ARGS" not in outcome.out  # but the name of the argument


def test_without_arguments_the_help_names_the_first_command(tmp_path: Path) -> None:
    """A real process: the console script itself."""
    code, text = run_gpt2("--help", cwd=tmp_path)
    assert (code, "gpt2 demo" in text) == (0, True)


def test_ctrl_c_ends_a_verb_with_130_and_a_message(tmp_path: Path) -> None:
    """The configuration is a named pipe: opening it waits for the process to read, which then waits for its end."""
    os.mkfifo(tmp_path / "config.toml")
    process = start_gpt2("status", "--config", "config.toml", cwd=tmp_path)
    with (tmp_path / "config.toml").open("w"):
        for _ in range(10):  # a signal just before the read starts does not interrupt it
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(6)
                break
    text, _ = process.communicate()
    assert (process.returncode, "Traceback" in text) == (130, False), text
    assert "run the same command again" in text

"""The console as people use it: what each verb says, and what it says when the input is bad."""

import json
import socket
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage.datasets.manifest import latest_manifest
from storage.keys import DatasetKeys
from storage.stores.opening import open_store
from tests.flows.client import run_gpt2
from tests.making import document, write_parquet

TINY = {
    "name": "tiny", "data.dataset": "small", "data.source": "source/*.parquet", "data.shard_tokens": "1000",
    "data.val_shards": "2", "model.layers": "1", "model.heads": "2", "model.width": "16", "model.context_tokens": "32",
    "train.sequence_tokens": "32", "train.micro_batch_sequences": "2", "train.batch_tokens": "256",
    "train.max_steps": "8", "train.warmup_steps": "2", "train.checkpoint_every_steps": "4",
    "evaluation.sample_tokens": "4", "evaluation.samples": "1", "evaluation.completion_items": "8",
    "evaluation.hellaswag": "",
}  # fmt: skip


def settings(**changes: str) -> list[str]:
    """The --set words of a tiny run, with `data__source` for data.source."""
    values = TINY | {name.replace("__", "."): value for name, value in changes.items()}
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with two source files."""
    for index in range(2):
        texts = [document(index * 40 + number, 90) for number in range(40)]
        write_parquet(tmp_path / "source" / f"file_{index}.parquet", texts)
    return tmp_path


def half(path: Path) -> None:
    whole = write_parquet(path, [document(number) for number in range(20)]).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


BAD_SOURCES = {
    "no such file": (lambda folder: folder, ["bad.parquet", "no such file", "Give"]),
    "cut in half": (lambda folder: half(folder / "bad.parquet"), ["bad.parquet", "fetch it again"]),
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
        ["without a single row"],
    ),
    "too few documents": (
        lambda folder: write_parquet(folder / "bad.parquet", ["one document", "another"]),
        ["data.val_shards = 2", "1 shards"],
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind == "no text column" else pytest.param(kind, marks=pytest.mark.full)  # 8 s each
        for kind in BAD_SOURCES
    ],
)
def test_a_bad_source_is_refused_in_words(api: str, tmp_path: Path, kind: str) -> None:
    make, words = BAD_SOURCES[kind]
    make(tmp_path)
    code, said = run_gpt2("pretrain", *settings(data__source="bad.parquet"), cwd=tmp_path, api=api)
    assert code == 2, said
    for word in words:
        assert word in said.partition("error:")[2]
    assert "Traceback" not in said
    left = [path for path in tmp_path.rglob("*") if path.is_file() and path.name not in {"bad.parquet", "FORMAT"}]
    assert [path for path in left if not {".gpt2", "plans"}.intersection(path.parts)] == []


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        (["--set", "store_url=taken"], ["'taken'", "found a file"]),
        (["--set", "store_url=future"], ["layout is 9", "Update"]),
        (["--set", "store_url=gs://bucket"], ["'gs'"]),
        (["--set", "train.max_step=5"], ["train.max_step", "Did you mean train.max_steps?"]),
        (["--set", "train.batch_tokens=100"], ["train.batch_tokens = 100", "Try train.batch_tokens = 128"]),
        (["--set", "resources.processes=3"], ["3 ranks", "Try train.batch_tokens"]),
        (["--set", "model.heads=3"], ["model.width = 16", "model.heads = 3"]),
        (["--set", "train.sequence_tokens=64"], ["model.context_tokens"]),
        (["--set", "train.max_steps=0"], ["train.max_steps", "greater than or equal to 1"]),
        (["--set", 'data.filters=["int_score >"]'], ["int_score >", "Write a column"]),
        (["--set", "evaluation.hellaswag=none.jsonl"], ["none.jsonl", "no such file"]),
        (["--config", "none.toml"], ["none.toml", "deploy/configs"]),
    ],
)
def test_a_bad_setting_is_refused_before_anything_starts(folder: Path, words: list[str], facts: list[str]) -> None:
    (folder / "taken").write_text("a file")
    (folder / "future").mkdir()
    (folder / "future" / "FORMAT").write_text('{"layout": 9}')
    code, said = run_gpt2("pretrain", *settings(), *words, cwd=folder)
    assert code == 2, said
    for fact in facts:
        assert fact in said
    assert "Prefect    http" not in said
    assert not (folder / "data").exists()


def test_the_verbs_one_after_the_other(api: str, folder: Path) -> None:
    code, said = run_gpt2("train", *settings(), cwd=folder, api=api)
    assert (code, "does not exist" in said) == (2, True)
    code, said = run_gpt2("dataset", "build", *settings(), cwd=folder, api=api)
    assert code == 0, said
    store = open_store(str(folder / "data"))
    manifest = latest_manifest(store, "small")
    assert manifest is not None
    total = len(manifest.shard_ids)
    assert f"{total} of {total} shards done" in said
    code, said = run_gpt2("evaluate", *settings(), cwd=folder, api=api)
    assert (code, "Train it first: gpt2 train" in said) == (2, True)
    code, said = run_gpt2("train", *settings(), cwd=folder, api=api)
    assert code == 0, said
    assert "8 of 8 steps done" in said
    code, said = run_gpt2("status", "tiny", cwd=folder)
    assert code == 0
    assert [line.split()[1] for line in said.splitlines() if line.split()[0] in {"train", "val_loss"}] == [
        "done",
        "missing",
    ]
    code, said = run_gpt2("evaluate", *settings(), cwd=folder, api=api)
    assert code == 0, said
    assert "val_loss_t32" in said
    code, said = run_gpt2("generate", "--prompt", "The model", *settings(), cwd=folder)
    assert code == 0, said
    assert said.startswith("The model")
    code, again = run_gpt2("generate", "--prompt", "The model", *settings(), cwd=folder)
    assert again == said
    code, said = run_gpt2("status", "other", cwd=folder)
    assert (code, "tiny" in said) == (2, True)
    code, said = run_gpt2("pretrain", *settings(train__learning_rate="1e-3"), cwd=folder, api=api)
    assert code == 2
    assert "train.learning_rate is 0.0006, asked for 0.001" in said


def test_a_flipped_byte_is_found_named_and_repaired(api: str, folder: Path) -> None:
    assert run_gpt2("dataset", "build", *settings(), cwd=folder, api=api)[0] == 0
    store = open_store(str(folder / "data"))
    manifest = latest_manifest(store, "small")
    assert manifest is not None
    row = list(manifest.rows("train"))[-1]
    path = store.local_path(DatasetKeys("small").shard(row.shard_id))
    assert path is not None
    whole = path.read_bytes()
    path.write_bytes(whole[:10] + bytes([whole[10] ^ 1]) + whole[11:])
    code, said = run_gpt2("pretrain", *settings(), cwd=folder, api=api)
    assert code == 2, said
    assert row.shard_id in said
    assert row.sha256 in said
    assert "gpt2 dataset verify --repair" in said
    code, said = run_gpt2("dataset", "verify", *settings(), cwd=folder)
    assert (code, row.shard_id in said) == (1, True)
    code, said = run_gpt2("dataset", "verify", "--repair", *settings(), cwd=folder, api=api)
    assert code == 0, said
    assert path.read_bytes() == whole
    assert latest_manifest(store, "small") == manifest
    assert run_gpt2("dataset", "verify", *settings(), cwd=folder)[0] == 0


def test_doctor_gives_verdicts_with_remedies(folder: Path) -> None:
    code, said = run_gpt2("doctor", cwd=folder)
    assert code == 0, said
    assert "conditions" in said
    (folder / "taken").write_text("")
    code, said = run_gpt2("doctor", "--set", "store_url=taken", cwd=folder)
    assert (code, "bad" in said, "found a file" in said) == (1, True, True)


def test_serve_refuses_a_port_in_use(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, said = run_gpt2("serve", "--port", str(port), cwd=folder)
    assert code == 2
    assert str(port) in said
    assert f"--port {port + 1}" in said


@pytest.mark.parametrize(
    "verb", [[], ["demo"], ["pretrain"], ["dataset", "build"], ["status"], ["generate"], ["serve"]]
)
def test_help_teaches(folder: Path, verb: list[str]) -> None:
    code, said = run_gpt2(*verb, "--help", cwd=folder)
    assert code == 0
    assert len(said.splitlines()) > 5


def test_the_layout_of_a_store_is_written_down(api: str, folder: Path) -> None:
    assert run_gpt2("dataset", "build", *settings(), cwd=folder, api=api)[0] == 0
    assert json.loads((folder / "data" / "FORMAT").read_text()) == {"layout": 1}

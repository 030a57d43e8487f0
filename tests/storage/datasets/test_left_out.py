"""Rows that val must lack are pinned with it: a builder that found other ones seals nothing."""

from dataclasses import replace
from pathlib import Path

import pytest

from model import tokenizer
from storage.datasets import shards
from storage.datasets.manifest import latest_manifest, pinned_left_out, seal
from storage.errors import Conflict
from storage.stores.store import Store
from tests.storage.sealing import SETTINGS, plans_of


def made(store: Store, path: Path, left_out: dict[str, list[int]]) -> list[str]:
    """The file's shards, made without these rows."""
    [plan] = plans_of(path)
    jobs = list(replace(plan, left_out=left_out).jobs())
    for job in jobs:
        shards.build_shard(store, "small", job, tokenizer.encode, tokenizer.EOT)
    return [job.shard_id for job in jobs]


def test_a_builder_that_leaves_out_other_rows_seals_nothing(store: Store, files: list[Path]) -> None:
    """A source file came in between: its first shard would be of val as the other made it, and of train as this did."""
    first = plans_of(files[0])[0].shard_ids[0]
    ours, theirs = {first: [1]}, {first: [1, 4]}
    sealed = seal(store, "small", made(store, files[0], ours), **SETTINGS | {"left_out": ours})
    planned = made(store, files[0], theirs)
    with pytest.raises(Conflict):
        seal(store, "small", planned, **SETTINGS | {"left_out": theirs})
    assert latest_manifest(store, "small") == sealed
    assert pinned_left_out(store, "small") == ours

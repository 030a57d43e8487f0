"""The split of a dataset: which shards are val, and the settings that the dataset's name is bound to.

Both are fixed at the first seal and create-only, so they hold for every later version.
"""

from dataclasses import dataclass
from typing import Any

from storage.digests import canonical_json
from storage.errors import AlreadyExists, Conflict, DatasetMismatch
from storage.keys import DatasetKeys
from storage.stores.store import Store, read_json


@dataclass(frozen=True)
class Split:
    """The val shards in order, and the settings of the first seal."""

    val: list[str]
    bound: dict[str, Any]


def read_split(store: Store, dataset: str) -> Split | None:
    """The dataset's split, or None before its first seal."""
    value: dict[str, Any] | None = read_json(store, DatasetKeys(dataset).split)
    return None if value is None else Split(value["val"], value["bound"])


def pin_split(store: Store, dataset: str, split: Split) -> None:
    """Fix the split. Raises Conflict or DatasetMismatch if another builder fixed a different one first."""
    try:
        store.put_new(DatasetKeys(dataset).split, canonical_json({"val": split.val, "bound": split.bound}))
    except AlreadyExists as error:
        check_binding(store, dataset, split.bound)
        pinned = read_split(store, dataset)
        if pinned is None or pinned.val != split.val:
            val = pinned.val if pinned else []
            raise Conflict(
                f"dataset {dataset!r}: another builder sealed other val shards {val}. Run the command again."
            ) from error


def check_binding(store: Store, dataset: str, binding: dict[str, Any]) -> None:
    """Raise DatasetMismatch if the dataset's name is bound to other settings."""
    split = read_split(store, dataset)
    if split is None or split.bound == binding:
        return
    bound = split.bound
    names = sorted(name for name in bound.keys() | binding.keys() if bound.get(name) != binding.get(name))

    def shown(settings: dict[str, Any], name: str) -> str:
        return repr(settings[name]) if name in settings else "its default"

    differences = "; ".join(f"{name} is {shown(bound, name)}, requested {shown(binding, name)}" for name in names)
    raise DatasetMismatch(
        f"dataset {dataset!r} is bound to the settings of its first build: {differences}. "
        f"Choose another name with --set data.dataset=…, or use the same settings."
    )

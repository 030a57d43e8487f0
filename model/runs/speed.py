"""The speed of micro-batches by size, remembered in the store for each device and model. Imports no torch."""

from collections.abc import Callable
from dataclasses import asdict, field
from typing import Any

from pydantic.dataclasses import dataclass

from model.config import Positive
from storage import keys
from storage.digests import canonical_json, digest
from storage.stores.store import Body, Store, put_once, read_as


@dataclass(frozen=True)
class Speed:
    """The fastest size of micro-batch in a setup. Without timings: the size after a run had run out of memory."""

    setup: dict[str, Any]  # what decides which sizes fit and how fast they are: device, model, batch, versions
    sequences: Positive
    tokens_per_second: float = 0.0  # of all ranks, without the optimizer's step
    timings: dict[int, tuple[float, int]] = field(default_factory=dict)  # by size: seconds of one, peak bytes


def read_speed(store: Store, setup: dict[str, Any]) -> Speed | None:
    """The speed in the setup, or None if it is unknown. Raises ObjectCorrupt if it is damaged."""
    windows = setup["batch_tokens"] // setup["sequence_tokens"] // setup["ranks"]
    key, fits = keys.speed(digest(setup)), (setup, 0)
    return read_as(store, key, Speed, lambda speed: (speed.setup, windows % speed.sequences) == fits)


def put_speed(store: Store, speed: Speed, put: Callable[[Store, str, Body], None] = put_once) -> Speed:
    """Store the speed: unless one is stored, or with `overwrite` in any case. Returns the stored one."""
    put(store, keys.speed(digest(speed.setup)), canonical_json(asdict(speed)))
    return read_speed(store, speed.setup) or speed

"""Finds the last request made under a name, for `gpt2 retry`."""

from pathlib import Path
from typing import NamedTuple

from model.config import RunConfig
from model.config_file import config_of, load_config
from storage.keys import DatasetKeys, RunKeys
from storage.stores.opening import open_store
from storage.stores.store import read_json


class Request(NamedTuple):
    """The configuration of a request, and whether it was for a run or for a dataset alone."""

    config: RunConfig
    is_run: bool


def last_request(name: str, config_file: Path | None, overrides: list[str]) -> Request:
    """The last request for a run or dataset of that name, with `overrides` applied to it.

    Raises ValueError when the store holds no such request.
    """
    # Overrides may fit the request and not the defaults, so only store_url is read here.
    store_override = [override for override in overrides if override.partition("=")[0].strip() == "store_url"]
    store_url = load_config(config_file, store_override).store_url
    store = open_store(store_url)
    for key, is_run in ((RunKeys(name).request, True), (DatasetKeys(name).request, False)):
        request = read_json(store, key)
        if request is not None:
            return Request(config_of(request | {"store_url": store_url}, overrides), is_run)
    raise ValueError(
        f"retry {name!r}: {store_url} holds no request for a run or dataset of that name. "
        f"List its runs and datasets with gpt2 status, or start with gpt2 pretrain or gpt2 dataset build."
    )

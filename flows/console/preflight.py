"""Checks the inputs before Prefect starts: the store, the source, the items file, a run name in use.

Imports no Prefect: that takes 3 s.
"""

from pathlib import Path

from model.config import RunConfig
from model.runs.run import pinned_run
from storage.errors import ObjectMissing
from storage.sources import files as sources
from storage.stores.opening import open_store


def check(config: RunConfig) -> None:
    """Raise ValueError or StorageError when the pipeline cannot start; otherwise create the store."""
    try:
        run = pinned_run(open_store(config.store_url), config)
    except ObjectMissing:
        run = None
    if run is None:
        if not sources.is_on_hub(config.data.source):
            sources.find_files(config.data.source)
        _check_items(config.evaluation.hellaswag)
    open_store(config.store_url, create=True)


def _check_items(items: str) -> None:
    if items and not sources.is_on_hub(items) and not Path(items).is_file():
        raise ValueError(
            f"evaluation.hellaswag = {items!r}: no such file. Give a Hub dataset or a .jsonl or .parquet file of "
            f"items, or leave it empty."
        )

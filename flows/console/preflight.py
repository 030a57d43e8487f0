"""Finds in a moment what would end a flow after Prefect's start: the store, the source, a name that is taken.

Imports no Prefect, which takes 3 s and reads its settings when it is imported.
"""

from pathlib import Path

from model.config import RunConfig
from model.runs.run import pinned_run
from storage.errors import ObjectMissing
from storage.sources import finding as sources
from storage.stores.opening import open_store


def check(config: RunConfig) -> None:
    """Raise ValueError or StorageError when the pipeline cannot start; make the store when all is well."""
    try:
        run = pinned_run(open_store(config.store_url), config)
    except ObjectMissing:
        run = None
    if run is None:
        if not sources.is_on_hub(config.data.source):
            sources.find_files(config.data.source)
        items = config.evaluation.hellaswag
        if items and not sources.is_on_hub(items) and not Path(items).is_file():
            raise ValueError(
                f"evaluation.hellaswag = {items!r}: no such file. Give a Hub dataset, a .jsonl or .parquet file of "
                f"items, or leave it empty."
            )
    open_store(config.store_url, create=True)

"""Finds in a moment what would end a flow after Prefect's start: the store, the source, a name that is taken.

Imports no Prefect, which takes 3 s and reads its settings when it is imported.
"""

import re
from pathlib import Path

from model.config import DataConfig, RunConfig
from model.run import pinned_run
from storage import sources
from storage.errors import ObjectMissing
from storage.layout import open_store

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def check(config: RunConfig) -> None:
    """Raise ValueError or StorageError when the pipeline cannot start; make the store when all is well."""
    try:
        run = pinned_run(open_store(config.store_url), config)
    except ObjectMissing:
        run = None
    if run is None:
        find_sources(config.data)
        items = config.evaluation.hellaswag
        if items and not Path(items).is_file():
            raise ValueError(
                f"evaluation.hellaswag = {items!r}: no such file. Give a .jsonl file of items, or leave it empty."
            )
    open_store(config.store_url, create=True)


def find_sources(data: DataConfig) -> list[Path]:
    """The source files the configuration names. Raises ValueError when there are none."""
    try:
        return sources.find(data.source)
    except ValueError:
        if HUB_NAME.fullmatch(data.source) and not data.source.startswith("."):
            raise ValueError(
                f"data.source = {data.source!r}: a Hub dataset ({data.config} at {data.revision}) was asked for, this "
                f"version reads local files only. Download its parquet files and give their path or glob: "
                f"--set data.source='…/*.parquet'"
            ) from None
        raise

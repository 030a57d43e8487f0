"""The first stage: find the source files, identify each by its content, and bring evaluation items into the store."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from flows.preflight import find_sources
from flows.progress import Bar, say
from model.config import RunConfig
from model.run import pinned_run
from storage import keys, sources
from storage.errors import AlreadyExists
from storage.layout import open_store
from storage.manifest import read_manifest
from storage.shards import done
from storage.sources import SourceFile


@dataclass(frozen=True)
class Downloaded:
    """The source files in order, and the key of the HellaSwag items where some are given."""

    files: list[SourceFile]
    items: str | None


@task(task_run_name="file-{path}", cache_policy=NO_CACHE)
def identify_file(path: str, text_column: str) -> SourceFile:
    """Check the file's columns and hash its content, once as long as it stays the same."""
    sources.check(Path(path), text_column)
    return sources.identify(Path(path))


@task(task_run_name="items-{path}", cache_policy=NO_CACHE)
def mirror_items(path: str, store_url: str) -> str:
    """Copy a file of HellaSwag items into the store. Returns its key."""
    found = sources.identify(Path(path))
    key = keys.source(found.sha256, keys.as_name(found.name))
    with suppress(AlreadyExists):  # named by its content
        open_store(store_url).put_new(key, Path(path).read_bytes())
    return key


@flow(name="download", flow_run_name="download-{config.data.dataset}", validate_parameters=False)
def download(config: RunConfig) -> Downloaded:
    """Identify the source files. A run that is pinned to a complete manifest needs none of them."""
    store = open_store(config.store_url, create=True)
    run = pinned_run(store, config)
    if run is not None:
        manifest = read_manifest(store, run.dataset, run.manifest)
        if len(done(store, run.dataset, manifest.shard_ids, manifest.known_tokens)) == len(manifest.shard_ids):
            say("download", f"nothing to do, the run is pinned to manifest {run.manifest[:12]}")
            return Downloaded([], run.items)
    paths = find_sources(config.data)
    bar = Bar("download", len(paths), "source files")
    futures = [identify_file.submit(str(path), config.data.text_column) for path in paths]
    items = mirror_items(config.evaluation.hellaswag, config.store_url) if config.evaluation.hellaswag else None
    files = []
    for future in futures:
        files.append(future.result())
        bar.advance()
    bar.close()
    say("download", f"{len(files):,} source files, {sum(file.size_bytes for file in files) / 1e6:,.1f} MB")
    return Downloaded(files, items)

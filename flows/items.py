"""A task that copies the file of HellaSwag items into the store and validates it."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from flows.runtime.tasks import retries
from model.evaluation.hellaswag import questions
from storage.errors import SourceInvalid
from storage.sources.mirror import list_source, mirror
from storage.sources.reading import REQUEST_BYTES, open_bytes
from storage.stores.opening import open_store
from storage.stores.store import put_once


@task(task_run_name="items-{source}", cache_policy=NO_CACHE, **retries(5, 30))
def mirror_items(source: str, store_url: str) -> str:
    """Copy the file into the store. Returns its key. Raises SourceInvalid unless it is one file of HellaSwag items."""
    store = open_store(store_url)
    listing, _ = list_source(store, source, "", "main", "validation", "evaluation.hellaswag")
    if len(listing.files) != 1 or not listing.files[0].is_read_by_rows:
        names = [file.name for file in listing.files[:3]]
        problem = f"expected one file (on the Hub: in split 'validation'), found {len(listing.files)}, {names}"
        raise SourceInvalid(f"evaluation.hellaswag = {source!r}: {problem}. Give one .jsonl or .parquet file.")
    file = mirror(store, listing.files[0])
    if not listing.origin:
        with open_bytes(file, REQUEST_BYTES) as body:
            put_once(store, file.key, body.read())  # the key names the content
    questions(store.read(file.key).body, file.key)
    return file.key

"""Opens a store by its URL, and refuses one whose layout is newer than this program. Knows no dataset and no run."""

import json
from contextlib import suppress
from pathlib import Path

from storage import keys
from storage.errors import AlreadyExists, ObjectMissing, StoreUnusable
from storage.folder import FolderStore
from storage.store import Store

LAYOUT = 1


def open_store(url: str, *, create: bool = False) -> Store:
    """The store at `url`: a folder as `./data` or `file:///…`. With `create`, a store that is not there is made.

    Raises ObjectMissing where there is none yet, StoreUnusable for a place that cannot be one and for a newer layout.
    """
    scheme, separator, rest = url.partition("://")
    if separator and scheme != "file":
        raise StoreUnusable(
            f"store {url!r}: this version opens folders only, found the scheme {scheme!r}. "
            f"Use a folder: --set store_url=./data"
        )
    folder = Path(rest if separator else url).expanduser().absolute()
    store = FolderStore(folder, url)
    _check_layout(store, create)
    return store


def _check_layout(store: Store, create: bool) -> None:
    try:
        found = store.read(keys.FORMAT).body
    except ObjectMissing:
        if not create:
            raise ObjectMissing(
                f"store {store.url!r}: there is none yet (no {keys.FORMAT} object was found). "
                f"Check --set store_url=…, or run gpt2 pretrain or gpt2 dataset build, which make it."
            ) from None
        with suppress(AlreadyExists):  # another process made it between our two calls
            store.put_new(keys.FORMAT, json.dumps({"layout": LAYOUT}).encode())
        found = store.read(keys.FORMAT).body
    try:
        layout = int(json.loads(found)["layout"])
    except (ValueError, KeyError, TypeError, OverflowError) as error:
        raise StoreUnusable(
            f"store {store.url!r}: its {keys.FORMAT} object holds {found[:80]!r}, not a layout number. "
            f"It is no store of this program: choose another place with --set store_url=…"
        ) from error
    if layout > LAYOUT:
        raise StoreUnusable(
            f"store {store.url!r}: its layout is {layout}, this version reads up to {LAYOUT}. "
            f"Update gpt2-pipeline, or choose another store."
        )

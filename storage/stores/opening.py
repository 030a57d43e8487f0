"""Opens a store by its URL, and refuses one whose layout is newer than this program. Knows no dataset and no run."""

import json
import re
from contextlib import suppress
from pathlib import Path

from storage import keys
from storage.errors import AlreadyExists, ObjectMissing, StoreUnusable
from storage.stores.folder import FolderStore
from storage.stores.store import Store

LAYOUT = 1
BUCKET = re.compile(r"([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.+?))?/?")


def open_store(url: str, *, create: bool = False) -> Store:
    """The store at `url`: a folder as `./data` or `file:///…`, or `s3://bucket/prefix`. With `create`, it is made.

    `s3+http://` is S3 for which a plain http endpoint is accepted beyond this host. Raises ObjectMissing where there is
    no store yet, StoreUnusable for a place that cannot be one and for a newer layout.
    """
    scheme, separator, rest = url.partition("://")
    store: Store
    if not separator or scheme == "file":
        store = FolderStore(Path(rest if separator else url).expanduser().absolute(), url)
    elif scheme not in ("s3", "s3+http"):
        raise StoreUnusable(
            f"store_url: a folder or s3://bucket/prefix was expected, found the scheme {scheme!r}. "
            f"Use a folder: --set store_url=./data"
        )
    elif not (place := BUCKET.fullmatch(rest)) or not (place[2] is None or keys.is_key(place[2])):
        raise StoreUnusable(  # without the URL: somebody may have written a secret into it
            "store_url: s3://bucket/prefix was expected, with a bucket's name and a prefix of letters, digits, '.', "
            "'_' and '-'. Put no key or secret into it: they belong into AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )
    else:
        from storage.stores.s3 import S3Store  # boto3 takes 0.3 s to import, which a folder does not need

        store = S3Store(place[1], place[2] or "", url, plain_http=scheme == "s3+http")
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

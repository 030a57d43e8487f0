"""Opens stores by URL, checking their layout version, and buckets of source files. Independent of datasets and runs."""

import json
import re
from pathlib import Path

from pydantic import BaseModel

from storage import keys
from storage.errors import ObjectMissing, StoreUnusable
from storage.stores.folder import FolderStore
from storage.stores.store import Store, put_once, read_as

LAYOUT = 1
BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
SCHEMES = {"s3": False, "s3+http": True}  # of buckets, and whether each permits plain http to another host
# user:password@ in a URL or, with one "/", its Path. AWS's secrets may contain "/". Unbounded, the search is quadratic.
CREDENTIALS = re.compile(r":/{1,2}(?:[^\s/:@]*:\S{0,512}|[^\s/@]*)@")
PLACE = re.compile(rf"({'|'.join(map(re.escape, SCHEMES))})://([^/]*)/?(.*)", re.DOTALL)
REMEDY = "If gpt2 wrote this store, delete that object and run gpt2 dataset build; else choose another store_url."


class Format(BaseModel, frozen=True):
    """The content of `FORMAT`."""

    layout: int


def open_store(url: str, *, create: bool = False) -> Store:
    """Open a folder or `s3://bucket/prefix`. Raises ObjectMissing (unless `create`), ObjectCorrupt, StoreUnusable."""
    store = _store_at(url)
    if (written := read_as(store, keys.FORMAT, Format, remedy=REMEDY)) is None and create:
        put_once(store, keys.FORMAT, json.dumps({"layout": LAYOUT}).encode())
        return open_store(url)
    if written is None:
        remedy = "Check --set store_url=…, or create it with gpt2 pretrain or gpt2 dataset build."
        raise ObjectMissing(f"store {url!r} does not exist (it has no {keys.FORMAT} object). {remedy}")
    if written.layout > LAYOUT:
        newer = f"layout {written.layout}, but this version reads up to {LAYOUT}"
        raise StoreUnusable(f"store {url!r} has {newer}. Update gpt2-pipeline, or choose another store.")
    return store


def is_in_bucket(place: str) -> bool:
    """Whether a place is an object, a prefix or a pattern in a bucket, not a path on this host."""
    return PLACE.match(place) is not None


def open_bucket(place: str) -> tuple[Store, str]:
    """The bucket of a place, opened to read objects of any name, and the key or pattern in it (empty: all objects)."""
    match = PLACE.fullmatch(place)
    assert match is not None
    scheme, bucket, key = match.groups()
    return _s3_store(scheme, bucket, "", f"{scheme}://{bucket}", foreign=True), key


def _store_at(url: str) -> Store:
    scheme, _, rest = url.partition(":")
    if scheme == "file" or (scheme not in SCHEMES and not rest.startswith("//")):
        return FolderStore(Path(rest.removeprefix("//") if scheme == "file" else url).expanduser().absolute(), url)
    if scheme not in SCHEMES:
        raise StoreUnusable(f"store_url: unknown scheme {scheme!r}. Use a folder or s3://bucket/prefix.")
    bucket, _, prefix = rest.partition("//")[2].removesuffix("/").partition("/")  # no bucket in s3:/bucket
    return _s3_store(scheme, bucket, prefix, url)


def _s3_store(scheme: str, bucket: str, prefix: str, url: str, *, foreign: bool = False) -> Store:
    if not BUCKET.fullmatch(bucket) or (prefix and not keys.is_key(prefix)):
        raise StoreUnusable(  # without the URL, which may contain a secret
            f"{'source' if foreign else 'store_url'}: expected s3://bucket/{'key' if foreign else 'prefix'}, a bucket "
            f"of lower-case letters, digits, '.', '-', a store's prefix also of capitals and '_'. Put credentials in "
            f"AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, not in the URL."
        )
    from storage.stores.s3 import S3Store  # boto3 takes 0.3 s to import, which a folder does not need

    return S3Store(bucket, prefix, url, plain_http=SCHEMES[scheme], foreign=foreign)

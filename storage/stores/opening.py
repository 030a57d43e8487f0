"""Opens stores by URL, checking their layout version, and buckets of source files. Independent of datasets and runs."""

import json
import re
from contextlib import suppress
from pathlib import Path

from pydantic_core import from_json

from storage import keys
from storage.errors import AlreadyExists, ObjectMissing, StoreUnusable
from storage.stores.folder import FolderStore
from storage.stores.store import Store

LAYOUT = 1
BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
SCHEMES = {"s3": False, "s3+http": True}  # of buckets, and whether each permits plain http to another host
CREDENTIALS = re.compile(r"://(?:[^\s/:@]*:\S*|[^\s/@]*)@")  # user:password@ in a URL; AWS's secrets may contain "/"
PLACE = re.compile(rf"({'|'.join(map(re.escape, SCHEMES))})://([^/]*)/?(.*)", re.DOTALL)


def open_store(url: str, *, create: bool = False) -> Store:
    """Open the store at `url`: a folder (`./data` or `file:///…`) or `s3://bucket/prefix`.

    `s3+http://` permits a plain http endpoint on another host. Raises ObjectMissing if the store does not exist,
    unless `create` is set. Raises StoreUnusable for an invalid URL and for an unreadable or newer layout.
    """
    store = _store_at(url)
    try:
        body = store.read(keys.FORMAT).body
    except ObjectMissing:
        if not create:
            raise ObjectMissing(
                f"store {url!r} does not exist (it has no {keys.FORMAT} object). "
                f"Check --set store_url=…, or create it with gpt2 pretrain or gpt2 dataset build."
            ) from None
        with suppress(AlreadyExists):  # another process created it between our two requests
            store.put_new(keys.FORMAT, json.dumps({"layout": LAYOUT}).encode())
        body = store.read(keys.FORMAT).body
    _check_layout(url, body)
    return store


def is_in_bucket(place: str) -> bool:
    """Whether a place is an object, a prefix or a pattern in a bucket, not a path on this host."""
    return PLACE.match(place) is not None


def open_bucket(place: str) -> tuple[Store, str]:
    """The bucket of a place, opened to read objects of any name, and the key or pattern in it (empty: all objects)."""
    match = PLACE.fullmatch(place)
    assert match is not None
    scheme, bucket, key = match.groups()
    if not BUCKET.fullmatch(bucket):  # without the URL, which may contain a secret
        raise StoreUnusable(
            "source: expected s3://bucket/key, and a bucket name has lower-case letters, digits, '.' and '-'. Put "
            "credentials in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, not in the URL."
        )
    return _s3_store(scheme, bucket, "", f"{scheme}://{bucket}", foreign=True), key


def _store_at(url: str) -> Store:
    scheme, _, rest = url.partition(":")
    if scheme == "file" or (scheme not in SCHEMES and not rest.startswith("//")):
        return FolderStore(Path(rest.removeprefix("//") if scheme == "file" else url).expanduser().absolute(), url)
    if scheme not in SCHEMES:
        raise StoreUnusable(
            f"store_url: unknown scheme {scheme!r}. Use a folder (--set store_url=./data) or s3://bucket/prefix."
        )
    bucket, _, prefix = rest.partition("//")[2].removesuffix("/").partition("/")  # no bucket in s3:/bucket
    if not BUCKET.fullmatch(bucket) or (prefix and not keys.is_key(prefix)):
        raise StoreUnusable(  # without the URL, which may contain a secret
            "store_url: expected s3://bucket/prefix. A bucket name has lower-case letters, digits, '.' and '-'; each "
            "part of the prefix has letters, digits, '.', '_' and '-'. Both begin with a letter or a digit. Put "
            "credentials in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, not in the URL."
        )
    return _s3_store(scheme, bucket, prefix, url)


def _s3_store(scheme: str, bucket: str, prefix: str, url: str, *, foreign: bool = False) -> Store:
    from storage.stores.s3 import S3Store  # boto3 takes 0.3 s to import, which a folder does not need

    return S3Store(bucket, prefix, url, plain_http=SCHEMES[scheme], foreign=foreign)


def _check_layout(url: str, body: bytes | bytearray) -> None:
    try:
        layout = from_json(body)["layout"]
        if not isinstance(layout, int):
            raise TypeError("not a number")
    except (ValueError, KeyError, TypeError) as error:
        raise StoreUnusable(
            f"store {url!r}: its {keys.FORMAT} object holds {body[:80]!r}, not a layout number. If gpt2 wrote this "
            f"store, delete that object and run gpt2 dataset build; else choose another with --set store_url=…"
        ) from error
    if layout > LAYOUT:
        raise StoreUnusable(
            f"store {url!r}: its {keys.FORMAT} object says layout {layout}, this version reads up to {LAYOUT}. "
            f"Update gpt2-pipeline, or choose another store."
        )

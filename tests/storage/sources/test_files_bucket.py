"""Source files in any bucket: found by pattern, identified by content, and read by ranges."""

import secrets
from pathlib import Path

import pytest

from model import tokenizer
from storage.datasets import records, shards
from storage.errors import SourceInvalid, StoreUnusable
from storage.keys import DatasetKeys
from storage.sources import files, reading
from storage.stores.s3_client import own_client
from storage.stores.store import Store
from tests import servers
from tests.conftest import S3Url
from tests.making import document, write_parquet
from tests.storage.sealing import jobs_of, plans_of
from tests.storage.source_files import write_jsonl
from tests.storage.store_kinds import SERVERS, each


@pytest.fixture(params=each(SERVERS))
def bucket(request: pytest.FixtureRequest, s3_url: S3Url, tmp_path: Path) -> str:
    """The URL of a folder in a bucket with files of other programs; tmp_path has copies."""
    s3_url(request.param)
    folder = secrets.token_hex(6)
    texts = [document(number) for number in range(60)]
    write_parquet(tmp_path / "year=2024" / "part 1.parquet", texts)
    write_jsonl(tmp_path / "lines.jsonl", texts)
    for name in ("year=2024/part 1.parquet", "lines.jsonl"):
        own_client().put_object(Bucket=servers.BUCKET, Key=f"{folder}/{name}", Body=(tmp_path / name).read_bytes())
    own_client().put_object(Bucket=servers.BUCKET, Key=f"{folder}/_SUCCESS", Body=b"")
    return f"s3://{servers.BUCKET}/{folder}"


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("/*.jsonl", ["lines.jsonl"]),
        ("/**/*", ["lines.jsonl", "year=2024/part 1.parquet"]),
        ("/[kl]ines.json[!x]", ["lines.jsonl"]),
        ("/**/*.parquet", ["year=2024/part 1.parquet"]),
        ("/year=*/part ?.parquet", ["year=2024/part 1.parquet"]),
        ("/lines.jsonl", ["lines.jsonl"]),
        ("/year=2024", ["year=2024/part 1.parquet"]),
    ],
)
def test_files_of_a_bucket_are_found(bucket: str, pattern: str, names: list[str]) -> None:
    assert files.find_files(bucket + pattern)[0] == [f"{bucket}/{name}" for name in names]


def test_what_a_bucket_does_not_contribute_is_listed_or_an_error(bucket: str) -> None:
    places, ignored, _ = files.find_files(f"{bucket}/*.jsonl")
    assert (len(places), len(ignored)) == (1, 2)
    assert ignored[0].startswith("_SUCCESS: ")
    with pytest.raises(ValueError, match=r"'year=2024/part 1\.parquet' is in a sub-folder.*/\*\*/\*"):
        files.find_files(bucket)
    prefix = bucket.rpartition("/")[2]
    own_client().put_object(Bucket=servers.BUCKET, Key=f"{prefix}/year=2024/rest.jsonl.lz4", Body=b"")
    for pattern in ("year=2024", "year=*/*", "**/*"):
        with pytest.raises(ValueError, match=r"rest\.jsonl\.lz4' is not"):
            files.find_files(f"{bucket}/{pattern}")


def test_a_whole_bucket_is_a_source_and_folder_markers_are_no_files(bucket: str) -> None:
    name = secrets.token_hex(6)
    own_client().create_bucket(Bucket=name)
    for key, body in {
        "a.PARQUET": b"1",
        "[x].jsonl": b"1",
        "b/": b"",
        "c/": b"",
        "c/d.jsonl": b"1",
        "d[1]/e.jsonl": b"1",
    }.items():
        own_client().put_object(Bucket=name, Key=key, Body=body)
    for source in (f"s3://{name}/*.*", f"s3://{name}/[[a]*"):
        assert files.find_files(source)[0] == [f"s3://{name}/[x].jsonl", f"s3://{name}/a.PARQUET"]
    assert files.find_files(f"s3://{name}/[x].jsonl")[0] == [f"s3://{name}/[x].jsonl"]
    for source in (f"s3://{name}/c", f"s3://{name}/c/", f"s3://{name}/c/*"):
        assert files.find_files(source)[0] == [f"s3://{name}/c/d.jsonl"]
    for source in (f"s3://{name}/d[1]", f"s3://{name}/d[1]/"):
        assert files.find_files(source)[0] == [f"s3://{name}/d[1]/e.jsonl"]
    own_client().delete_object(Bucket=name, Key="d[1]/e.jsonl")
    own_client().delete_object(Bucket=name, Key="c/d.jsonl")
    for source in (f"s3://{name}", f"s3://{name}/"):
        assert len(files.find_files(source)[0]) == 2


@pytest.mark.parametrize("url", ["s3://KEY:hidden@bucket/a.jsonl", "s3://KEY:hidden@bucket", "s3://", "s3+http://K/x"])
def test_a_url_with_a_secret_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(StoreUnusable, match="AWS_SECRET_ACCESS_KEY") as error:
        files.find_files(url)
    assert "hidden" not in str(error.value)


def test_a_pattern_without_matches_is_refused(bucket: str) -> None:
    for pattern in ("/*.parquet", "/none.jsonl", "/none"):
        with pytest.raises(ValueError, match=r"source = .*no readable file there"):
            files.find_files(bucket + pattern)


@pytest.mark.parametrize("name", ["year=2024/part 1.parquet", "lines.jsonl"])
def test_a_file_in_a_bucket_gives_the_same_shards_as_a_local_copy(
    bucket: str, tmp_path: Path, store: Store, name: str
) -> None:
    local = jobs_of(tmp_path / name)
    (planned,) = plans_of(f"{bucket}/{name}")
    remote = list(planned.jobs())
    assert [job.recipe for job in remote] == [job.recipe for job in local]
    assert [job.shard_id for job in remote] == [job.shard_id for job in local]
    for job in remote:
        shards.build_shard(store, "remote", job, tokenizer.encode, tokenizer.EOT)
    for job in local:
        record = shards.build_shard(store, "local", job, tokenizer.encode, tokenizer.EOT)
        assert records.read_record(store, "remote", job.shard_id).sha256 == record.sha256
    assert len(list(store.list(DatasetKeys("remote").shards))) == 2 * len(remote)


def test_a_file_that_changed_since_the_plan_is_refused(bucket: str, store: Store) -> None:
    (planned,) = plans_of(f"{bucket}/lines.jsonl")
    key = f"{bucket.rpartition('/')[2]}/lines.jsonl"
    own_client().put_object(Bucket=servers.BUCKET, Key=key, Body=b'{"text": "other"}\n' * 60)
    with pytest.raises(SourceInvalid, match=r"lines\.jsonl.*changed since"):
        shards.build_shard(store, "small", next(planned.jobs()), tokenizer.encode, tokenizer.EOT)
    own_client().delete_object(Bucket=servers.BUCKET, Key=key)
    with pytest.raises(SourceInvalid, match=r"lines\.jsonl.*deleted"):
        reading.identify(f"{bucket}/lines.jsonl")

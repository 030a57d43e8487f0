"""Files that are converted first, under Prefect: the same version for any number of workers, after kills, anywhere."""

import random
import signal
from pathlib import Path

import pytest

from flows.pretrain import build_dataset
from storage import keys
from storage.datasets.manifest import latest_manifest
from storage.keys import DatasetKeys
from storage.stores.opening import open_store
from storage.stores.s3_client import own_client
from tests import servers
from tests.conftest import S3Url
from tests.corpora import encoded, write_files
from tests.flows.client import gpt2, run_gpt2
from tests.making import build_dataset as build_without_prefect
from tests.making import document, settings_of, tiny_config
from tests.polling import poll
from tests.processes import family, kill

TEXTS = [document(number, 20) for number in range(400)]
SHARDS = "data.shard_tokens=1500"


@pytest.mark.usefixtures("api")
@pytest.mark.parametrize(
    ("kind", "compression", "workers"),
    [
        ("csv", ".xz", 2),
        *(
            pytest.param(*kind, workers, marks=pytest.mark.full if workers == in_ci else pytest.mark.nightly)
            for *kind, in_ci in (
                ("json lines", ".gz", 1),
                ("jsonl", ".zst", 7),
                ("txt", "", 1),
                ("arrow file", ".bz2", 7),
            )
            for workers in (1, 2, 7)
        ),
    ],
)
def test_any_number_of_workers_seals_the_same_version(
    tmp_path: Path, kind: str, compression: str, workers: int
) -> None:
    source = write_files(tmp_path / "source", encoded(TEXTS, kind, compression, files=5))
    config = tiny_config(f"{tmp_path}/store", str(source), SHARDS, f"resources.workers={workers}")
    assert build_dataset(config) == build_without_prefect(tiny_config(f"{tmp_path}/serial", str(source), SHARDS)).digest


@pytest.mark.parametrize(
    ("kind", "format", "compression"),
    [
        ("seaweedfs", "jsonl", ".zst"),
        ("seaweedfs", "csv", ".gz"),
        ("seaweedfs", "txt", ""),
        pytest.param("minio", "csv", ".gz", marks=pytest.mark.full),
    ],
)
def test_a_bucket_gives_the_version_of_a_folder(
    tmp_path: Path, s3_url: S3Url, kind: str, format: str, compression: str
) -> None:
    files, url = encoded(TEXTS[:60], format, compression), s3_url(kind)
    source = write_files(tmp_path / "source", files)
    for name, body in files.items():
        prefix = url.removeprefix(f"s3://{servers.BUCKET}/")
        own_client().put_object(Bucket=servers.BUCKET, Key=f"{prefix}/source/{name}", Body=body)
    in_folder = build_without_prefect(tiny_config(f"{tmp_path}/store", str(source), "data.shard_tokens=400"))
    for store in (f"{url}/store", f"{tmp_path}/other"):
        in_bucket = build_without_prefect(tiny_config(store, f"{url}/source", "data.shard_tokens=400"))
        assert in_bucket.columns == in_folder.columns


@pytest.mark.nightly
def test_killed_at_random_a_build_ends_with_the_same_version(tmp_path: Path) -> None:
    source = write_files(
        tmp_path / "source", encoded([document(number, 20) for number in range(8_000)], "csv", ".gz", files=16)
    )
    expected = build_without_prefect(tiny_config(f"{tmp_path}/calm", str(source), "data.shard_tokens=6000"))
    config = tiny_config(f"{tmp_path}/store", str(source), "data.shard_tokens=6000", "resources.workers=2")
    build = ["dataset", "build", *(word for setting in settings_of(config) for word in ("--set", setting))]
    store, drawn = open_store(config.store_url, create=True), random.Random(7)

    def done() -> int:
        return sum(1 for prefix in (keys.CONVERTED, DatasetKeys("small").shards) for _ in store.list(prefix))

    kills = 0
    while latest_manifest(store, "small") is None and kills < 4:
        wanted = done() + drawn.randint(1, 40)
        process = gpt2(*build, cwd=tmp_path)
        poll(lambda process=process, wanted=wanted: process.poll() is not None or done() >= wanted, every_seconds=0.02)
        if process.poll() is None:
            kill(family(process.pid))
            kills += 1
        process.communicate()
    assert kills >= 2
    assert process.returncode == -signal.SIGKILL
    code, output = run_gpt2(*build, cwd=tmp_path)
    assert code == 0, output
    assert latest_manifest(store, "small") == expected

"""Copies of Hub files: downloaded once, complete or not at all, and resumed after a kill or a full disk."""

import os
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storage.errors import SourceInvalid, SourceUnavailable
from storage.sources import mirror as mirrors
from storage.sources.files import Listing, SourceFile
from storage.sources.mirror import list_source, locate, mirror
from storage.sources.reading import open_source
from storage.stores import retries
from storage.stores.opening import open_store
from storage.stores.store import Store
from tests.conftest import S3Url
from tests.hub import Hub
from tests.storage.store_kinds import STORES, each

FILES = {f"data/part-{number}.parquet": bytes([65 + number]) * (300_000 + number) for number in range(3)}
STORED = "/stored/*"


@pytest.fixture(autouse=True)
def short_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "RETRY_SECONDS", 1.0)


@pytest.fixture(params=each(STORES))
def store(request: pytest.FixtureRequest, tmp_path: Path, s3_url: S3Url) -> Store:
    url = str(tmp_path / "store") if request.param == "folder" else s3_url(request.param)
    return open_store(url, create=True)


def listed(store: Store, revision: str = "main") -> Listing:
    return list_source(store, "org/edu", "default", revision, "train")[0]


def test_a_file_is_downloaded_once_and_read_from_the_store(store: Store, hub: Hub) -> None:
    hub.dataset("org/edu", FILES)
    for file in listed(store).files:
        copied = mirror(store, file)
        assert copied == locate(store, file) != file
        assert store.read(file.key).body == FILES[file.name]
        opened = open_source(copied)
        body = opened.read_bytes() if isinstance(opened, Path) else opened.read(file.size_bytes)
        assert body == FILES[file.name]
        assert mirror(store, file) == copied
    assert len(hub.received(STORED)) == len(FILES)
    assert list(mirrors.FOLDER.iterdir()) == []


@pytest.mark.parametrize("damaged", [b"", b"A" * 299_999])
def test_a_copy_of_the_wrong_size_is_replaced(store: Store, hub: Hub, damaged: bytes) -> None:
    hub.dataset("org/edu", FILES)
    file = listed(store).files[0]
    store.put_new(file.key, damaged)
    assert mirror(store, file) == locate(store, file) != file
    assert store.read(file.key).body == FILES[file.name]
    assert len(hub.received(STORED)) == 1


def test_a_copy_whose_bytes_changed_must_be_deleted(tmp_path: Path, hub: Hub) -> None:
    hub.dataset("org/edu", FILES)
    store = open_store(str(tmp_path / "changed"), create=True)
    copied = mirror(store, listed(store).files[0])
    Path(copied.place).write_bytes(bytes(copied.size_bytes))
    with pytest.raises(SourceInvalid, match=r"Delete this damaged copy.*again"):
        open_source(copied)


def test_a_file_without_a_copy_is_read_from_the_hub(store: Store, hub: Hub) -> None:
    hub.dataset("org/edu", FILES)
    file = listed(store).files[0]
    assert locate(store, file) == file
    opened = open_source(file)
    assert not isinstance(opened, Path)
    opened.seek(-7, 2)
    assert opened.read() == FILES[file.name][-7:]


def test_an_unchanged_revision_costs_one_request(store: Store, hub: Hub) -> None:
    repository = hub.dataset("org/edu", FILES)
    first = listed(store)
    hub.requests.clear()
    assert listed(store) == first
    assert len(hub.requests) == 1
    commit = first.origin["commit"]
    listed(store, commit)
    hub.requests.clear()
    assert listed(store, commit).files == first.files  # a commit never changes
    assert hub.requests == []
    repository.commit(FILES | {"data/part-9.parquet": b"9"})
    again = listed(store)
    assert [file.name for file in again.files] == [*FILES, "data/part-9.parquet"]
    assert [file.digest for file in again.files[:3]] == [file.digest for file in first.files]
    assert again.origin["commit"] != commit


def test_the_last_listing_is_used_when_the_hub_is_unreachable(store: Store, hub: Hub) -> None:
    hub.dataset("org/edu", FILES)
    hub.inject("*", *["reset"] * 1_000)  # type: ignore[arg-type]
    with pytest.raises(SourceUnavailable, match="org/edu"):
        listed(store)
    hub.faults.clear()
    known = listed(store)
    mirror(store, known.files[0])
    hub.inject("*", *["reset"] * 1_000)  # type: ignore[arg-type]
    remembered, reason = list_source(store, "org/edu", "default", "main", "train")
    assert remembered == known
    assert "org/edu" in reason
    assert locate(store, known.files[0]) == mirror(store, known.files[0])
    with pytest.raises(SourceUnavailable):
        mirror(store, known.files[1])


@pytest.mark.parametrize("variable", ["HF_ENDPOINT", "HF_HUB_OFFLINE"])
def test_a_mistyped_path_costs_seconds_without_a_network(tmp_path: Path, variable: str) -> None:
    """In a process of its own: the Hub's client reads its environment when it is imported."""
    script = (
        "import sys; from storage.sources.mirror import list_source; from storage.stores.opening import open_store\n"
        "list_source(open_store(sys.argv[1], create=True), 'data/my-corpuss', '', 'main', 'train')"
    )
    value = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "1"}[variable]
    ended = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True, text=True, check=False, env=os.environ | {variable: value},
    )  # fmt: skip
    (last,) = ended.stderr.splitlines()[-1:]
    assert all(fact in last for fact in ("SourceUnavailable", "data/my-corpuss", "no local file", "Hub", variable))


def test_wrong_bytes_never_reach_the_store(store: Store, hub: Hub) -> None:
    hub.dataset("org/edu", FILES)
    file = listed(store).files[0]
    hub.inject(STORED, *["wrong"] * 9)  # type: ignore[arg-type]
    with pytest.raises(SourceInvalid, match="checksum"):
        mirror(store, file)
    assert list(store.list("sources/" + file.digest)) == []


def test_concurrent_builders_on_one_host_download_a_file_once(store: Store, hub: Hub) -> None:
    hub.dataset("org/edu", FILES)
    files = listed(store).files
    with ThreadPoolExecutor(8) as pool:
        copies = list(pool.map(lambda n: mirror(store, files[n % 3]), range(24)))
    assert {file.place for file in copies} == {locate(store, file).place for file in files}
    assert len(hub.received(STORED)) == len(FILES)


def test_a_copy_that_appears_after_the_first_check_is_not_downloaded_again(
    store: Store, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first builder finds no copy, then a second one downloads the whole file before the first continues."""
    hub.dataset("org/edu", FILES)
    file = listed(store).files[0]
    checked: list[SourceFile] = []

    def overtaken(store: Store, file: SourceFile) -> SourceFile:
        located = locate(store, file)
        checked.append(file)
        if len(checked) == 1:
            mirror(store, file)
        return located

    monkeypatch.setattr(mirrors, "locate", overtaken)
    progress: list[int] = []
    assert mirror(store, file, progress.append) == locate(store, file)
    assert sum(progress) == file.size_bytes
    assert len(hub.received(STORED)) == 1
    assert list(mirrors.FOLDER.iterdir()) == []


CHILD = """
import sys
from pathlib import Path
from storage.sources import mirror
from storage.stores.opening import open_store
mirror.FOLDER = Path(sys.argv[2])
if len(sys.argv) > 3:
    import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
store = open_store(sys.argv[1])
listing, _ = mirror.list_source(store, "org/edu", "default", "main", "train")
print("listed", flush=True)
try:
    mirror.mirror(store, listing.files[0])
except Exception as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def test_a_full_disk_is_reported_and_the_next_download_resumes(tmp_path: Path, hub: Hub) -> None:
    """A limit on the file size makes a write fail like a full disk."""
    hub.dataset("org/edu", FILES)
    store = open_store(str(tmp_path / "store"), create=True)
    listed(store)
    argv = [sys.executable, "-c", CHILD, str(tmp_path / "store"), str(mirrors.FOLDER)]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    ended = subprocess.run([*argv, "200000"], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "StoreUnusable" in ended.stderr
    assert str(mirrors.FOLDER) in ended.stderr
    assert "Free some space" in ended.stderr
    (partial,) = mirrors.FOLDER.iterdir()
    assert 100_000 < partial.stat().st_size <= 200_000
    subprocess.run(argv, check=True, capture_output=True)
    assert (
        hub.received(STORED)[-1].headers["range"] == f"bytes={partial.stat().st_size if partial.exists() else 200_000}-"
    )
    assert store.read(listed(store).files[0].key).body == FILES["data/part-0.parquet"]


def test_a_killed_download_is_resumed(tmp_path: Path, hub: Hub) -> None:
    hub.dataset("org/edu", FILES)
    store = open_store(str(tmp_path / "store"), create=True)
    listed(store)
    file = listed(store).files[0]
    hub.inject(STORED, "hang")
    argv = [sys.executable, "-c", CHILD, str(tmp_path / "store"), str(mirrors.FOLDER)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as child:
        while not (mirrors.FOLDER / file.digest).exists() or not (mirrors.FOLDER / file.digest).stat().st_size:
            assert child.poll() is None
        child.kill()
    hub.release()
    partial_bytes = (mirrors.FOLDER / file.digest).stat().st_size
    mirror(store, file)
    assert hub.received(STORED)[-1].headers["range"] == f"bytes={partial_bytes}-"
    assert store.read(file.key).body == FILES[file.name]

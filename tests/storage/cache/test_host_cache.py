"""Processes of a host share one download per file, within a limit, despite kills, full disks and damaged files."""

import errno
import fcntl
import mmap
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest

from storage.cache import host as host_cache
from storage.cache.host import HostCache
from storage.digests import sha256
from storage.errors import StoreUnusable
from tests.polling import poll

ROOT = Path(__file__).parents[3]
SIZE = 2_000  # fits in a file's buffer, which is written when the file is closed
MUCH = 1 << 40

# Opens one file and prints its sha256. Each fetch is logged; on request it waits in the fetch or in the write.
PROCESS = """
import os, sys
from pathlib import Path
from storage.cache import host as host_cache
from storage.digests import sha256

folder, name, body, log, waits = sys.argv[1:]

def wait(at):
    if waits == at:
        print("begun", flush=True)
        sys.stdin.readline()

def fetch():
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\\n")
    wait("in the fetch")
    return Path(body).read_bytes()

def fsync(descriptor, sync=os.fsync):
    wait("in the write")
    sync(descriptor)

host_cache.os.fsync = fsync
print("opening", flush=True)
with host_cache.HostCache(Path(folder), 1 << 40).open(name, fetch) as file:
    print(sha256(file.read()), flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path, folder: Path) -> Iterator[Start]:
    """A function that starts a process that opens the file with the given body."""
    started: list[subprocess.Popen[str]] = []

    def started_process(body: bytes, waits: str = "nowhere") -> subprocess.Popen[str]:
        (tmp_path / "body").write_bytes(body)
        argv = [str(folder), sha256(body), str(tmp_path / "body"), str(tmp_path / "log"), waits]
        process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, *argv], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        started.append(process)
        return process

    yield started_process
    for process in started:
        process.kill()
        process.communicate()


def next_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def resume(process: subprocess.Popen[str]) -> None:
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def fetches(tmp_path: Path) -> int:
    return len((tmp_path / "log").read_text().splitlines())


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink())


def body_of(number: int, size: int = SIZE) -> bytes:
    return bytes([number]) * size


def fill(cache: HostCache, *numbers: int, size: int = SIZE) -> None:
    for number in numbers:
        body = body_of(number, size)
        cache.open(sha256(body), lambda body=body: body).close()  # type: ignore[misc]


def age(folder: Path, number: int, seconds: float) -> None:
    name = sha256(body_of(number))
    os.utime(folder / name[:2] / name, (seconds, seconds))


def cached(cache: HostCache) -> list[int]:
    """Which of the numbered files are cached."""
    return [number for number in range(20) if cache.has(sha256(body_of(number)))]


# Many processes


def test_processes_that_open_the_same_file_fetch_it_once(start: Start, tmp_path: Path, folder: Path) -> None:
    body = os.urandom(SIZE)
    first = start(body, "in the fetch")
    assert [next_line(first), next_line(first)] == ["opening", "begun"]
    others = [start(body) for _ in range(3)]
    assert [next_line(other) for other in others] == ["opening"] * 3
    resume(first)
    assert [next_line(process) for process in (first, *others)] == [sha256(body)] * 4
    assert fetches(tmp_path) == 1
    assert [path.read_bytes() for path in files(folder)] == [body]


@pytest.mark.parametrize("waits", ["in the fetch", "in the write"])
def test_a_killed_fetch_blocks_no_process_and_leaves_no_wrong_file(
    start: Start, tmp_path: Path, folder: Path, waits: str
) -> None:
    body = os.urandom(SIZE)
    first = start(body, waits)
    assert [next_line(first), next_line(first)] == ["opening", "begun"]
    others = [start(body) for _ in range(3)]
    assert [next_line(other) for other in others] == ["opening"] * 3
    assert not HostCache(folder, MUCH).has(sha256(body))
    first.kill()
    assert [next_line(other) for other in others] == [sha256(body)] * 3
    assert fetches(tmp_path) == 2
    assert [path.name for path in files(folder)] == [sha256(body)]


def test_a_process_that_was_forked_during_a_fetch_waits_for_its_end(folder: Path) -> None:
    """As a worker of torch's DataLoader is, while a thread prefetches shards."""
    cache, fetching, forked = HostCache(folder, MUCH), threading.Event(), threading.Event()

    def fetch() -> bytes:
        fetching.set()
        forked.wait()
        return b"a"

    with ThreadPoolExecutor(1) as pool:
        fetched = pool.submit(cache.open, sha256(b"a"), fetch)
        fetching.wait()
        child = multiprocessing.get_context("fork").Process(target=cache.open, args=(sha256(b"a"), list))
        child.start()
        forked.set()
        fetched.result().close()
    child.join(10)
    child.kill()
    child.join()
    assert child.exitcode == 0


def test_the_partial_file_of_a_dead_process_is_overwritten(folder: Path) -> None:
    body = os.urandom(SIZE)
    part = folder / sha256(body)[:2] / "part"
    part.parent.mkdir(parents=True)
    part.write_bytes(os.urandom(2 * SIZE))
    with HostCache(folder, MUCH).open(sha256(body), lambda: body) as file:
        assert file.read() == body
    assert [path.name for path in files(folder)] == [sha256(body)]


# Eviction


def test_the_least_recently_used_files_are_evicted_and_the_limit_holds(folder: Path) -> None:
    cache = HostCache(folder, 3 * SIZE)
    fill(cache, 1, 2, 3)
    for number in (1, 2, 3):
        age(folder, number, number)
    fill(cache, 1)  # used again, now
    fill(cache, 4)
    assert cached(cache) == [1, 3, 4]
    fill(cache, 5)
    assert cached(cache) == [1, 4, 5]
    assert cache.used_bytes() == 3 * SIZE


def test_a_file_open_in_another_process_stays_until_that_ends(start: Start, folder: Path) -> None:
    cache = HostCache(folder, 2 * SIZE)
    body = body_of(1)
    process = start(body)
    assert [next_line(process), next_line(process)] == ["opening", sha256(body)]
    age(folder, 1, 0)
    fill(cache, 2, 3)
    assert cached(cache) == [1, 3]
    process.kill()
    process.wait()
    age(folder, 1, 0)
    fill(cache, 4)
    assert cached(cache) == [3, 4]


def test_a_mapped_file_stays_although_its_file_object_is_closed(folder: Path) -> None:
    cache = HostCache(folder, SIZE)
    body = body_of(1)
    with cache.open(sha256(body), lambda: body) as file:
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    assert file.closed
    age(folder, 1, 0)
    fill(cache, 2)
    assert cached(cache) == [1, 2]  # over the limit, since a file in use stays
    assert mapped[:] == body
    mapped.close()
    age(folder, 1, 0)
    fill(cache, 3)
    assert cached(cache) == [3]


def test_the_test_above_fails_without_the_lock(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", lambda file, how: None if how == fcntl.LOCK_SH else lock(file, how))
    with pytest.raises(AssertionError):
        test_a_mapped_file_stays_although_its_file_object_is_closed(folder)


def test_a_file_evicted_between_open_and_lock_is_fetched_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, body, evicted = HostCache(folder, MUCH), body_of(1), []
    fill(cache, 1)
    lock = fcntl.flock

    def evict_before(file: object, how: int) -> None:
        if how == fcntl.LOCK_SH and not evicted:
            evicted.append(host_cache._evict(folder / sha256(body)[:2] / sha256(body)))
        lock(file, how)  # type: ignore[arg-type]

    monkeypatch.setattr(fcntl, "flock", evict_before)
    with cache.open(sha256(body), lambda: body) as file:
        assert os.fstat(file.fileno()).st_nlink == 1
        assert file.read() == body
    assert evicted == [True]


def test_a_new_file_is_locked_before_it_is_renamed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body, evicted = body_of(1), []
    rename = Path.rename

    def evict_after(path: Path, target: Path) -> Path:
        renamed = rename(path, target)
        evicted.append(host_cache._evict(target))
        return renamed

    monkeypatch.setattr(Path, "rename", evict_after)
    with HostCache(folder, MUCH).open(sha256(body), lambda: body) as file:
        assert file.read() == body
        assert evicted == [False]
        assert [path.name for path in files(folder)] == [sha256(body)]
    assert host_cache._evict(folder / sha256(body)[:2] / sha256(body))


def test_a_damaged_file_is_quarantined_and_fetched_again(folder: Path) -> None:
    cache, body = HostCache(folder, MUCH), body_of(1)
    cache.open(sha256(body), lambda: b"damaged").close()
    cache.quarantine(sha256(body))
    cache.quarantine(sha256(body))  # as a second process would
    assert [path.read_bytes() for path in cache.quarantined()] == [b"damaged"]
    assert cache.used_bytes() == 0
    with cache.open(sha256(body), lambda: body) as file:
        assert file.read() == body


# Full and read-only disks


def test_on_a_full_disk_files_are_evicted_and_the_write_is_repeated(folder: Path) -> None:
    cache = HostCache(folder, MUCH)
    fill(cache, 1, 2, 3)
    for number in (1, 2, 3):
        age(folder, number, number)
    body = body_of(4, SIZE + SIZE // 2)
    part = folder / sha256(body)[:2] / "part"
    part.parent.mkdir(exist_ok=True)
    part.symlink_to("/dev/full")  # the first write finds no space left on the device
    with cache.open(sha256(body), lambda: body) as file:
        assert file.read() == body
    assert cached(cache) == [3]
    assert not part.is_symlink()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_full_disk_is_reported_with_a_remedy_and_leaves_no_partial_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    tries = []

    def full(_: int) -> None:
        tries.append(1)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", full)
    body = body_of(1)
    with pytest.raises(StoreUnusable, match=rf"{os.strerror(number)}.*Free some space"):
        HostCache(folder, MUCH).open(sha256(body), lambda: body)
    assert len(tries) == (1 if number == errno.EIO else 2)
    assert files(folder) == []


def test_a_folder_that_cannot_be_created_is_named_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnusable, match=r"file/shards.*HOME"):
        HostCache(tmp_path / "file" / "shards", MUCH).open("0" * 64, lambda: b"")


def test_an_error_of_the_fetch_is_raised_and_leaves_no_lock(folder: Path) -> None:
    cache, body = HostCache(folder, MUCH), body_of(1)

    def fail() -> bytes:
        raise ValueError("no such shard")

    with pytest.raises(ValueError, match="no such shard"):
        cache.open(sha256(body), fail)
    with closing(cache.open(sha256(body), lambda: body)) as file:
        assert file.read() == body
    poll(lambda: files(folder) == [folder / sha256(body)[:2] / sha256(body)])

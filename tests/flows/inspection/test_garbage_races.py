"""Sealed versions stay intact while builds and garbage collection run concurrently or are killed."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from flows.inspection import garbage
from flows.inspection.garbage import collect
from model import tokenizer
from storage.datasets import copy, lease
from storage.datasets.lease import claim, last_build
from storage.datasets.manifest import Manifest
from storage.errors import Conflict, ObjectMissing
from storage.inspection.verify import check_fully
from storage.stores.opening import open_store
from storage.stores.store import Store
from tests.conftest import S3Url
from tests.flows.garbage_places import HOUR, Place, build, holder, lease_key, make_old
from tests.storage.sealing import RecordingStore, built, source_file

ROOT = Path(__file__).parents[3]
KINDS = ["folder", "seaweedfs"]
ROUNDS = 8

# Prints each deletion, then waits for a line on stdin.
COLLECTOR = """
import sys
from flows.inspection.garbage import collect
from storage.stores.opening import open_store
for item in collect(open_store(sys.argv[1]), float(sys.argv[2])):
    print(item.name, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path, s3_url: S3Url) -> Place:
    url = str(tmp_path / "store") if request.param == "folder" else s3_url(request.param)
    return Place(open_store(url, create=True), tmp_path)


@pytest.fixture
def in_folder(tmp_path: Path) -> Place:
    return Place(open_store(str(tmp_path / "store"), create=True), tmp_path)


# The lease


def test_a_build_that_starts_while_garbage_is_deleted_is_refused_until_the_end(place: Place) -> None:
    deleting = collect(place.store, place.grace)
    first_key = next(deleting).name
    assert holder(place.store) == "collector"
    with pytest.raises(Conflict, match=r"gc is deleting.*same command again"):
        build(place.store, place.source, place.other)
    assert {first_key} | {item.name for item in deleting} == place.orphan_keys()
    assert holder(place.store) is None
    assert place.whole(build(place.store, place.source, place.other))


def test_many_builds_may_hold_the_lease(place: Place) -> None:
    claim(place.store, "small", "build")
    first = place.store.read(lease_key()).etag
    claim(place.store, "small", "build")
    assert place.store.read(lease_key()).etag != first
    assert holder(place.store) == "build"


def test_shards_that_a_copy_counts_as_done_are_kept(
    in_folder: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed copy left shards that no manifest lists; the next copy counts them while gc runs."""
    store = open_store(str(tmp_path / "to"), create=True)
    version_objects = copy.version_objects
    monkeypatch.setattr(copy, "version_objects", lambda *_: sys.exit("killed"))
    with pytest.raises(SystemExit):
        copy.copy_dataset(in_folder.store, store, "small")
    make_old(store, "")

    def beside_gc(*arguments: Any) -> Any:
        assert [item for item in collect(store, HOUR) if item.kind == "shard"] == []
        return version_objects(*arguments)

    monkeypatch.setattr(copy, "version_objects", beside_gc)
    assert copy.copy_dataset(in_folder.store, store, "small")[2] == 0
    damaged = [check_fully(store, "small", row, tokenizer.EOT) for row in in_folder.manifest.rows()]
    assert not any(damaged)


def test_the_lease_of_a_killed_collector_expires(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(place.store, "small", "collector")
    for other in ("build", "collector"):
        with pytest.raises(Conflict):
            claim(place.store, "small", other, last_build(place.store, "small") + HOUR)  # type: ignore[arg-type]
    monkeypatch.setattr(lease, "COLLECTING_SECONDS", -HOUR)
    assert place.whole(build(place.store, place.source, place.other))
    assert holder(place.store) == "build"


def test_a_build_that_begins_between_the_listing_and_the_claim_keeps_its_shards(
    in_folder: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_first(store: Store, dataset: str, who: lease.Holder, idle_since: float) -> None:
        claim(store, dataset, "build")
        claim(store, dataset, who, idle_since)

    monkeypatch.setattr(garbage, "claim", build_first)
    before = in_folder.stored_keys()
    with pytest.raises(Conflict, match="has just started"):
        list(collect(in_folder.store, HOUR))
    assert in_folder.stored_keys() == before
    assert holder(in_folder.store) == "build"


def test_a_build_wins_over_a_collector_that_claims_at_the_same_time(place: Place) -> None:
    before = place.stored_keys()
    watched = RecordingStore(place.store, lambda: claim(place.store, "small", "build"))
    with pytest.raises(Conflict):
        list(collect(watched, place.grace))  # type: ignore[arg-type]
    assert place.stored_keys() == before
    assert holder(place.store) == "build"


def test_a_build_that_began_in_the_same_second_as_the_listing_is_seen(place: Place) -> None:
    """S3 has times in whole seconds, so an equal time may be a later one."""
    claim(place.store, "small", "build")
    with pytest.raises(Conflict):
        claim(place.store, "small", "collector", last_build(place.store, "small"))
    assert holder(place.store) == "build"


def test_a_collector_whose_lease_was_taken_over_deletes_nothing_more(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a host that was suspended for hours and whose clock does not show it."""
    deleting = collect(place.store, place.grace)
    next(deleting)
    with monkeypatch.context() as patch:
        patch.setattr(lease, "COLLECTING_SECONDS", -HOUR)
        sealed = build(place.store, place.source, place.other)
    with suppress(Conflict):
        list(deleting)
    assert place.whole(sealed)


def test_a_collector_that_ends_leaves_the_lease_of_a_build_alone(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    deleting = collect(place.store, place.grace)
    next(deleting)
    with monkeypatch.context() as patch:
        patch.setattr(lease, "COLLECTING_SECONDS", -HOUR)
        claim(place.store, "small", "build")
    with suppress(Conflict):
        list(deleting)
    assert holder(place.store) == "build"


# Killed


@pytest.fixture
def collector(place: Place) -> Iterator[subprocess.Popen[str]]:
    """A process that deletes one object for each line it is sent."""
    argv = [sys.executable, "-c", COLLECTOR, place.store.url, str(place.grace)]
    process = subprocess.Popen(argv, cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("deletions", [1, 3, 5])
def test_a_killed_collector_leaves_an_intact_store_and_the_next_one_continues(
    place: Place, collector: subprocess.Popen[str], deletions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert collector.stdin
    assert collector.stdout
    deleted = set()
    for number in range(deletions):
        if number:
            collector.stdin.write("\n")
            collector.stdin.flush()
        deleted.add(collector.stdout.readline().strip())
    collector.kill()
    collector.wait()
    assert deleted < place.orphan_keys()
    assert place.orphan_keys() - place.stored_keys() == deleted
    assert place.whole()  # no record without its shard, either
    assert holder(place.store) == "collector"
    with pytest.raises(Conflict):
        build(place.store, place.source, place.other)
    monkeypatch.setattr(lease, "COLLECTING_SECONDS", -HOUR)
    place.age("")
    assert {item.name for item in collect(place.store, place.grace)} == place.orphan_keys() - deleted
    assert place.whole(build(place.store, place.source, place.other))


# Concurrent


def keep_collecting(store: Store, start: threading.Barrier, sealed: threading.Event, deleted: list[str]) -> None:
    start.wait()
    while not sealed.is_set():
        with suppress(Conflict):
            deleted += [item.name for item in collect(store, HOUR)]


def patient_build(store: Store, *paths: Path) -> Manifest:
    """Build as users do: run the command again after a conflict."""
    while True:
        with suppress(Conflict):
            return build(store, *paths)


def test_a_build_beside_an_endless_collector_seals_an_intact_version(in_folder: Place) -> None:
    """The build reuses shards that are old and unlisted, which is what the collector deletes."""
    store, paths, deleted = in_folder.store, [in_folder.source, in_folder.other], []
    for number in range(ROUNDS):
        path = source_file(in_folder.folder / "source", 2 + number, 8)
        reused = built(store, path)  # like the shards of a build killed long ago
        in_folder.age("")
        together, built_now = threading.Barrier(2), threading.Event()
        collecting = threading.Thread(target=keep_collecting, args=(store, together, built_now, deleted))
        collecting.start()
        together.wait()
        try:
            for _ in range(2 * number):
                list(store.list(""))  # each round a little later
            paths.append(path)
            sealed = patient_build(store, *paths)
        finally:
            built_now.set()
            collecting.join()
        assert in_folder.whole(sealed), number
        assert set(reused) < set(sealed.shard_ids)
    assert in_folder.whole()


def test_without_the_lease_the_build_above_would_lose_shards(in_folder: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "claim", lambda *_: None)

    def collect_now() -> None:
        assert list(collect(in_folder.store, HOUR))

    with pytest.raises(ObjectMissing):
        build(in_folder.store, in_folder.source, in_folder.other, before_seal=collect_now)

"""The folder store in a folder that is invalid, full, read-only or of another layout."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from storage import keys
from storage.errors import Conflict, ObjectCorrupt, ObjectMissing, StoreUnusable
from storage.stores.opening import LAYOUT, open_store
from storage.stores.store import Store
from tests.making import read_json

ROOT = Path(__file__).parents[3]
NOBODY = 65534


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


# Opening


def test_a_store_that_is_a_file_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "store"
    place.write_text("mine")
    for create in (False, True):
        with pytest.raises(StoreUnusable, match=f"{place}.*store_url"):
            open_store(str(place), create=create)
    assert place.read_text() == "mine"


def test_a_store_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises((StoreUnusable, ObjectMissing), match="store_url"):
        open_store(str(tmp_path / "file" / "store"))
    with pytest.raises(StoreUnusable, match="store_url"):
        open_store(str(tmp_path / "file" / "store"), create=True)


def test_a_missing_store_is_created_only_on_request(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "store"
    with pytest.raises(ObjectMissing, match=f"{place}.*store_url"):
        open_store(str(place))
    assert not place.parent.exists()
    open_store(str(place), create=True).put_new("key", b"1")
    assert open_store(str(place)).read("key").body == b"1"


def test_a_new_store_states_its_layout(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"), create=True)
    assert read_json(store, keys.FORMAT) == {"layout": LAYOUT}


@pytest.mark.parametrize("spelled", ["file://{}", "{}", "{}/", "{}/../store"])
def test_a_folder_may_be_spelled_as_path_or_url(tmp_path: Path, spelled: str) -> None:
    open_store(str(tmp_path / "store"), create=True).put_new("key", b"1")
    assert open_store(spelled.format(tmp_path / "store")).read("key").body == b"1"


def test_a_relative_store_stays_where_it_was_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = open_store("./store", create=True)
    monkeypatch.chdir("/")
    store.put_new("key", b"1")
    assert (tmp_path / "store" / "key").read_bytes() == b"1"


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises((StoreUnusable, ValueError), match="ftp"):
        open_store("ftp://host/store", create=True)


def test_a_newer_layout_is_refused_and_not_changed(tmp_path: Path) -> None:
    (tmp_path / "FORMAT").write_text('{"layout": 7}')
    for create in (False, True):
        with pytest.raises(StoreUnusable, match=rf"layout 7.*up to {LAYOUT}"):
            open_store(str(tmp_path), create=create)
    assert files(tmp_path) == [tmp_path / "FORMAT"]


@pytest.mark.parametrize(
    "body",
    [b"", b"garbage", b"[]", b"1", b"null", b"{}", b'{"layout": "x"}', b'{"layout": null}', b"\xff\xfe\x00",
     b'{"layout": Infinity}'],
)  # fmt: skip
def test_a_folder_with_an_invalid_format_object_is_refused(tmp_path: Path, body: bytes) -> None:
    (tmp_path / "FORMAT").write_bytes(body)
    for create in (False, True):
        with pytest.raises(ObjectCorrupt, match=r"FORMAT.*store_url"):
            open_store(str(tmp_path), create=create)
    assert (tmp_path / "FORMAT").read_bytes() == body


# Folders without permissions


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other users can enter; pytest's own are private."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


def as_nobody(script: str, place: Path) -> str:
    """The output of a script in a process that drops root, if it has it, after its imports."""
    head = (
        "import os, resource, sys\nfrom storage.stores.opening import open_store\n"
        "from storage.errors import StorageError\n"
        f"if os.geteuid() == 0:\n    os.setgroups([])\n    os.setgid({NOBODY})\n    os.setuid({NOBODY})\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", head + script, str(place)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


PUT_AND_SWAP = """
store = open_store(sys.argv[1], create=True)
print(store.read("key").body)
for write in (lambda: store.put_new("a/new", b"2"), lambda: store.swap("key", b"2", None), lambda: store.delete("key")):
    try:
        write()
    except StorageError as error:
        print(type(error).__name__, error)
"""


def test_a_read_only_folder_can_be_read_and_every_write_names_a_remedy(open_folder: Path) -> None:
    open_store(str(open_folder), create=True).put_new("key", b"1")
    before = files(open_folder)
    for path in [open_folder, *open_folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    read, *written = as_nobody(PUT_AND_SWAP, open_folder).splitlines()
    open_folder.chmod(0o755)
    assert read == "b'1'"
    assert len(written) == 3
    for line in written:
        assert line.startswith("StoreUnusable")
        assert str(open_folder) in line
        assert "owner or permissions" in line
    assert files(open_folder) == before


OPEN = """
for create in (False, True):
    try:
        open_store(sys.argv[1], create=create)
    except StorageError as error:
        print(type(error).__name__, error)
"""


def test_a_store_cannot_be_created_in_a_read_only_folder(open_folder: Path) -> None:
    open_folder.chmod(0o555)
    missing, unusable = as_nobody(OPEN, open_folder / "store").splitlines()
    assert missing.startswith("ObjectMissing")
    assert unusable.startswith("StoreUnusable")
    assert str(open_folder / "store") in unusable
    assert "owner or permissions" in unusable
    assert list(open_folder.iterdir()) == []


@pytest.mark.parametrize("below", ["", "store"])
def test_a_folder_without_permission_is_unusable(open_folder: Path, below: str) -> None:
    closed = open_folder / "closed"
    closed.mkdir()
    closed.chmod(0)
    printed = as_nobody(OPEN, closed / below).splitlines()
    closed.chmod(0o755)
    assert [line.split()[0] for line in printed] == ["StoreUnusable"] * 2
    assert all("owner or permissions" in line for line in printed)


LIST = """
store = open_store(sys.argv[1])
try:
    print(list(store.list("closed/")))
except StorageError as error:
    print(type(error).__name__, error)
"""


def test_an_incomplete_listing_is_refused(open_folder: Path) -> None:
    open_store(str(open_folder), create=True).put_new("closed/key", b"1")
    (open_folder / "closed").chmod(0)
    printed = as_nobody(LIST, open_folder)
    (open_folder / "closed").chmod(0o755)
    assert printed.startswith("StoreUnusable")


@pytest.mark.parametrize(
    ("code", "fact"),
    [(errno.ENOSPC, "Free"), (errno.EDQUOT, "Free"), (errno.EROFS, "writable"), (errno.EIO, "disk")],
)
def test_a_write_that_the_disk_refuses_leaves_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, fact: str
) -> None:
    store.put_new("pointer", b"old")
    etag = store.read("pointer").etag
    before = files(tmp_path)

    def refuse(_: int) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        with pytest.raises(StoreUnusable, match=f"a/key.*{fact}"):
            store.put_new("a/key", b"new")
        with pytest.raises(StoreUnusable, match=f"pointer.*{fact}"):
            store.swap("pointer", b"new", etag)
    assert files(tmp_path) == [*before] or set(files(tmp_path)) - set(before) == {tmp_path / "store/.store/swap.lock"}
    assert store.read("pointer").body == b"old"
    store.put_new("a/key", b"new")  # after space was freed
    store.swap("pointer", b"new", etag)


@pytest.mark.parametrize("code", [errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK])
def test_a_file_system_without_hard_links_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(StoreUnusable, match="hard links") as caught:
        open_store(str(tmp_path / "store"), create=True)
    assert "permissions" not in str(caught.value)


@pytest.mark.parametrize("left", ["nothing", "an empty folder", "temporary files"])
def test_a_store_that_vanished_is_not_an_empty_store(store: Store, tmp_path: Path, left: str) -> None:
    """Nothing in it can be repaired or built again: it is on a disk that is not mounted, or was deleted."""
    store.put_new("a/key", b"1")
    shutil.move(tmp_path / "store", tmp_path / "elsewhere")
    if left != "nothing":
        (tmp_path / "store" / (".store/tmp" if left == "temporary files" else "")).mkdir(parents=True)
    reads = [lambda: store.read("a/key"), lambda: store.stat("a/key"), lambda: list(store.list("a/")),
             lambda: store.read_range("a/key", 0, 1), lambda: read_json(store, "other")]  # fmt: skip
    for read in reads:
        with pytest.raises(StoreUnusable, match=rf"{tmp_path / 'store'}.*missing or empty.*[Mm]ount"):
            read()


HALF = """
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
for _ in range(2):
    try:
        open_store(sys.argv[1]).put_new("half", b"x" * 4_000_000)
    except StorageError as error:
        print(type(error).__name__, error)
"""


def test_a_write_that_ends_halfway_leaves_nothing(open_folder: Path) -> None:
    store = open_store(str(open_folder), create=True)
    for path in [open_folder, *open_folder.rglob("*")]:
        path.chmod(0o777 if path.is_dir() else 0o666)
    before = files(open_folder)
    printed = as_nobody(HALF, open_folder).splitlines()
    assert [line.split()[0] for line in printed] == ["StoreUnusable"] * 2
    assert files(open_folder) == before
    store.put_new("half", b"whole")


# Files


def test_no_write_leaves_a_temporary_file(store: Store, tmp_path: Path) -> None:
    etag = store.put_new("key", b"1")
    with pytest.raises(Conflict):
        store.put_new("key", b"2")
    store.swap("key", b"3", etag)
    with pytest.raises(Conflict):
        store.swap("key", b"4", etag)
    assert list((tmp_path / "store" / ".store" / "tmp").iterdir()) == []


def test_other_files_are_not_listed(store: Store, tmp_path: Path) -> None:
    store.put_new("a/key", b"1")
    store.swap("pointer", b"1", None)
    (tmp_path / "store" / ".hidden").write_text("x")
    (tmp_path / "store" / "a" / ".part").write_text("x")
    assert [entry.key for entry in store.list("")] == [keys.FORMAT, "a/key", "pointer"]


def test_an_object_is_the_file_at_its_key(store: Store, tmp_path: Path) -> None:
    store.put_new("a/b.bin", b"1")
    assert store.local_path("a/b.bin") == tmp_path / "store" / "a" / "b.bin"
    assert (tmp_path / "store" / "a" / "b.bin").read_bytes() == b"1"


@pytest.mark.parametrize("verb", ["link", "replace", "rename"])
def test_a_swap_that_expects_no_object_never_replaces_a_concurrent_put(
    store: Store, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    """Another process puts the object just before the swap names its file."""
    original = getattr(os, verb)
    put = []

    def late(*arguments: object, **options: object) -> object:
        patch.undo()
        store.put_new("key", b"put")
        put.append(True)
        return original(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, verb, late)
        with suppress(Conflict):
            store.swap("key", b"swapped", None)
    assert store.read("key").body == (b"put" if put else b"swapped")


def test_a_store_that_was_moved_is_the_same_store(store: Store, tmp_path: Path) -> None:
    etag = store.put_new("a/key", b"1")
    shutil.move(tmp_path / "store", tmp_path / "moved")
    assert open_store(str(tmp_path / "moved")).read("a/key")[:2] == (b"1", etag)


def test_a_probe_detects_a_file_system_that_ignores_conditions(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def put_anyway(source: Path, target: Path) -> None:
        target.write_bytes(source.read_bytes())

    monkeypatch.setattr(os, "link", put_anyway)
    with pytest.raises(StoreUnusable, match="create-only put"):
        store.probe()

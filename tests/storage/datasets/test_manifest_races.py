"""Concurrent seals: one version wins, and the loser gets a conflict."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from storage.datasets.manifest import Manifest, latest_manifest
from storage.errors import Conflict
from storage.stores.store import Store
from tests.storage.sealing import RecordingStore, built, manifests, pointer, seal, sealed, source_file

ROOT = Path(__file__).parents[3]


def test_two_concurrent_builders_of_the_same_version_both_succeed(store: Store, files: list[Path]) -> None:
    planned = built(store, *files)
    theirs: list[Manifest] = []
    ours = seal(RecordingStore(store, lambda: theirs.append(seal(store, "small", planned))), "small", planned)  # type: ignore[arg-type]
    assert theirs == [ours]
    assert (pointer(store)["sequence"], len(manifests(store))) == (1, 1)


def test_of_two_concurrent_builders_of_different_versions_one_gets_a_conflict(
    store: Store, tmp_path: Path, files: list[Path]
) -> None:
    first = sealed(store, *files)
    theirs_planned = built(store, *files, source_file(tmp_path / "source", 8))
    ours_planned = built(store, *files, source_file(tmp_path / "source", 9))
    theirs: list[Manifest] = []
    late = RecordingStore(store, lambda: theirs.append(seal(store, "small", theirs_planned)))
    with pytest.raises(Conflict) as caught:
        seal(late, "small", ours_planned)  # type: ignore[arg-type]
    assert theirs[0].digest in str(caught.value)
    assert latest_manifest(store, "small") == theirs[0]
    ours = seal(store, "small", ours_planned)
    assert (theirs[0].parent, ours.parent) == (first.digest, theirs[0].digest)
    assert (pointer(store)["manifest"], pointer(store)["sequence"]) == (ours.digest, 3)


SEAL = """
import json, sys
from storage.errors import Conflict
from storage.stores.opening import open_store
from tests.storage.sealing import seal
url, planned = json.loads(sys.argv[1])
store = open_store(url)
print("ready", flush=True)
for dataset in sys.stdin:
    try:
        print(seal(store, dataset.strip(), planned).digest, flush=True)
    except Conflict:
        print("conflict", flush=True)
"""


def test_processes_that_seal_concurrently_make_one_version(store: Store, files: list[Path]) -> None:
    names = [f"set-{number}" for number in range(10)]
    for name in names:
        planned = built(store, *files, dataset=name)
    argument = json.dumps([store.url, planned])
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SEAL, argument], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    try:
        for process in processes:
            assert process.stdout and process.stdout.readline() == "ready\n"
        for name in names:
            for process in processes:
                assert process.stdin
                process.stdin.write(f"{name}\n")
                process.stdin.flush()
            answers = {process.stdout.readline().strip() for process in processes if process.stdout}
            digest = seal(store, name, planned).digest
            assert answers - {"conflict"} == {digest}
            assert (pointer(store, name)["manifest"], pointer(store, name)["sequence"]) == (digest, 1)
            assert len(manifests(store, name)) == 1
    finally:
        for process in processes:
            process.communicate()
    assert [process.returncode for process in processes] == [0] * 3

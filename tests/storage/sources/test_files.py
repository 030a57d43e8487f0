"""Source files: which ones a pattern finds, and that the digest depends on the content."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.errors import SourceInvalid
from storage.sources import documents, files, identity
from tests.making import write_parquet
from tests.storage.source_files import TEXTS, rows, texts_of, write_jsonl, write_lines, write_table

# Finding


@pytest.mark.parametrize("pattern", ["nothing.parquet", "*.parquet", "none/*.jsonl", "**/*.jsonl", "[", ""])
def test_a_source_that_names_no_file_is_refused(tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no \.parquet or \.jsonl file") as error:
        files.find_files(pattern)
    assert repr(pattern) in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=str(tmp_path)):
        files.find_files(str(tmp_path))


def test_a_file_of_another_format_is_refused_and_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").touch()
    (tmp_path / "b.csv").touch()
    for source in (f"{tmp_path}/*", f"{tmp_path}/b.csv"):
        with pytest.raises(ValueError, match=r"b\.csv.*\.parquet.*\.jsonl"):
            files.find_files(source)


def test_a_folder_gives_its_source_files_sorted_and_no_others(tmp_path: Path) -> None:
    for name in ("b.parquet", "a.jsonl", "c.parquet", "notes.txt", "_SUCCESS"):
        (tmp_path / name).touch()
    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "d.parquet").touch()
    assert [Path(place).name for place in files.find_files(str(tmp_path))] == ["a.jsonl", "b.parquet", "c.parquet"]


def test_a_folder_named_like_a_file_is_not_a_source_file(tmp_path: Path) -> None:
    (tmp_path / "spark.parquet").mkdir()
    (tmp_path / "a.parquet").touch()
    for source in (str(tmp_path), f"{tmp_path}/*.parquet"):
        assert [Path(place).name for place in files.find_files(source)] == ["a.parquet"]
    (tmp_path / "spark.parquet" / "part-0.parquet").touch()
    assert [Path(place).name for place in files.find_files(f"{tmp_path}/spark.parquet")] == ["part-0.parquet"]


def test_globs_are_sorted_and_may_be_recursive(tmp_path: Path) -> None:
    for name in ("b/2.jsonl", "a/1.jsonl", "c.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [str(Path(place).relative_to(tmp_path)) for place in files.find_files(f"{tmp_path}/**/*.jsonl")]
    assert names == ["a/1.jsonl", "b/2.jsonl", "c.jsonl"]


def test_a_path_that_looks_like_a_glob_is_found(tmp_path: Path) -> None:
    path = tmp_path / "data[1].parquet"
    path.touch()
    assert files.find_files(str(path)) == [str(path)]


# Identity


def test_identify_gives_name_size_and_sha256(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"12345")
    file = identity.identify(path)
    assert (file.name, file.size_bytes, file.place) == ("a.jsonl", 5, str(path))
    assert file.digest == hashlib.sha256(b"12345").hexdigest()


def aged(path: Path) -> Path:
    """Set the file's modification time back by a day."""
    os.utime(path, ns=(path.stat().st_mtime_ns - 86_400 * 10**9,) * 2)
    return path


def test_identify_reads_an_unchanged_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"12345")
    path = aged(tmp_path / "a.jsonl")
    first = identity.identify(path)

    def never(*_: object) -> Iterator[bytes]:
        pytest.fail("the file was read again")
        yield b""

    monkeypatch.setattr(identity, "_pieces", never)
    assert identity.identify(path) == first


def test_identify_notices_a_changed_size(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for body in (b"1", b"12", b"1"):
        path.write_bytes(body)
        assert identity.identify(path).digest == hashlib.sha256(body).hexdigest()


def test_identify_notices_a_changed_modification_time(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"1")
    identity.identify(aged(path))
    path.write_bytes(b"2")
    assert identity.identify(path).digest == hashlib.sha256(b"2").hexdigest()


def test_identify_notices_a_replaced_file(tmp_path: Path) -> None:
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    path.write_bytes(b"1")
    other.write_bytes(b"2")
    os.utime(path, ns=(10**18, 10**18))
    os.utime(other, ns=(10**18, 10**18))
    identity.identify(path)
    other.replace(path)
    assert identity.identify(path).digest == hashlib.sha256(b"2").hexdigest()


def test_identify_notices_an_immediate_rewrite(tmp_path: Path) -> None:
    """A file system's clock ticks every few milliseconds: two writes within one tick carry the same time."""
    path = tmp_path / "a.jsonl"
    for number in range(200):
        body = b"%03d" % number
        path.write_bytes(body)
        assert identity.identify(path).digest == hashlib.sha256(body).hexdigest()


@pytest.mark.parametrize("damage", [b"", b"0123", b"\xff\xfe", b"x" * 64])
def test_a_damaged_cached_digest_is_ignored(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"12345")
    first = identity.identify(aged(path))
    notes = [note for note in identity.REMEMBERED.rglob("*") if note.is_file()]
    assert len(notes) == 1
    notes[0].write_bytes(damage)
    assert identity.identify(path) == first


def test_a_home_that_cannot_be_written_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").write_text("a file")
    monkeypatch.setattr(identity, "REMEMBERED", tmp_path / "home" / "digests")
    (tmp_path / "a.jsonl").write_bytes(b"1")
    for _ in range(2):
        assert identity.identify(tmp_path / "a.jsonl").digest == hashlib.sha256(b"1").hexdigest()


def test_a_source_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceInvalid, match=r"gone\.parquet"):
        identity.identify(tmp_path / "gone.parquet")


# Every format


def test_every_suffix_has_a_reader() -> None:
    assert tuple(documents.READERS) == files.SUFFIXES


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_rows_past_the_end_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    write_parquet(path, TEXTS) if name == "a.parquet" else write_jsonl(path, TEXTS)
    with pytest.raises(SourceInvalid, match=rf"{name}.*{len(TEXTS) + 3}.*{len(TEXTS)}"):
        texts_of(path, 0, len(TEXTS) + 3)


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_the_text_may_be_in_another_column(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        write_table(path, {"text": [1, 2], "content": ["one", "two"]})
    else:
        write_lines(path, '{"text": 1, "content": "one"}', '{"text": 2, "content": "two"}')
    assert len(rows(path, "content").tokens) == 2
    assert texts_of(path, 0, 2, column="content") == ["one", "two"]

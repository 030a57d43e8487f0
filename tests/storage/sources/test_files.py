"""Source files: which ones a pattern finds, and that the digest depends on the content."""

import glob
import hashlib
import os
import re
import shutil
from pathlib import Path

import pytest

from storage.errors import SourceInvalid
from storage.sources import documents, files, reading, selection
from storage.sources.mirror import list_source
from storage.stores.opening import open_store
from tests.corpora import FORMATS
from tests.making import write_parquet
from tests.storage.source_files import TEXTS, rows, texts_of, write_jsonl, write_lines, write_table

# Finding


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def chosen(folder: Path, pattern: str = "") -> list[str]:
    places, _, _ = files.find_files(f"{folder}/{pattern}")
    return [str(Path(place).relative_to(folder)) for place in places]


def ignored(folder: Path, pattern: str = "") -> dict[str, str]:
    return dict(line.split(": ", 1) for line in files.find_files(f"{folder}/{pattern}")[1])


def written_source(error: pytest.ExceptionInfo[ValueError]) -> str:
    """The first source that the message says to write."""
    match = re.search(r"--set data\.source='([^']+)'", str(error.value))
    assert match is not None
    return match[1]


@pytest.mark.parametrize("pattern", ["nothing.parquet", "*.parquet", "none/*.jsonl", "**/*.jsonl", "[", "", "a/b.c"])
def test_a_source_that_names_no_file_is_refused(tmp_path: Path, pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no such file.*no readable file there") as error:
        files.find_files(pattern)
    assert repr(pattern) in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    "url", ["https://user:hidden@host/a.parquet", "S3://KEY:hidden@bucket/a", "s3a://KEY:hidden@b"]
)
def test_a_url_of_another_scheme_is_refused_without_its_secret(url: str) -> None:
    with pytest.raises(ValueError, match="s3://bucket") as error:
        files.find_files(url, "evaluation.hellaswag")
    assert "evaluation.hellaswag" in str(error.value)
    assert "hidden" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("b.txt", "text beside files of rows"),
        ("b.TXT.gz", "text beside files of rows"),
        ("b.jsonl.lz4", r"not a \.parquet, .*\.xz"),
        ("b.tar.gz", "not a"),
        ("b.gz", "not a"),
        ("b", "not a"),
        ("c.part.1", "not a"),
        ("readme.json.lz4", "not a"),
    ],
)
def test_a_file_of_another_format_is_an_error_unless_a_pattern_excludes_it(
    tmp_path: Path, name: str, problem: str
) -> None:
    touch(tmp_path, "a.parquet", name)
    for pattern in ("", "*"):
        with pytest.raises(ValueError, match=rf"'{name}' is {problem}") as error:
            files.find_files(f"{tmp_path}/{pattern}")
    assert files.find_files(written_source(error)) == (
        [f"{tmp_path}/a.parquet"],
        (f"{name}: not matched by the pattern",),
        f"{tmp_path}/",
    )
    if "text" not in problem:
        with pytest.raises(ValueError, match=rf"{name}.*\.parquet"):
            files.find_files(f"{tmp_path}/{name}")


@pytest.mark.parametrize("pattern", ["", "*", "**/*"])
@pytest.mark.parametrize(
    "name",
    ["_SUCCESS", ".gitattributes", ".a.parquet.crc", "_temporary/b.parquet", ".cache/c.jsonl", "_b.parquet",
     "b.parquet~", "b.parquet.tmp", "b.jsonl.part", "b.parquet.crdownload", "b.incomplete",
     "README.md", "readme", "LICENSE", "LICENCE.txt", "dataset_infos.json", "a.parquet.sha256", "MD5SUMS", "notes.md"],
)  # fmt: skip
def test_files_that_are_no_corpus_are_ignored_and_listed(tmp_path: Path, name: str, pattern: str) -> None:
    touch(tmp_path, "a.parquet", name)
    assert chosen(tmp_path, pattern) == ["a.parquet"]
    (first,) = ignored(tmp_path, pattern)
    assert name.startswith(first)
    if selection.suffix_of(name).format:
        assert chosen(tmp_path, name) == [name]  # it is the source


def test_a_listing_names_what_is_ignored(tmp_path: Path) -> None:
    touch(tmp_path, "texts/a.jsonl", "texts/README.md", "texts/b.csv")
    listing, _ = list_source(open_store(str(tmp_path / "store"), create=True), f"{tmp_path}/texts/*.jsonl", "", "", "")
    assert [line.partition(":")[0] for line in listing.ignored] == ["README.md", "b.csv"]


def test_many_ignored_files_are_counted(tmp_path: Path) -> None:
    touch(tmp_path, "a.parquet", *(f"_{number}" for number in range(1_000)))
    _, lines, _ = files.find_files(str(tmp_path))
    assert len(lines) < 50
    assert sum("hidden" in line for line in lines) + int(re.sub(r"\D", "", lines[-1])) == 1_000


def test_suffixes_are_read_in_any_case(tmp_path: Path) -> None:
    write_parquet(tmp_path / "A.PARQUET", TEXTS)
    write_jsonl(tmp_path / "b.JsonL", TEXTS)
    assert chosen(tmp_path) == ["A.PARQUET", "b.JsonL"]
    for name in chosen(tmp_path):
        assert texts_of(tmp_path / name, 0, len(TEXTS)) == TEXTS
        shutil.rmtree(tmp_path / f"0-{len(TEXTS)}")
        assert reading.identify(tmp_path / name).key.endswith(selection.READ_BY_ROWS)
    assert not files.is_on_hub("texts/A.PARQUET")


def test_a_sub_folder_with_files_is_an_error_unless_a_pattern_decides(tmp_path: Path) -> None:
    touch(tmp_path, "a.parquet", "b/c/d.parquet", "b/README.md")
    (tmp_path / "empty").mkdir()
    for pattern in ("", "*"):
        with pytest.raises(ValueError, match=r"'b/c/d\.parquet' is in a sub-folder") as error:
            files.find_files(f"{tmp_path}/{pattern}")
    assert len(files.find_files(written_source(error))[0]) == 2
    assert chosen(tmp_path, "*.parquet") == ["a.parquet"]
    (tmp_path / "b/c/d.parquet").rename(tmp_path / "b/c/d.csv")
    with pytest.raises(ValueError, match=r"'b/c/d\.csv' is in a sub-folder"):
        files.find_files(str(tmp_path))


@pytest.mark.parametrize(
    ("pattern", "names", "first", "second"),
    [
        ("data*", ["data.txt", "data-1.parquet", "other.parquet"], ["data-1.parquet"], []),
        ("data*", ["data/x.parquet", "data-1.parquet", "other.parquet"], ["data-1.parquet", "data/x.parquet"],
         ["data-1.parquet"]),
        ("**", ["a/x.parquet", "b.txt", "y.parquet"], ["a/x.parquet", "y.parquet"], []),
        ("*", ["a/x.parquet", "b.jsonl", "c.parquet"], ["a/x.parquet", "b.jsonl", "c.parquet"], []),
        ("e*/*", ["en/a.parquet", "en/b.txt", "fr/c.parquet"], ["en/a.parquet"], []),
    ],
)  # fmt: skip
def test_the_source_to_write_instead_keeps_to_the_pattern(
    tmp_path: Path, pattern: str, names: list[str], first: list[str], second: list[str]
) -> None:
    touch(tmp_path, *names)
    with pytest.raises(ValueError, match=r"leave them out|move them away") as error:
        files.find_files(f"{tmp_path}/{pattern}")
    written = re.findall(r"--set data\.source='([^']+)'", str(error.value))
    found = [[str(Path(place).relative_to(tmp_path)) for place in files.find_files(source)[0]] for source in written]
    assert found == [first, *([second] if second else [])]


def test_a_folder_named_like_a_file_is_not_a_source_file(tmp_path: Path) -> None:
    (tmp_path / "spark.parquet").mkdir()
    touch(tmp_path, "a.parquet")
    for pattern in ("", "*.parquet"):
        assert chosen(tmp_path, pattern) == ["a.parquet"]
    touch(tmp_path, "spark.parquet/part-0.parquet")
    assert chosen(tmp_path / "spark.parquet") == ["part-0.parquet"]
    for pattern in ("", "*.parquet"):
        with pytest.raises(ValueError, match=r"spark\.parquet/part-0\.parquet.*sub-folder") as error:
            files.find_files(f"{tmp_path}/{pattern}")
    assert len(files.find_files(written_source(error))[0]) == 2


@pytest.mark.parametrize(
    "names",
    [
        ["train-0.parquet", "test-0.parquet", "validation-0.parquet", "train-1.parquet"],
        ["train/0.parquet", "test/0.parquet", "val/0.parquet", "train/1.parquet"],
        ["train/a/0.parquet", "train/b/0.parquet", "dev/0.parquet"],
        ["web_train_000.jsonl", "web_train_001.jsonl", "web_val_000.jsonl"],
        ["train.jsonl", "train_extra.jsonl", "eval.jsonl", "README.md"],
        ["code_train.jsonl", "web_train.jsonl", "web_test.jsonl"],
        ["en/train/0.parquet", "fr/train/0.parquet", "fr/val/0.parquet"],
        ["Train-0.PARQUET", "Train-1.PARQUET", "Test-0.PARQUET"],
    ],
)
def test_several_splits_are_an_error_that_says_what_to_write(tmp_path: Path, names: list[str]) -> None:
    folder = tmp_path / "odd [1]"
    touch(folder, *names)
    source = f"{glob.escape(str(folder))}/**/*" if "/" in names[0] else str(folder)
    with pytest.raises(ValueError, match="splits") as error:
        files.find_files(source)
    places, _, _ = files.find_files(written_source(error))
    assert [str(Path(place).relative_to(folder)) for place in places] == [name for name in names if "rain" in name]


def test_the_folder_of_all_files_names_no_split(tmp_path: Path) -> None:
    touch(tmp_path, "validation_study/train.parquet", "validation_study/test.parquet")
    with pytest.raises(ValueError, match="splits") as error:
        files.find_files(f"{tmp_path}/**/*.parquet")
    assert files.find_files(written_source(error))[0] == [f"{tmp_path}/validation_study/train.parquet"]


def test_names_that_only_resemble_splits_are_one_corpus(tmp_path: Path) -> None:
    names = ["latest.jsonl", "pretraining.jsonl", "testament.jsonl", "trains.jsonl", "valley.jsonl"]
    touch(tmp_path, *names)
    assert chosen(tmp_path) == names


@pytest.mark.parametrize("pattern", ["", "*", "*.parquet", "gone.parquet"])
def test_a_dangling_link_is_an_error(tmp_path: Path, pattern: str) -> None:
    touch(tmp_path, "a.parquet")
    (tmp_path / "gone.parquet").symlink_to(tmp_path / "nowhere")
    with pytest.raises(SourceInvalid, match=r"gone\.parquet"):
        files.find_files(f"{tmp_path}/{pattern}")


@pytest.mark.parametrize("pattern", ["", "**/*.parquet", "*/*.parquet", "**"])
def test_a_dangling_link_to_a_folder_is_an_error(tmp_path: Path, pattern: str) -> None:
    touch(tmp_path, "texts/a.parquet", "texts/.lock")
    (tmp_path / "more").symlink_to(tmp_path / "unmounted")
    with pytest.raises(SourceInvalid, match="more"):
        files.find_files(f"{tmp_path}/{pattern}")
    (tmp_path / "more").rename(tmp_path / ".#more")  # as editors write locks
    assert chosen(tmp_path, "*/*.parquet") == ["texts/a.parquet"]
    touch(tmp_path, "b.parquet")
    (tmp_path / ".#more").rename(tmp_path / "more")
    assert chosen(tmp_path, "*.parquet") == ["b.parquet"]


def test_a_pipe_is_an_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    for pattern in ("", "*", "a.jsonl"):
        with pytest.raises(ValueError, match=r"a\.jsonl"):
            files.find_files(f"{tmp_path}/{pattern}")


def test_loops_of_links_end_and_each_file_counts_once(tmp_path: Path) -> None:
    touch(tmp_path, "texts/a.parquet", "texts/b/c.parquet")
    (tmp_path / "texts/b/loop").symlink_to(tmp_path / "texts")
    (tmp_path / "texts/same").symlink_to(tmp_path / "texts/b")
    assert chosen(tmp_path / "texts", "**/*.parquet") == ["a.parquet", "b/c.parquet"]
    assert ignored(tmp_path / "texts", "**/*.parquet").keys() == {"b/loop/", "same/"}
    (tmp_path / "linked").symlink_to(tmp_path / "texts/b")
    with pytest.raises(ValueError, match="b/c"):
        files.find_files(str(tmp_path / "texts"))
    assert chosen(tmp_path, "linked/*.parquet") == ["linked/c.parquet"]


def test_a_name_that_is_not_utf8_is_an_error_that_can_be_printed(tmp_path: Path) -> None:
    try:
        (tmp_path / os.fsdecode(b"a\xff.jsonl")).touch()
    except OSError:
        pytest.skip("this file system only has names in UTF-8")
    with pytest.raises(ValueError, match="UTF-8") as error:
        files.find_files(str(tmp_path))
    assert str(error.value).encode()
    touch(tmp_path, "b.parquet")
    assert [line.encode() for line in files.find_files(f"{tmp_path}/*.parquet")[1]]


def test_globs_are_sorted_and_may_be_recursive(tmp_path: Path) -> None:
    touch(tmp_path, "b/2.jsonl", "a/1.jsonl", "c.jsonl", "a/b/c/3.jsonl", "a/b/4.parquet")
    assert chosen(tmp_path, "**/*.jsonl") == ["a/1.jsonl", "a/b/c/3.jsonl", "b/2.jsonl", "c.jsonl"]
    assert (
        chosen(tmp_path, "**") == chosen(tmp_path, "**/*") == sorted([*chosen(tmp_path, "**/*.jsonl"), "a/b/4.parquet"])
    )
    for pattern in ("*/[!b].jsonl", "*/[^b].jsonl", "[^c]/?.jsonl"):
        assert chosen(tmp_path, pattern) == ["a/1.jsonl", "b/2.jsonl"]
    assert chosen(tmp_path, "[ab]/?.jsonl") == ["a/1.jsonl", "b/2.jsonl"]
    assert chosen(tmp_path, "a/**/c/*") == ["a/b/c/3.jsonl"]


def test_a_path_that_looks_like_a_glob_is_found(tmp_path: Path) -> None:
    touch(tmp_path, "data[1].parquet", "odd [2]/b.parquet")
    assert chosen(tmp_path, "data[1].parquet") == ["data[1].parquet"]
    assert chosen(tmp_path, "odd [2]") == ["odd [2]/b.parquet"]


# Identity


def test_identify_gives_name_size_and_sha256(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"12345")
    file = reading.identify(path)
    assert (file.name, file.size_bytes, file.place) == ("a.jsonl", 5, str(path))
    assert file.digest == hashlib.sha256(b"12345").hexdigest()


def aged(path: Path) -> Path:
    """Set the file's modification time back by a day."""
    os.utime(path, ns=(path.stat().st_mtime_ns - 86_400 * 10**9,) * 2)
    return path


def test_identify_reads_an_unchanged_file_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"12345")
    path = aged(tmp_path / "a.jsonl")
    first = reading.identify(path)

    def never(*_: object) -> None:
        pytest.fail("the file was read again")

    monkeypatch.setattr(hashlib, "file_digest", never)
    assert reading.identify(path) == first


def test_identify_notices_a_changed_size(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for body in (b"1", b"12", b"1"):
        path.write_bytes(body)
        assert reading.identify(path).digest == hashlib.sha256(body).hexdigest()


def test_identify_notices_a_changed_modification_time(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"1")
    reading.identify(aged(path))
    path.write_bytes(b"2")
    assert reading.identify(path).digest == hashlib.sha256(b"2").hexdigest()


def test_identify_notices_a_replaced_file(tmp_path: Path) -> None:
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    path.write_bytes(b"1")
    other.write_bytes(b"2")
    os.utime(path, ns=(10**18, 10**18))
    os.utime(other, ns=(10**18, 10**18))
    reading.identify(path)
    other.replace(path)
    assert reading.identify(path).digest == hashlib.sha256(b"2").hexdigest()


def test_identify_notices_an_immediate_rewrite(tmp_path: Path) -> None:
    """A file system's clock ticks every few milliseconds: two writes within one tick carry the same time."""
    path = tmp_path / "a.jsonl"
    for number in range(200):
        body = b"%03d" % number
        path.write_bytes(body)
        assert reading.identify(path).digest == hashlib.sha256(body).hexdigest()


@pytest.mark.parametrize("damage", [b"", b"0123", b"\xff\xfe", b"x" * 64])
def test_a_damaged_cached_digest_is_ignored(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"12345")
    first = reading.identify(aged(path))
    notes = [note for note in reading.REMEMBERED.rglob("*") if note.is_file()]
    assert len(notes) == 1
    notes[0].write_bytes(damage)
    assert reading.identify(path) == first


def test_a_home_that_cannot_be_written_only_costs_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home").write_text("a file")
    monkeypatch.setattr(reading, "REMEMBERED", tmp_path / "home" / "digests")
    (tmp_path / "a.jsonl").write_bytes(b"1")
    for _ in range(2):
        assert reading.identify(tmp_path / "a.jsonl").digest == hashlib.sha256(b"1").hexdigest()


def test_a_source_file_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceInvalid, match=r"gone\.parquet"):
        reading.identify(tmp_path / "gone.parquet")


# Every format


def test_every_suffix_has_a_reader() -> None:
    assert tuple(documents.READERS) == selection.READ_BY_ROWS
    assert {kind for kind, _ in FORMATS.values()} == set(selection.FORMATS)


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

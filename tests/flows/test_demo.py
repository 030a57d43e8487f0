"""The demo: its corpus is deterministic, and a longer demo is a separate run."""

import sysconfig
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from flows.console.options import check_inputs
from flows.demo import FILES, lasting, prose, write_corpus
from flows.download import list_files
from model import tokenizer
from model.config import RunConfig
from model.config_file import load_config
from storage.stores.opening import open_store

SENTENCE = "This is a sentence about the number {} of a list, and it is long enough to be a document of the corpus."
MODULE = '''
class Reader:
    """{}"""

    def read(self):
        """{}"""

def write():
    """{}"""
'''
TOPICS = "topics = {{'if': {!r}, 'tables': '----- ----- a=1 b=2'}}"


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of 30 modules of documentation, one of them invalid."""
    library = tmp_path / "library"
    for folder in ("pydoc_data", "test"):
        (library / folder).mkdir(parents=True)
    for number in range(30):
        sentences = [SENTENCE.format(f"{number} and {part}") for part in range(3)]
        (library / f"module_{number}.py").write_text(MODULE.format(*sentences))
    (library / "same.py").write_text((library / "module_0.py").read_text())
    (library / "wrong.py").write_text("print 'no Python 3'")
    (library / "test" / "test_it.py").write_text(MODULE.format(*["Not in every installation. " + SENTENCE] * 3))
    (library / "pydoc_data" / "topics.py").write_text(TOPICS.format(SENTENCE.format("of topics")))
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(library))
    return library


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("place", ["console", "flow"])
def test_the_preset_demo_writes_its_corpus(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(Path("demo"), [])
    if place == "console":
        check_inputs(config, "tokenise")
    else:
        list_files.fn(config.data, open_store("./store", create=True).url)
    assert len(list(tmp_path.glob(config.data.source))) == FILES


@pytest.mark.usefixtures("library")
def test_the_corpus_holds_each_document_once_and_is_the_same_each_time(tmp_path: Path) -> None:
    paths = write_corpus(tmp_path / "first")
    rows = [row for path in paths for row in pq.read_table(path).to_pylist()]
    texts = [row["text"] for row in rows]
    assert len(texts) == len(set(texts)) == 61  # a class, with its methods, and a function of 30 modules; a topic
    assert all(row == {"text": row["text"], "token_count": len(tokenizer.encode(row["text"]))} for row in rows)
    assert not any("every installation" in text for text in texts)
    again = write_corpus(tmp_path / "again")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]
    assert sorted(path.name for path in again) == sorted(path.name for path in (tmp_path / "again").iterdir())


def test_an_existing_corpus_is_kept(tmp_path: Path, library: Path) -> None:
    paths = write_corpus(tmp_path / "corpus")
    before = [path.stat().st_mtime_ns for path in paths]
    (library / "new.py").write_text(MODULE.format(*[SENTENCE.format("new")] * 3))
    assert write_corpus(tmp_path / "corpus") == paths
    assert [path.stat().st_mtime_ns for path in paths] == before


def test_prose_is_whole_sentences_without_code_tables_and_line_breaks() -> None:
    wrapped = "Return the file that is\n    read by this function, or the name\n    of it if it is not a file."
    code = ">>> the = reader.read_of_a(file)\n>>> if the file is in the list"
    options = "borderwidth, cursor, highlightbackground, highlightcolor, relief, takefocus, width, class"
    assert prose(f"{code}\n\n{wrapped}\n  \n{options}\n\nToo short.") == " ".join(wrapped.split())
    assert prose("Raise an error if the name of the file is a lone \ud800 in this text.").endswith("? in this text.")


def test_a_longer_demo_is_a_separate_run_with_proportionally_more_steps() -> None:
    demo = load_config(Path("demo"), [])
    assert lasting(demo, 3) == demo
    longer = lasting(demo, 15)
    assert longer.name == "demo-15"
    assert longer.train.max_steps == 7 * demo.train.max_steps  # 14 minutes of training in place of 2
    assert RunConfig.model_validate(longer.model_dump()) == longer
    assert longer.data == demo.data
    shorter = lasting(demo, 2)
    assert shorter.train.warmup_steps < shorter.train.max_steps < demo.train.max_steps

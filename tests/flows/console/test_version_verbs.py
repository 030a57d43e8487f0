"""The verbs that look at versions, as the console calls them: log, diff, show, trace, export."""

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from flows.console import cli
from flows.inspection.trace import asked, windows
from flows.pages.dataset_card import page
from model import tokenizer
from storage.datasets.manifest import Manifest
from storage.datasets.versions import difference
from storage.inspection.summary import summarise
from storage.keys import DatasetKeys
from storage.sources import identity
from tests.crawl import Crawl, crawled, write_crawl
from tests.flows.client import run_gpt2


class Said(NamedTuple):
    """What the console left: its exit code and what it printed."""

    code: int
    out: str
    error: str

    @property
    def json(self) -> list[Any]:
        """A value of each line."""
        assert self.code == 0, self.error
        return [json.loads(line) for line in self.out.splitlines()]


class Versions(NamedTuple):
    """A dataset of two versions; in the second a file is new and one changed."""

    crawl: Crawl
    first: Manifest
    second: Manifest

    @property
    def words(self) -> list[str]:
        config = self.crawl.config
        values = {"store_url": config.store_url, "data.dataset": "small", "data.source": config.data.source}
        values |= {"train.sequence_tokens": 32, "train.micro_batch_sequences": 2, "train.batch_tokens": 256}
        return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


def made(folder: Path) -> Versions:
    crawl = Crawl(folder)
    first = crawl.build()
    crawl.write("file_1.parquet", crawl.rows["file_1.parquet"][:-1])
    crawl.write("file_2.parquet", [crawled(2, number) for number in range(40)])
    return Versions(crawl, first, crawl.build())


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Versions:
    """For tests that change nothing."""
    folder = tmp_path_factory.mktemp("versions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity, "REMEMBERED", folder / "digests")
        return made(folder)


Ask = Callable[..., Said]


@pytest.fixture
def gpt2(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ask:
    """A verb of `gpt2 dataset` with the settings of a dataset and some words, in this process."""
    monkeypatch.chdir(tmp_path)

    def run(versions: Versions, verb: str, *words: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["gpt2", "dataset", verb, *versions.words, *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        found = capsys.readouterr()
        return Said(int(ended.value.code or 0), found.out, found.err)

    return run


def tokens(manifest: Manifest) -> int:
    return sum(row.tokens for row in manifest.rows())


# Versions


def test_log_tells_each_version_and_what_changed(versions: Versions, gpt2: Ask) -> None:
    newest, oldest = gpt2(versions, "log", "--json").json
    for line, manifest in ((newest, versions.second), (oldest, versions.first)):
        assert (line["manifest"], line["tokens"]) == (manifest.digest, tokens(manifest))
        assert (line["shards"], line["commit"]) == (len(manifest.shard_ids), None)
        at = versions.crawl.store.stat(DatasetKeys("small").manifest(manifest.digest)).modified
        assert datetime.fromisoformat(line["sealed"]) == datetime.fromtimestamp(int(at), UTC)
    assert newest["changes"] == difference(versions.first, versions.second)
    assert oldest["changes"] is None
    said = gpt2(versions, "log")
    assert said.code == 0
    assert said.out.index(versions.second.digest[:12]) < said.out.index(versions.first.digest[:12])
    assert f"{tokens(versions.second):,}" in said.out


def test_diff_tells_what_one_holds_that_the_other_does_not(versions: Versions, gpt2: Ask) -> None:
    old, new = versions.first.digest[:12], versions.second.digest[:12]
    forth, back = difference(versions.first, versions.second), difference(versions.second, versions.first)
    assert gpt2(versions, "diff", old, new, "--json").json == gpt2(versions, "diff", old, "--json").json == [forth]
    assert gpt2(versions, "diff", new, old, "--json").json == [back]
    said = gpt2(versions, "diff", old)
    assert said.code == 0
    for name in ("file_1.parquet", "file_2.parquet", f"{forth['tokens']['added']:,}"):
        assert name in said.out
    assert "file_0.parquet" not in said.out


def test_show_prints_the_card_or_writes_its_page(versions: Versions, gpt2: Ask, tmp_path: Path) -> None:
    newest, oldest = (
        summarise(versions.crawl.store, "small", one).to_json() for one in (versions.second, versions.first)
    )
    assert gpt2(versions, "show", "--json").json == [newest]
    assert gpt2(versions, "show", "--json", "--version", versions.first.digest[:12]).json == [oldest]
    said = gpt2(versions, "show")
    assert (said.code, versions.second.digest in said.out, "file_2.parquet" in said.out) == (0, True, True)
    assert gpt2(versions, "show", "--html", str(tmp_path / "card.html")).code == 0
    assert (tmp_path / "card.html").read_bytes() == page(newest)
    said = gpt2(versions, "show", "--html", str(tmp_path / "nowhere" / "card.html"))
    assert (said.code, str(tmp_path / "nowhere") in said.error) == (2, True)


@pytest.mark.parametrize(
    "words", [["diff", "none-such"], ["diff", "latest", "none-such"], ["show", "--version", "none-such"],
              ["export", "to", "--format", "llmc", "--version", "none-such"]],
)  # fmt: skip
def test_an_unknown_version_is_exit_code_2(versions: Versions, gpt2: Ask, words: list[str]) -> None:
    said = gpt2(versions, *words)
    assert (said.code, said.out) == (2, "")
    assert "none-such" in said.error
    assert versions.second.digest[:12] in said.error


@pytest.mark.parametrize(
    "words", [["log"], ["diff", "latest"], ["show"], ["trace", "--window", "0"], ["export", "to", "--format", "llmc"]]
)
def test_a_dataset_that_was_never_sealed_is_exit_code_2(versions: Versions, gpt2: Ask, words: list[str]) -> None:
    said = gpt2(versions, *words, "--set", "data.dataset=other")
    assert (said.code, said.out, "'other'" in said.error) == (2, "", True)


# Trace


@pytest.mark.parametrize(("split", "window"), [("train", 0), ("train", 1_000), ("val", 3)])
def test_trace_prints_a_windows_documents(versions: Versions, gpt2: Ask, split: str, window: int) -> None:
    crawl = versions.crawl
    found = gpt2(versions, "trace", "--split", split, "--window", str(window), "--json").json
    expected = list(windows(crawl.store, crawl.config, asked(crawl.store, crawl.config), split, window, 1))
    assert len(found) == len(expected) > 0
    said = gpt2(versions, "trace", "--split", split, "--window", str(window))
    for line, (number, document) in zip(found, expected, strict=True):
        facts = document._asdict() | {"ids": document.ids.tolist(), "window": number}
        assert {name: line[name] for name in facts} == facts
        assert line["text"] == tokenizer.decode([token for token in line["ids"] if token != tokenizer.EOT])
        assert line["text"] in crawl.rows[line["source"]][line["row"]]["text"]
        for part in (line["text"], line["source"], line["url"], line["id"], f"{line['row']:,}", line["shard_id"]):
            assert part in said.out


def test_trace_prints_the_text_and_why_when_the_source_is_gone(gpt2: Ask, tmp_path: Path) -> None:
    versions = made(tmp_path)
    crawl = versions.crawl
    before = gpt2(versions, "trace", "--window", "0", "--json").json
    for name in list(crawl.rows):
        crawl.write(name, None)
    found = gpt2(versions, "trace", "--window", "0", "--json").json
    assert [line["ids"] for line in found] == [line["ids"] for line in before]
    assert all(line["row"] is None and line["why"] for line in found)
    said = gpt2(versions, "trace", "--window", "0")
    for line in found:
        assert line["text"] in said.out
        assert line["why"] in said.out
    said = gpt2(versions, "trace", "--step", "1")
    assert all(f"window {number}" in said.out for number in range(8, 16))
    assert found[0]["why"] in said.out


@pytest.mark.parametrize("kind", ["number", "bytes", "time"])
def test_trace_prints_whatever_names_a_document(gpt2: Ask, tmp_path: Path, kind: str) -> None:
    versions = made(tmp_path)
    crawl = versions.crawl
    identities = {
        "number": lambda number: number, "bytes": lambda number: bytes([number]),
        "time": lambda number: datetime(2024, 1, 1, 0, number, tzinfo=UTC),
    }  # fmt: skip
    for name, rows in crawl.rows.items():
        write_crawl(crawl.source / name, [row | {"id": identities[kind](n)} for n, row in enumerate(rows)])
    crawl.build()
    found = gpt2(versions, "trace", "--step", "1", "--json").json
    assert all(line["id"] is not None for line in found)
    if kind == "number":
        assert all(line["id"] == line["row"] for line in found)


@pytest.mark.parametrize(
    "words",
    [
        [], ["--window", "0", "--step", "0"], ["--window", "0", "--checkpoint", "4"],
        ["--step", "0", "--checkpoint", "4"],
        ["--window", "0", "--evaluation", "val_loss"], ["--step", "0", "--split", "val"], ["--window", "-1"],
        ["--window", "1000000", "--split", "val"], ["--window", "one"], ["--split", "test", "--window", "0"],
        ["--checkpoint", "4"], ["--evaluation", "val_loss"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_what_cannot_be_traced_is_exit_code_2(versions: Versions, gpt2: Ask, words: list[str]) -> None:
    said = gpt2(versions, "trace", *words)
    assert (said.code, said.out) == (2, "")
    assert len(said.error) > 40


def test_a_wrong_combination_is_a_message_of_the_console(versions: Versions, tmp_path: Path) -> None:
    code, said = run_gpt2("dataset", "trace", "--window", "0", "--step", "0", *versions.words, cwd=tmp_path)
    assert (code, "error: " in said, "Traceback" in said) == (2, True, False)
    for word in ("--window", "--step", "--checkpoint"):
        assert word in said


# Export


def test_export_writes_a_version_for_each_program(versions: Versions, gpt2: Ask, tmp_path: Path) -> None:
    crawl, to = versions.crawl, tmp_path / "to"
    for layout, pattern, skip in (("nanogpt", "train.bin", 0), ("llmc", "small_train_*.bin", 1024)):
        for version, manifest in (("latest", versions.second), (versions.first.digest[:12], versions.first)):
            folder = to / layout / version
            said = gpt2(versions, "export", str(folder), "--format", layout, "--version", version)
            assert (said.code, str(folder) in said.out, manifest.digest[:12] in said.out) == (0, True, True)
            (file,) = folder.glob(pattern)
            assert np.array_equal(np.fromfile(file, "<u2", offset=skip), crawl.ids(manifest, "train"))
            assert gpt2(versions, "export", str(folder), "--format", layout, "--version", version).out == said.out
    said = gpt2(versions, "export", str(to / "llmc" / "latest"), "--format", "nanogpt")
    assert (said.code, str(to / "llmc" / "latest") in said.error) == (2, True)
    assert gpt2(versions, "export", str(to / "other"), "--format", "gguf").code == 2
    assert not (to / "other").exists()

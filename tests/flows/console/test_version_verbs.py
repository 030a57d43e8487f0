"""The verbs that read versions: log, diff, show, trace, export."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from flows.inspection.trace import trace_target, windows
from flows.pages.dataset_card import page
from model import tokenizer
from storage.datasets.manifest import Manifest
from storage.datasets.versions import difference
from storage.inspection.summary import summarise
from storage.keys import DatasetKeys
from storage.sources import reading
from tests.crawl import Crawl, crawled, write_crawl
from tests.flows.in_process import Gpt2, Outcome


class Versions(NamedTuple):
    """A dataset of two versions: the second has a new file and a changed one."""

    crawl: Crawl
    first: Manifest
    second: Manifest

    @property
    def settings(self) -> list[str]:
        config = self.crawl.config
        values = {"store_url": config.store_url, "data.dataset": "small", "data.source": config.data.source}
        values |= {"train.sequence_tokens": 32, "train.micro_batch_sequences": 2, "train.batch_tokens": 256}
        return [argument for name, value in values.items() for argument in ("--set", f"{name}={value}")]


def two_versions(folder: Path) -> Versions:
    crawl = Crawl(folder)
    first = crawl.build()
    crawl.write("file_1.parquet", crawl.rows["file_1.parquet"][:-1])
    crawl.write("file_2.parquet", [crawled(2, number) for number in range(40)])
    return Versions(crawl, first, crawl.build())


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Versions:
    """Shared, for tests that change nothing."""
    folder = tmp_path_factory.mktemp("versions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "REMEMBERED", folder / "digests")
        return two_versions(folder)


RunVerb = Callable[..., Outcome]


@pytest.fixture
def run_verb(gpt2: Gpt2, tmp_path: Path) -> RunVerb:
    """A function that runs a verb of `gpt2 dataset` with a dataset's settings and more arguments."""

    def run(versions: Versions, verb: str, *arguments: str) -> Outcome:
        return gpt2("dataset", verb, *versions.settings, *arguments, cwd=tmp_path)

    return run


def tokens(manifest: Manifest) -> int:
    return sum(row.tokens for row in manifest.rows())


# Versions


def test_log_lists_each_version_and_its_changes(versions: Versions, run_verb: RunVerb) -> None:
    newest, oldest = run_verb(versions, "log", "--json").json_lines
    for line, manifest in ((newest, versions.second), (oldest, versions.first)):
        assert (line["manifest"], line["tokens"]) == (manifest.digest, tokens(manifest))
        assert (line["shards"], line["commit"]) == (len(manifest.shard_ids), None)
        at = versions.crawl.store.stat(DatasetKeys("small").manifest(manifest.digest)).modified
        assert datetime.fromisoformat(line["sealed"]) == datetime.fromtimestamp(int(at), UTC)
    assert newest["changes"] == difference(versions.first, versions.second).model_dump()
    assert oldest["changes"] is None
    outcome = run_verb(versions, "log")
    assert outcome.code == 0
    assert outcome.out.index(versions.second.digest[:12]) < outcome.out.index(versions.first.digest[:12])
    assert f"{tokens(versions.second):,}" in outcome.out


def test_diff_names_the_files_that_differ(versions: Versions, run_verb: RunVerb) -> None:
    old, new = versions.first.digest[:12], versions.second.digest[:12]
    forward, backward = (
        difference(versions.first, versions.second).model_dump(),
        difference(versions.second, versions.first).model_dump(),
    )
    for arguments in ([], [old], [old, new]):
        assert run_verb(versions, "diff", "small", *arguments, "--json").json_lines == [forward]
    assert run_verb(versions, "diff", "small", new, old, "--json").json_lines == [backward]
    outcome = run_verb(versions, "diff", "small", old)
    assert outcome.code == 0
    for name in ("file_1.parquet", "file_2.parquet", f"{forward['tokens']['added']:,}"):
        assert name in outcome.out
    assert "file_0.parquet" not in outcome.out


def test_show_prints_the_card_or_writes_its_page(versions: Versions, run_verb: RunVerb, tmp_path: Path) -> None:
    newest, oldest = (
        summarise(versions.crawl.store, "small", version) for version in (versions.second, versions.first)
    )
    assert run_verb(versions, "show", "--json").json_lines == [newest.model_dump(mode="json")]
    oldest_card = run_verb(versions, "show", "--json", "--version", versions.first.digest[:12])
    assert oldest_card.json_lines == [oldest.model_dump(mode="json")]
    outcome = run_verb(versions, "show")
    assert (outcome.code, versions.second.digest in outcome.out, "file_2.parquet" in outcome.out) == (0, True, True)
    assert run_verb(versions, "show", "--html", str(tmp_path / "card.html")).code == 0
    assert (tmp_path / "card.html").read_bytes() == page(newest)
    outcome = run_verb(versions, "show", "--html", str(tmp_path / "nowhere" / "card.html"))
    assert (outcome.code, str(tmp_path / "nowhere") in outcome.err) == (2, True)


@pytest.mark.parametrize(
    "arguments", [["diff", "small", "none-such"], ["diff", "small", "latest", "none-such"],
              ["show", "--version", "none-such"],
              ["export", "--to", "to", "--format", "llmc", "--version", "none-such"]],
)  # fmt: skip
def test_an_unknown_version_is_exit_code_2(versions: Versions, run_verb: RunVerb, arguments: list[str]) -> None:
    outcome = run_verb(versions, *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert "none-such" in outcome.err
    assert versions.second.digest[:12] in outcome.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["log"],
        ["diff", "other", "latest"],
        ["show"],
        ["trace", "--window", "0"],
        ["export", "--to", "to", "--format", "llmc"],
    ],
)
def test_a_dataset_that_was_never_sealed_is_exit_code_2(
    versions: Versions, run_verb: RunVerb, arguments: list[str]
) -> None:
    outcome = run_verb(versions, *arguments, "--set", "data.dataset=other")
    assert (outcome.code, outcome.out, "'other'" in outcome.err) == (2, "", True)


# Trace


@pytest.mark.parametrize(("split", "window"), [("train", 0), ("train", 1_000), ("val", 3)])
def test_trace_prints_the_documents_of_a_window(versions: Versions, run_verb: RunVerb, split: str, window: int) -> None:
    crawl = versions.crawl
    lines = run_verb(versions, "trace", "--split", split, "--window", str(window), "--json").json_lines
    expected = list(windows(crawl.store, trace_target(crawl.store, crawl.config), split, window, 1))
    assert len(lines) == len(expected) > 0
    outcome = run_verb(versions, "trace", "--split", split, "--window", str(window))
    for line, (number, document) in zip(lines, expected, strict=True):
        facts = document._asdict() | {"ids": document.ids.tolist(), "window": number}
        assert {name: line[name] for name in facts} == facts
        assert line["text"] == tokenizer.decode([token for token in line["ids"] if token != tokenizer.EOT])
        assert line["text"] in crawl.rows[line["source"]][line["row"]]["text"]
        for part in (line["text"], line["source"], line["url"], line["id"], f"{line['row']:,}", line["shard_id"]):
            assert part in outcome.out


def test_trace_prints_the_text_and_a_reason_when_the_source_is_gone(run_verb: RunVerb, tmp_path: Path) -> None:
    versions = two_versions(tmp_path)
    crawl = versions.crawl
    before = run_verb(versions, "trace", "--window", "0", "--json").json_lines
    for name in list(crawl.rows):
        crawl.write(name, None)
    lines = run_verb(versions, "trace", "--window", "0", "--json").json_lines
    assert [line["ids"] for line in lines] == [line["ids"] for line in before]
    assert all(line["row"] is None and line["why"] for line in lines)
    outcome = run_verb(versions, "trace", "--window", "0")
    for line in lines:
        assert line["text"] in outcome.out
        assert line["why"] in outcome.out
    outcome = run_verb(versions, "trace", "--step", "1")
    assert all(f"window {number}" in outcome.out for number in range(8, 16))
    assert lines[0]["why"] in outcome.out


@pytest.mark.parametrize("kind", ["number", "bytes", "time"])
def test_trace_prints_document_ids_of_any_type(run_verb: RunVerb, tmp_path: Path, kind: str) -> None:
    versions = two_versions(tmp_path)
    crawl = versions.crawl
    identities = {
        "number": lambda number: number, "bytes": lambda number: bytes([number]),
        "time": lambda number: datetime(2024, 1, 1, 0, number, tzinfo=UTC),
    }  # fmt: skip
    for name, rows in crawl.rows.items():
        write_crawl(crawl.source / name, [row | {"id": identities[kind](n)} for n, row in enumerate(rows)])
    crawl.build()
    lines = run_verb(versions, "trace", "--step", "1", "--json").json_lines
    assert all(line["id"] is not None for line in lines)
    if kind == "number":
        assert all(line["id"] == line["row"] for line in lines)


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["--window", "0", "--step", "0"], ["--step", "0", "--split", "val"], ["--window", "-1"],
        ["--window", "1000000", "--split", "val"], ["--window", "one"], ["--split", "test", "--window", "0"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_an_invalid_trace_is_exit_code_2(versions: Versions, run_verb: RunVerb, arguments: list[str]) -> None:
    outcome = run_verb(versions, "trace", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert len(outcome.err) > 40


@pytest.mark.parametrize("arguments", [[], ["--window", "0", "--step", "0"]], ids=" ".join)
def test_a_wrong_combination_names_both_options(versions: Versions, run_verb: RunVerb, arguments: list[str]) -> None:
    error = run_verb(versions, "trace", *arguments).error
    assert "--window" in error
    assert "--step" in error


# Export


def test_export_writes_a_version_for_each_program(versions: Versions, run_verb: RunVerb, tmp_path: Path) -> None:
    crawl, to = versions.crawl, tmp_path / "to"
    for layout, pattern, skip in (("nanogpt", "train.bin", 0), ("llmc", "small_train_*.bin", 1024)):
        for version, manifest in (("latest", versions.second), (versions.first.digest[:12], versions.first)):
            folder = to / layout / version
            outcome = run_verb(versions, "export", "--to", str(folder), "--format", layout, "--version", version)
            assert (outcome.code, str(folder) in outcome.out, manifest.digest[:12] in outcome.out) == (0, True, True)
            (file,) = folder.glob(pattern)
            assert np.array_equal(np.fromfile(file, "<u2", offset=skip), crawl.ids(manifest, "train"))
    outcome = run_verb(versions, "export", "--to", str(to / "llmc" / "latest"), "--format", "nanogpt")
    assert (outcome.code, str(to / "llmc" / "latest") in outcome.err) == (2, True)
    assert run_verb(versions, "export", "--to", str(to / "other"), "--format", "gguf").code == 2
    assert not (to / "other").exists()

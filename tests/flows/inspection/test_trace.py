"""Every window is traced to its source rows; its text is shown even when the source is gone."""

from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from flows.inspection.trace import TraceTarget, trace_target, windows
from model.config import RunConfig
from model.runs.run import pin_run
from storage.datasets.records import read_record
from storage.errors import ObjectMissing
from storage.inspection.lineage import Traced, hub_files, source_rows
from storage.loading.order import WindowOrder
from storage.loading.windows import Windows
from storage.sources import reading
from storage.sources.mirror import mirror
from storage.stores import retries
from tests.crawl import BARE, GOOD, LONG, SKIPPING, Crawl, Kept
from tests.hub import Hub
from tests.making import build_dataset, tiny_config

T = 32
EXTRA_WINDOWS = 7  # of the second epoch


def order_of(target: TraceTarget, split: str) -> WindowOrder:
    return WindowOrder([row.tokens for row in target.manifest.rows(split)], T, target.train.seed)


def loader(crawl: Crawl, target: TraceTarget, split: str) -> Windows:
    seed = crawl.config.train.seed
    return Windows(crawl.store, "small", target.manifest, split, sequence_tokens=T, seed=seed)


def traced(crawl: Crawl, target: TraceTarget, split: str, first: int, count: int) -> list[list[Traced]]:
    """The documents of each window."""
    pairs = list(windows(crawl.store, target, split, first, count))
    grouped = [(number, [document for _, document in parts]) for number, parts in groupby(pairs, lambda part: part[0])]
    assert [number for number, _ in grouped] == list(range(first, first + count))
    return [documents for _, documents in grouped]


def whole_split(crawl: Crawl, target: TraceTarget, split: str) -> tuple[np.ndarray, WindowOrder, list[list[Traced]]]:
    """All windows of a split (and some of the next epoch) from the loader and from the trace."""
    order = order_of(target, split)
    if split == "train":
        count = order.epoch_windows + EXTRA_WINDOWS
        read = loader(crawl, target, split).read(0, count)
    else:
        count = order.epoch_windows
        read = loader(crawl, target, split).read_in_file_order(np.arange(count))
    return read, order, traced(crawl, target, split, 0, count)


def check_split(crawl: Crawl, target: TraceTarget, split: str) -> None:
    """Assert that the tokens equal the loader's and each document is the source row at that position in the shard."""
    read, order, traced_windows = whole_split(crawl, target, split)
    rows = list(target.manifest.rows(split))
    expected = crawl.shard_documents(target.manifest)
    located = (
        order.locate(0, len(traced_windows))
        if split == "train"
        else order.in_file_order(np.arange(len(traced_windows)))
    )
    starts = {name: np.cumsum([0, *(len(kept.ids) for kept in documents)]) for name, documents in expected.items()}
    for tokens, documents, shard, window in zip(read, traced_windows, *located, strict=True):
        assert np.array_equal(np.concatenate([document.ids for document in documents]), tokens)
        name, at = rows[shard].shard_id, int(window) * T
        for document in documents:
            assert len(document.ids)
            kept = expected[name][document.document]
            start = at - starts[name][document.document]
            assert kept.ids[start : start + len(document.ids)] == document.ids.tolist()
            assert document[:-1] == (
                "small", name, document.document, kept.source, kept.row,
                kept.columns.get("id"), kept.columns.get("url"), "",
            )  # fmt: skip
            at += len(document.ids)
        assert at == int(window) * T + T + 1


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
@pytest.mark.parametrize(
    "settings",
    [(), (BARE,), (SKIPPING,), (GOOD, SKIPPING), (LONG,)],
    ids=["all", "no id", "some bad", "good, some bad", "long"],
)
def test_every_window_is_traced_to_its_source_rows(tmp_path: Path, kind: str, settings: tuple[str, ...]) -> None:
    crawl = Crawl(tmp_path, *settings, kind=kind, bad=SKIPPING in settings)
    crawl.build()
    target = trace_target(crawl.store, crawl.config)
    for split in ("train", "val"):
        check_split(crawl, target, split)


@pytest.mark.parametrize(
    ("kind", "settings"), [("parquet", ()), ("parquet", (GOOD, SKIPPING)), ("jsonl", (GOOD, SKIPPING))]
)
def test_source_rows_of_a_shard_are_those_of_the_file(tmp_path: Path, kind: str, settings: tuple[str, ...]) -> None:
    crawl = Crawl(tmp_path, *settings, kind=kind, bad=bool(settings))
    manifest = crawl.build()
    for shard_id, kept in crawl.shard_documents(manifest).items():
        record = read_record(crawl.store, "small", shard_id)
        file = reading.identify(crawl.source / record.source)
        everything = list(source_rows(file, record, range(len(kept))))
        assert [(number, row.number, row.text) for number, row in everything] == [
            (number, document.row, document.text) for number, document in enumerate(kept)
        ]
        assert list(source_rows(file, record, [])) == []
        some = range(0, len(kept), 3)
        assert [number for number, _ in source_rows(file, record, some)] == list(some)


def test_any_range_of_windows_is_traced_like_the_whole_split(tmp_path: Path) -> None:
    crawl = Crawl(tmp_path)
    crawl.build()
    target = trace_target(crawl.store, crawl.config)
    _, order, whole = whole_split(crawl, target, "train")
    for first, count in [(0, 1), (5, 9), (order.epoch_windows - 2, 4), (order.epoch_windows, 1)]:
        some_windows = traced(crawl, target, "train", first, count)
        assert [list(map(str, documents)) for documents in some_windows] == [
            list(map(str, documents)) for documents in whole[first : first + count]
        ]


def test_a_trace_reads_the_source_of_the_build_unless_one_is_given(tmp_path: Path) -> None:
    crawl = Crawl(tmp_path)
    crawl.build()
    settings = {"store_url": crawl.config.store_url, "train": crawl.config.train}
    manifest = trace_target(crawl.store, crawl.config).manifest
    started = RunConfig.model_validate(settings | {"name": "run", "data": {"dataset": "small"}})
    pin_run(crawl.store, started, manifest.digest, None)  # it holds the default data.source
    for name, data in (("never-started", {"dataset": "small"}), ("run", dict[str, str]())):
        for source, is_found in (({}, True), ({"source": str(tmp_path / "moved")}, False)):
            config = RunConfig.model_validate(settings | {"name": name, "data": data | source})
            [documents] = traced(crawl, trace_target(crawl.store, config), "train", 0, 1)
            assert [document.row is not None for document in documents] == [is_found] * len(documents)


def test_windows_past_the_end_of_val_are_refused(tmp_path: Path) -> None:
    crawl = Crawl(tmp_path)
    crawl.build()
    target = trace_target(crawl.store, crawl.config)
    count = order_of(target, "val").epoch_windows
    assert len(traced(crawl, target, "val", count - 1, 1)) == 1
    with pytest.raises(ValueError, match=f"{count}"):
        traced(crawl, target, "val", count, 1)


def test_a_dataset_that_was_never_sealed_is_refused(tmp_path: Path) -> None:
    crawl = Crawl(tmp_path)
    with pytest.raises(ObjectMissing, match="'small'"):
        trace_target(crawl.store, crawl.config)


# Missing, changed and remote sources


def without_source(crawl: Crawl, target: TraceTarget, gone: set[str]) -> list[Traced]:
    """All documents of train. Asserts that those of missing sources have a reason, and the others a row."""
    read, _, traced_windows = whole_split(crawl, target, "train")
    assert np.array_equal([np.concatenate([part.ids for part in documents]) for documents in traced_windows], read)
    documents = [document for window in traced_windows for document in window]
    for document in documents:
        if document.source in gone:
            assert (document.row, document.id, document.url) == (None, None, None)
            assert document.why
        else:
            assert document.row is not None
            assert not document.why
    assert gone <= {document.source for document in documents}
    return documents


@pytest.mark.parametrize(
    ("kind", "change"),
    [("parquet", "gone"), ("parquet", "changed"), ("parquet", "all gone"), ("jsonl", "gone"), ("jsonl", "cut")],
)
def test_the_text_and_a_reason_are_shown_when_the_source_is_gone(tmp_path: Path, kind: str, change: str) -> None:
    crawl = Crawl(tmp_path, kind=kind)
    crawl.build()
    target = trace_target(crawl.store, crawl.config)
    names = sorted(crawl.rows)
    if change == "changed":
        crawl.write(names[1], crawl.rows[names[1]][::-1])
    elif change == "cut":
        path = crawl.source / names[1]
        path.write_bytes(path.read_bytes()[:-100])
    else:
        for name in names if change == "all gone" else names[1:]:
            crawl.write(name, None)
    gone = set(names) if change == "all gone" else {names[1]}
    for document in without_source(crawl, target, gone):
        if document.source in gone:
            assert document.source in document.why


class Published(NamedTuple):
    """A Hub dataset that a later commit changed, and the documents of its shards."""

    crawl: Crawl
    target: TraceTarget
    commit: str
    expected: dict[str, list[Kept]]

    def check(self) -> None:
        """Assert that some windows are traced to their rows."""
        for documents in traced(self.crawl, self.target, "train", 0, 3):
            for document in documents:
                kept = self.expected[document.shard_id][document.document]
                assert (document.source, document.row) == (f"data/{kept.source}", kept.row)
                assert (document.id, document.url) == (kept.columns["id"], kept.columns["url"])


@pytest.fixture
def published(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> Published:
    monkeypatch.setattr(retries, "RETRY_SECONDS", 0.2)
    crawl = Crawl(tmp_path)
    files = {f"data/{name}": (crawl.source / name).read_bytes() for name in sorted(crawl.rows)}
    repository = hub.dataset("org/edu", files)
    (commit,) = repository.commits
    crawl.config = tiny_config(crawl.config.store_url, "org/edu", "data.config=default")
    manifest = build_dataset(crawl.config)
    repository.commit({"data/other.parquet": files["data/file_0.parquet"]})
    hub.requests.clear()
    return Published(crawl, trace_target(crawl.store, crawl.config), commit, crawl.shard_documents(manifest))


def test_rows_of_a_hub_dataset_are_found_at_its_commit(published: Published, hub: Hub) -> None:
    source = published.target.manifest.source_files
    files = hub_files(published.target.manifest)
    assert (list(files), [file.name for file in files.values()]) == (source["digest"], source["name"])
    published.check()
    resolved = hub.received("/datasets/org/edu/resolve/*")
    assert resolved
    assert all(f"/resolve/{published.commit}/data/" in request.path for request in resolved)


def test_rows_of_a_mirrored_dataset_are_found_without_the_hub(published: Published, hub: Hub) -> None:
    for file in hub_files(published.target.manifest).values():
        mirror(published.crawl.store, file)
    del hub.repositories["org/edu"]
    hub.requests.clear()
    published.check()
    assert hub.requests == []


@pytest.mark.parametrize("change", ["unreachable", "deleted", "gated"])
def test_the_text_is_shown_when_the_hub_refuses_the_source(published: Published, hub: Hub, change: str) -> None:
    if change == "unreachable":
        hub.inject("*", *["503"] * 1_000)
    elif change == "deleted":
        del hub.repositories["org/edu"]
    else:
        hub.repositories["org/edu"].gated = True
    (documents,) = traced(published.crawl, published.target, "train", 0, 1)
    read = loader(published.crawl, published.target, "train").read(0, 1)[0]
    assert np.array_equal(np.concatenate([document.ids for document in documents]), read)
    assert all(document.row is None and document.why for document in documents)

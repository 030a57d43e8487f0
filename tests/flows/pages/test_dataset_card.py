"""The dataset card shows all counts, loads nothing, and escapes names."""

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from flows.inspection.facts import leak_line
from flows.pages.dataset_card import page, print_card
from storage.inspection.leaks import ItemOverlap, LeakReport
from storage.inspection.summary import DatasetSummary, summarise
from storage.sources import reading
from tests.browser import browser
from tests.crawl import GOOD, SKIPPING, Crawl
from tests.flows.pages.html_page import HtmlPage, values_at_pointer
from tests.hub import Hub
from tests.making import build_dataset, tiny_config
from tests.polling import poll

HOSTILE = "<img src=x onerror=alert(1)>&amp;\"'--><b>"


def bars(parsed: HtmlPage) -> list[dict[str, int]]:
    """The names and counts of each chart of the page."""
    charts = [[list(row.values()) for row in chart["data"]["values"]] for chart in parsed.charts.values()]
    return [dict(chart) for chart in charts]


def printed(card: DatasetSummary) -> str:
    """The card on a terminal of 80 columns."""
    output = io.StringIO()
    print_card(Console(file=output, soft_wrap=True, width=80), card)
    return output.getvalue()


@pytest.fixture(scope="module")
def card_with_counts(tmp_path_factory: pytest.TempPathFactory) -> DatasetSummary:
    """The card of a dataset with filtered and skipped rows."""
    folder = tmp_path_factory.mktemp("counted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "REMEMBERED", folder / "digests")
        crawl = Crawl(folder, GOOD, SKIPPING, bad=True)
        return summarise(crawl.store, "small", crawl.build())


def named(card: DatasetSummary, name: str) -> DatasetSummary:
    """The card with a file and a dump of this name."""
    first, *others = card.files
    return card.model_copy(update={"files": [first.model_copy(update={"name": name}), *others], "dumps": {name: 3}})


def test_the_page_shows_the_card_and_loads_nothing(card_with_counts: DatasetSummary) -> None:
    body = page(card_with_counts)
    assert body == page(card_with_counts)
    parsed = HtmlPage(body)
    parsed.assert_loads_nothing()
    assert body.count(b"<svg") == len(parsed.charts) == 3
    assert parsed.count(card_with_counts.manifest)
    counts = ("shards", "documents", "tokens", "skipped", "filtered")
    for file in card_with_counts.files:
        start = parsed.cells.index(file.name)
        assert parsed.cells[start + 1 : start + 6] == [f"{getattr(file, name):,}" for name in counts]
    for split in card_with_counts.totals.values():
        assert parsed.count(f"{split['tokens']:,}")
    for dump in card_with_counts.dumps:
        assert parsed.count(dump)
    text = printed(card_with_counts)
    for name, count in [
        *card_with_counts.dumps.items(),
        *((file.name, file.tokens) for file in card_with_counts.files),
    ]:
        assert re.search(rf"{re.escape(name)}.* {count:,} ", text)


def test_a_hostile_name_is_escaped_on_the_page(tmp_path: Path) -> None:
    crawl = Crawl(tmp_path, names=(HOSTILE,))
    rows = crawl.rows[f"{HOSTILE}.parquet"]
    crawl.write(f"{HOSTILE}.parquet", [row | {"dump": HOSTILE} for row in rows])
    card = summarise(crawl.store, "small", crawl.build())
    assert card.dumps == {HOSTILE: len(rows)}
    parsed = HtmlPage(page(card))
    parsed.assert_loads_nothing()
    assert parsed.count(HOSTILE[-12:]) == 3  # in the table of files and in the charts of dumps and files
    assert bars(parsed)[1] == {HOSTILE: len(rows)}


@pytest.mark.parametrize("name", ["$100$", "C$$D"])
def test_a_name_is_not_a_formula(card_with_counts: DatasetSummary, name: str) -> None:
    assert HtmlPage(page(named(card_with_counts, name))).count(name) == 3


@pytest.mark.parametrize("name", ["[bold]loud", "data [/x]"])
def test_a_name_is_not_terminal_markup(card_with_counts: DatasetSummary, name: str) -> None:
    assert printed(named(card_with_counts, name)).count(name) == 2


def test_a_name_in_another_script_gives_no_warning(card_with_counts: DatasetSummary) -> None:
    assert HtmlPage(page(named(card_with_counts, "網頁"))).count("網頁") == 3  # a warning is an error here


def test_long_names_that_differ_at_the_end_stay_distinguishable(card_with_counts: DatasetSummary) -> None:
    names = [f"data/CC-MAIN-2024-10/train-{number:05d}-of-00099.parquet" for number in range(3)]
    assert len({printed(named(card_with_counts, name)) for name in names}) == 3


@pytest.mark.parametrize("names", [("a", "b"), ("CC-MAIN-2024-10/000_00000", "CC-MAIN-2024-18/000_00000")])
def test_charts_add_up_with_the_totals(tmp_path: Path, hub: Hub, names: tuple[str, ...]) -> None:
    """Files of a Hub dataset often have the same names in each folder."""
    crawl = Crawl(tmp_path, names=names)
    files = {f"data/{name}": (crawl.source / name).read_bytes() for name in crawl.rows}
    hub.dataset("org/edu", files, configs={"default": {"train": "data/**"}})
    config = tiny_config(crawl.config.store_url, "org/edu", "data.config=default")
    card = summarise(crawl.store, "small", build_dataset(config))
    tokens, documents = (sum(split[name] for split in card.totals.values()) for name in ("tokens", "documents"))
    with_dump = sum(row["dump"] is not None for rows in crawl.rows.values() for row in rows)
    parsed = HtmlPage(page(card))
    assert [sum(chart.values()) for chart in bars(parsed)] == [documents, with_dump, tokens]
    for value in (*card.origin.values(), *(file.name for file in card.files)):
        assert parsed.count(value)
    assert len(card.origin) == 4
    assert card.origin["commit"] in printed(card)


def test_a_page_lists_all_files_and_the_terminal_counts_those_it_leaves_out(card_with_counts: DatasetSummary) -> None:
    files = [card_with_counts.files[0].model_copy(update={"name": f"file-{number:03d}"}) for number in range(90)]
    card = card_with_counts.model_copy(update={"files": files})
    parsed = HtmlPage(page(card))
    assert [cell for cell in parsed.cells if cell.startswith("file-")] == [file.name for file in card.files]
    text = printed(card)
    assert (text.count("file-0"), "70 more" in text) == (20, True)


def test_leaks_are_on_the_card(card_with_counts: DatasetSummary) -> None:
    overlap = ItemOverlap(count=10_042, contexts=31, endings=29, shorter=23, words=13, numbers={})
    report = LeakReport(
        dataset="small", manifest=card_with_counts.manifest, asked="items", documents={"train": 1_061, "val": 19},
        duplicates={"train": 1_033, "val_in_train": 7}, examples={}, leaks=[], items=overlap,
    )  # fmt: skip
    card = card_with_counts.model_copy(update={"audit": report})
    numbers = ["1,061", "19", "1,033", "7", "10,042", "31", "29", "23", "13"]
    for text in (printed(card), leak_line(report), " ".join(HtmlPage(page(card)).text)):
        assert set(numbers) <= set(re.findall(r"[\d,]*\d", text))
    assert "10,042" not in leak_line(report.model_copy(update={"items": None}))


@pytest.mark.full
def test_a_browser_shows_the_count_at_the_pointer(card_with_counts: DatasetSummary, tmp_path: Path) -> None:
    name = f"data/{HOSTILE.replace('/', '')}.parquet"
    card = named(card_with_counts, name)
    (tmp_path / "card.html").write_bytes(page(card))
    with browser(tmp_path / "profile") as tab:
        tab.visit((tmp_path / "card.html").as_uri())
        poll(lambda: tab.run("document.querySelectorAll('.vega-embed svg').length") == 3)
        shown = values_at_pointer(tab, "figure:last-of-type .mark-rect path")
        assert shown.splitlines() == [name, f"{card.files[0].tokens:,} tokens"]

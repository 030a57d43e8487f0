"""A card for people holds all that it counts, asks nobody for anything, and is safe from the names it shows."""

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.parsers import expat

import pytest
from rich.console import Console

from flows.pages import dataset_card as module
from flows.pages.dataset_card import leak_line, page, print_card
from storage.inspection.summary import summarise
from storage.sources import identity
from tests.crawl import GOOD, SKIPPING, Crawl
from tests.hub import Hub
from tests.making import build_dataset, tiny_config

VOID = {"meta", "br", "hr", "img", "input", "link", "base", "embed", "source", "wbr"}
LOADING = {"script", "link", "img", "iframe", "object", "embed", "audio", "video", "source", "base", "form", "image"}
ADDRESSES = {"src", "href", "xlink:href", "srcset", "action", "data", "poster", "background", "formaction"}
HOSTILE = "<img src=x onerror=alert(1)>&amp;\"'--><b>"


class Page(HTMLParser):
    """What is on a page: its text, and what a browser would load or run; tags must be closed in order."""

    def __init__(self, body: bytes) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.addresses: list[str] = []
        self.scripted: list[str] = []
        self.text: list[str] = []
        self.cells: list[str] = []
        self.feed(body.decode())
        self.close()
        assert self.open == []
        for svg in re.findall(r"<svg.*?</svg>", body.decode(), re.DOTALL):
            expat.ParserCreate().Parse(svg, True)
        self.styles = re.findall(r"url\(([^)]*)\)|@import", body.decode())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ADDRESSES]
        self.scripted += [name for name, _ in attrs if name.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if "td" in self.open[-2:]:
            self.cells.append(data.strip())

    def shows(self, word: str) -> int:
        return sum(word in part for part in self.text)


def shown(found: dict[str, Any]) -> str:
    """The card on a terminal of 80 columns, which a file is taken for, too."""
    said = io.StringIO()
    print_card(Console(file=said, soft_wrap=True, width=80), found)
    return said.getvalue()


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The card of a dataset of which some rows are left out and some could not be tokenised."""
    folder = tmp_path_factory.mktemp("counted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(identity, "REMEMBERED", folder / "digests")
        crawl = Crawl(folder, GOOD, SKIPPING, bad=True)
        return summarise(crawl.store, "small", crawl.build()).to_json()


def named(found: dict[str, Any], name: str) -> dict[str, Any]:
    """The card with a file and a dump that are called so."""
    first, *others = found["files"]
    return found | {"files": [first | {"name": name}, *others], "dumps": {name: 3}}


def test_the_page_shows_the_card_and_asks_for_nothing(counted: dict[str, Any]) -> None:
    found = counted
    body = page(found)
    assert body == page(found)
    looked = Page(body)
    assert looked.tags & LOADING == set()
    assert [address for address in looked.addresses + looked.styles if not address.startswith("#")] == []
    assert looked.addresses  # marks of axes: so the line above looks at something
    assert body.count(b"<svg") == 3
    assert looked.shows(found["manifest"])
    counts = ("shards", "documents", "tokens", "skipped", "filtered")
    for file in found["files"]:
        start = looked.cells.index(file["name"])
        assert looked.cells[start + 1 : start + 6] == [f"{file[name]:,}" for name in counts]
    for split in found["totals"].values():
        assert looked.shows(f"{split['tokens']:,}")
    for dump in found["dumps"]:
        assert looked.shows(dump)
    said = shown(found)
    for name, count in [*found["dumps"].items(), *((file["name"], file["tokens"]) for file in found["files"])]:
        assert re.search(rf"{re.escape(name)}.* {count:,} ", said)


def test_a_hostile_name_is_text_on_the_page(tmp_path: Path) -> None:
    crawl = Crawl(tmp_path, names=(HOSTILE,))
    rows = crawl.rows[f"{HOSTILE}.parquet"]
    crawl.write(f"{HOSTILE}.parquet", [row | {"dump": HOSTILE} for row in rows])
    found = summarise(crawl.store, "small", crawl.build()).to_json()
    assert found["dumps"] == {HOSTILE: len(rows)}
    looked = Page(page(found))
    assert looked.tags & LOADING == set()
    assert looked.scripted == []
    assert looked.shows(HOSTILE) == 3  # in the table of files, and as a label of the plots of dumps and files


@pytest.mark.parametrize("name", ["$100$", "C$$D"])
def test_a_name_is_no_formula(counted: dict[str, Any], name: str) -> None:
    assert Page(page(named(counted, name))).shows(name) == 3


@pytest.mark.parametrize("name", ["[bold]loud", "data [/x]"])
def test_a_name_is_no_markup_of_the_terminal(counted: dict[str, Any], name: str) -> None:
    assert shown(named(counted, name)).count(name) == 2


def test_a_name_in_another_script_gives_no_warning(counted: dict[str, Any]) -> None:
    assert Page(page(named(counted, "網頁"))).shows("網頁") == 3  # a warning is an error here


def test_long_names_that_differ_at_the_end_can_be_told_apart(counted: dict[str, Any]) -> None:
    names = [f"data/CC-MAIN-2024-10/train-{number:05d}-of-00099.parquet" for number in range(3)]
    assert len({shown(named(counted, name)) for name in names}) == 3


def plotted(monkeypatch: pytest.MonkeyPatch, found: dict[str, Any]) -> list[int]:
    """The sums of the bars of each plot of the page."""
    sums: list[int] = []
    own = module.bars

    def bars(name: str, labels: list[str], heights: list[int], unit: str) -> str:
        assert len(set(labels)) == len(labels)
        sums.append(sum(heights))
        return own(name, labels, heights, unit)

    monkeypatch.setattr(module, "bars", bars)
    page(found)
    return sums


@pytest.mark.parametrize("names", [("a", "b"), ("CC-MAIN-2024-10/000_00000", "CC-MAIN-2024-18/000_00000")])
def test_plots_add_up_with_the_totals(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    """The files of a Hub dataset are often called the same in each of its folders."""
    crawl = Crawl(tmp_path, names=names)
    files = {f"data/{name}": (crawl.source / name).read_bytes() for name in crawl.rows}
    hub.dataset("org/edu", files, configs={"default": {"train": "data/**"}})
    config = tiny_config(crawl.config.store_url, "org/edu", "data.config=default")
    found = summarise(crawl.store, "small", build_dataset(config)).to_json()
    tokens, documents = (sum(split[name] for split in found["totals"].values()) for name in ("tokens", "documents"))
    with_dump = sum(row["dump"] is not None for rows in crawl.rows.values() for row in rows)
    assert plotted(monkeypatch, found) == [documents, with_dump, tokens]
    looked = Page(page(found))
    for value in (*found["origin"].values(), *(file["name"] for file in found["files"])):
        assert looked.shows(value)
    assert len(found["origin"]) == 4
    assert found["origin"]["commit"] in shown(found)


def test_a_card_of_many_files_has_them_all_on_the_page_and_says_what_the_terminal_leaves_out(
    counted: dict[str, Any],
) -> None:
    found = counted | {"files": [counted["files"][0] | {"name": f"file-{number:03d}"} for number in range(90)]}
    looked = Page(page(found))
    assert [cell for cell in looked.cells if cell.startswith("file-")] == [file["name"] for file in found["files"]]
    said = shown(found)
    assert (said.count("file-0"), "70 more" in said) == (20, True)


def test_leaks_are_on_the_card(counted: dict[str, Any]) -> None:
    report = {
        "documents": {"train": 1_061, "val": 19}, "duplicates": {"train": 1_033, "val_in_train": 7},
        "items": {"count": 10_042, "contexts": 31, "endings": 29, "shorter": 23, "words": 13},
    }  # fmt: skip
    found = counted | {"audit": report}
    numbers = ["1,061", "19", "1,033", "7", "10,042", "31", "29", "23", "13"]
    for said in (shown(found), leak_line(report), " ".join(Page(page(found)).text)):
        assert set(numbers) <= set(re.findall(r"[\d,]*\d", said))
    assert "10,042" not in leak_line(report | {"items": None})

"""The dataset card: lines for a terminal and an HTML page with charts, both of a summary; the README for the Hub."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from flows.inspection.facts import leak_line
from flows.pages.drawing import bars, render
from storage.datasets.manifest import Manifest
from storage.errors import printable
from storage.inspection.summary import DatasetSummary, summarise
from storage.keys import DatasetKeys
from storage.stores.store import Store, overwrite

MAXIMUM_LINES = 20  # of a table on a terminal; the page and --json have all lines
MAXIMUM_BARS = 60
BAR_CELLS = 40
PLAIN: dict[str, Any] = {"box": None, "padding": (0, 2, 0, 0), "show_edge": False}
COUNTS = ("shards", "documents", "tokens", "skipped")


def print_card(console: Console, card: DatasetSummary) -> None:
    """Print the card on a terminal."""
    source = "files on this host or in a bucket"
    if origin := card.origin:
        chosen = ": ".join(filter(None, (origin["config"], origin.get("configs"))))
        source = f"{origin['dataset']} ({chosen}) at commit {origin['commit']}, licence {origin['licence']}"
    lines = [
        ("dataset", card.dataset),
        ("manifest", card.manifest + (f", follows {card.parent[:12]}" if card.parent else ", the first")),
        ("source", source),
        ("tokenizer", f"{card.tokenizer['name']}, sha256 {card.tokenizer['sha256'][:12]}"),
        ("settings", ", ".join(f"{name} {value}" for name, value in card.recipe.items() if name != "tokenizer")),
        ("filtered", f"{card.filtered:,} of {card.rows:,} rows ({card.filtered_share:.1%})"),
        ("left out", _left_out(card)),
        ("leaks", leak_line(card.audit)),
    ]
    for name, text in lines:
        console.print(f"{name:<10} {text}", highlight=False, markup=False)
    console.print(_table("split", COUNTS, list(card.totals.items())))
    console.print(_table("name", (*COUNTS, "filtered"), [(file.name, file.model_dump()) for file in card.files]))
    for title, counts in (("dump", card.dumps), ("tokens of a document", _lengths(card))):
        if counts:
            console.print(_histogram(title, counts))


def page(card: DatasetSummary) -> bytes:
    """The card as an HTML page."""
    counts = {
        "Documents by length, in tokens": (_lengths(card), "documents"),
        "Documents by dump": (card.dumps, "documents"),
        "Tokens by source file": ({file.name: file.tokens for file in card.files}, "tokens"),
    }
    charts = {title: bars(*chart) for title, chart in counts.items() if 0 < len(chart[0]) <= MAXIMUM_BARS}
    texts = {"left_out": _left_out(card), "leaks": leak_line(card.audit), "file": card.dataset}
    return render("card.html", **dict(card), **texts, charts=charts).encode()


def write_card(store: Store, dataset: str, manifest: Manifest) -> str:
    """Put the card's page into the store, unless it is there: it reads every record. Returns its key."""
    key = DatasetKeys(dataset).page(manifest.digest)
    if not any(store.list(key)):
        overwrite(store, key, page(summarise(store, dataset, manifest)))
    return key


def hub_card(name: str, manifest: Manifest) -> bytes:
    """The card of a published version: the README.md of its repository on the Hub."""
    return render("hub_card.md.j2", name=name, manifest=manifest).encode()


def _left_out(card: DatasetSummary) -> str:
    return f"{card.in_val:,} train documents that are also in val, {card.in_val_added:,} of them from new shards"


def _lengths(card: DatasetSummary) -> dict[str, int]:
    """Documents by length in powers of two, starting at the shortest document."""
    shortest = next((power for power, count in enumerate(card.lengths) if count), 0)
    return {f"{1 << power:,}+": count for power, count in enumerate(card.lengths) if power >= shortest}


def _table(title: str, columns: Sequence[str], rows: list[tuple[str, Mapping[str, int]]]) -> Table:
    headers = (Column(column, justify="right", no_wrap=True) for column in columns)
    table = Table(Column(title, overflow="fold"), *headers, **PLAIN)  # file names of a crawl differ only at the end
    for name, counts in rows[:MAXIMUM_LINES]:
        table.add_row(Text(printable(name)), *(f"{counts[column]:,}" for column in columns))
    if len(rows) > MAXIMUM_LINES:
        table.add_row(f"and {len(rows) - MAXIMUM_LINES:,} more: --json and --html show all")
    return table


def _histogram(title: str, counts: dict[str, int]) -> Table:
    table = Table(Column(title, justify="right"), Column("documents", justify="right"), "", **PLAIN)
    highest = max([*counts.values(), 1])
    for name, count in list(counts.items())[:MAXIMUM_BARS]:
        table.add_row(Text(printable(name)), f"{count:,}", "█" * round(BAR_CELLS * count / highest))
    return table

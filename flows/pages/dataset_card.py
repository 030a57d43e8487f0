"""The dataset card: lines for a terminal and an HTML page with plots. `storage/inspection/summary.py` counts."""

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.inspection.facts import leak_line
from flows.pages.drawing import bars, render

MAXIMUM_LINES = 20  # of a table on a terminal; the page and --json have all lines
MAXIMUM_BARS = 60
BAR_CELLS = 40


def print_card(console: Console, card: dict[str, Any]) -> None:
    """Print the card on a terminal."""
    origin, recipe = card["origin"], card["recipe"]
    source = "files of this host or a bucket"
    if "dataset" in origin:
        source = f"{origin['dataset']} ({origin['config']})"
    if origin:
        source += f" at commit {origin['commit']}, licence {origin['licence']}"
    lines = [
        ("dataset", card["dataset"]),
        ("manifest", card["manifest"] + (f", follows {card['parent'][:12]}" if card["parent"] else ", the first")),
        ("source", source),
        ("tokenizer", f"{card['tokenizer']['name']}, sha256 {card['tokenizer']['sha256'][:12]}"),
        ("settings", ", ".join(f"{name} {value}" for name, value in recipe.items() if name != "tokenizer")),
        ("left out", f"{card['filtered']:,} of {card['rows']:,} rows ({card['filtered_share']:.1%})"),
        ("leaks", leak_line(card["audit"])),
    ]
    for name, text in lines:
        console.print(f"{name:<10} {text}", highlight=False, markup=False)
    splits = [{"split": split} | sums for split, sums in card["totals"].items()]
    console.print(_table("split", splits, ("shards", "documents", "tokens", "skipped")))
    console.print(_table("name", card["files"], ("shards", "documents", "tokens", "skipped", "filtered")))
    for title, counts in (("dump", card["dumps"]), ("tokens of a document", _lengths(card))):
        if counts:
            console.print(_histogram(title, counts))


def page(card: dict[str, Any]) -> bytes:
    """The card as an HTML page."""
    files = {file["name"]: file["tokens"] for file in card["files"]}
    counts_by_title = {
        "Documents by length, in tokens": (_lengths(card), "documents"),
        "Documents by dump": (card["dumps"], "documents"),
        "Tokens by source file": (files, "tokens"),
    }
    plots = {
        title: bars(title, list(counts), list(counts.values()), unit)
        for title, (counts, unit) in counts_by_title.items()
        if counts and len(counts) <= MAXIMUM_BARS
    }
    return render("card.html", **card, plots=plots, leaks=leak_line(card["audit"])).encode()


def _lengths(card: dict[str, Any]) -> dict[str, int]:
    """Documents by length in powers of two, from the shortest document on."""
    shortest = next((power for power, count in enumerate(card["lengths"]) if count), 0)
    return {f"{1 << power:,}+": count for power, count in enumerate(card["lengths"]) if power >= shortest}


def _table(first: str, rows: list[dict[str, Any]], numbers: tuple[str, ...]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    table.add_column(first, overflow="fold")  # names of a crawl's files differ at their ends
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows[:MAXIMUM_LINES]:
        table.add_row(Text(row[first]), *(f"{row[name]:,}" for name in numbers))
    if len(rows) > MAXIMUM_LINES:
        table.add_row(f"and {len(rows) - MAXIMUM_LINES:,} more: --json and --html have them all")
    return table


def _histogram(title: str, counts: dict[str, int]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), show_edge=False)
    table.add_column(title, justify="right")
    table.add_column("documents", justify="right")
    table.add_column("")
    highest = max([*counts.values(), 1])
    for name, count in list(counts.items())[:MAXIMUM_BARS]:
        table.add_row(Text(name), f"{count:,}", "█" * round(BAR_CELLS * count / highest))
    return table

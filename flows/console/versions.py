"""The verbs of `gpt2 dataset` that read versions and change nothing: log, diff, show, trace, export."""

import json
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.console.app import dataset_app
from flows.console.options import ConfigFile, Overrides, console, load_with_store, progress_bar, say

if TYPE_CHECKING:
    from storage.datasets.manifest import Manifest
    from storage.inspection.lineage import Traced

Version = Annotated[
    str, typer.Option(help="A version: the first characters of its manifest's digest.", metavar="DIGEST")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
STEP_TEXT_CHARACTERS = 160  # of each document; a single window shows all of its text


class Split(StrEnum):
    """The two splits."""

    train = "train"
    val = "val"


class Format(StrEnum):
    """Programs whose token files `export` writes."""

    nanogpt = "nanogpt"
    llmc = "llmc"


@dataset_app.command()
def log(config_file: ConfigFile = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """List the dataset's versions, newest first: when each was sealed, its size and what it changed.

    Next: gpt2 dataset diff A B compares two of them
    """
    from storage.datasets.versions import history, sealed_at

    config, store = load_with_store(config_file, overrides)
    versions = list(history(store, config.data.dataset))
    for version, parent in zip(versions, [*versions[1:], None], strict=True):
        facts = _version_facts(version, sealed_at(store, config.data.dataset, version), parent)
        if as_json:
            print(json.dumps(facts))
            continue
        commit = f", commit {facts['commit'][:12]}" if facts["commit"] else ""
        counts = f"{facts['shards']:,} shards, {facts['tokens']:,} tokens{commit}"
        say(version.digest[:12], f"{facts['sealed']}  {counts}")
        if facts["changes"]:
            say("  changed", _change_counts(facts["changes"]))


def _version_facts(version: "Manifest", sealed_at: float, parent: "Manifest | None") -> dict[str, Any]:
    from storage.datasets.versions import difference

    return {
        "manifest": version.digest,
        "sealed": datetime.fromtimestamp(sealed_at, UTC).isoformat(timespec="seconds"),
        "commit": version.origin.get("commit"),
        "shards": len(version.shard_ids),
        "tokens": version.tokens,
        "changes": difference(parent, version).model_dump() if parent else None,
    }


@dataset_app.command()
def diff(
    old: Annotated[str, typer.Argument(help="A version: the first characters of its digest.", metavar="A")],
    new: Annotated[str, typer.Argument(help="Another version, or latest.", metavar="B")] = "latest",
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Compare two versions: the files, shards, documents and tokens that B adds to A and removes from it.

    Example: gpt2 dataset diff 1a2b3c4d latest

    gpt2 dataset log lists the digests.
    """
    from storage.datasets.versions import difference, find_version

    config, store = load_with_store(config_file, overrides)
    old_version, new_version = (find_version(store, config.data.dataset, digest) for digest in (old, new))
    changes: dict[str, Any] = difference(old_version, new_version).model_dump()
    if as_json:
        print(json.dumps(changes))
        return
    say("changes", _change_counts(changes))
    for kind, names in changes["files"].items():
        for name in names:
            say(kind, name)
    for name in changes["settings"]:
        say("setting", f"{name} differs")


@dataset_app.command()
def show(
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    version: Version = "latest",
    as_json: AsJson = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots to this file.", metavar="FILE")] = None,
) -> None:
    """Show the dataset card: totals, source files, crawl dumps, document lengths, filtered documents, leaks.

    Example: gpt2 dataset show --html card.html
    """
    from flows.pages.dataset_card import page, print_card
    from storage.datasets.versions import find_version
    from storage.inspection.summary import summarise

    config, store = load_with_store(config_file, overrides)
    with console.status("reading the records of its shards"):
        card = summarise(store, config.data.dataset, find_version(store, config.data.dataset, version))
    if html is not None:
        _write_page(html, page(card))
    if as_json:
        print(json.dumps(card.model_dump()))
    elif html is not None:
        say("show", f"written to {html}")
    else:
        print_card(console, card)


def _write_page(path: Path, body: bytes) -> None:
    try:
        part = path.with_name(f"{path.name}.part")
        part.write_bytes(body)
        part.replace(path)
    except OSError as error:
        raise ValueError(f"--html {path}: {error.strerror}. Give a file in a writable folder.") from error


@dataset_app.command()
def trace(
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    split: Annotated[Split, typer.Option(help="The split that --window counts in.")] = Split.train,
    window: Annotated[int | None, typer.Option(min=0, help="One window, counted from 0.", metavar="K")] = None,
    step: Annotated[int | None, typer.Option(min=0, help="All windows of one training step.", metavar="N")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the source documents of a window or of a training step: file, row, id, URL and text.

    Windows of train are counted in training order, those of val in validation order.
    The run is the one that the configuration names (--set name=NAME).
    If it was never started, its settings are applied to the dataset's newest version.

    Example: gpt2 dataset trace --step 100
    """
    from flows.inspection.trace import trace_target, window_range, windows

    config, store = load_with_store(config_file, overrides)
    target = trace_target(store, config)
    first, count = window_range(target, split, window, step)
    for number, document in windows(store, target, split, first, count):
        text = _text(document)
        if as_json:
            _print_document_json(number, document, text)
        else:
            _print_document(number, document, text if step is None else " ".join(text.split())[:STEP_TEXT_CHARACTERS])


def _text(document: "Traced") -> str:
    from model import tokenizer

    return tokenizer.decode([token for token in document.ids.tolist() if token != tokenizer.EOT])


def _print_document_json(window: int, document: "Traced", text: str) -> None:
    facts = document._asdict() | {"ids": document.ids.tolist(), "text": text, "window": window}
    print(json.dumps(facts, default=str))  # a document's id may be of any type


def _print_document(window: int, document: "Traced", text: str) -> None:
    place = f" row {document.row:,}" if document.row is not None else f" ({document.why})"
    names = [f"{name} {value}" for name, value in (("id", document.id), ("url", document.url)) if value is not None]
    source = ", ".join([document.source + place, *names])
    say(f"window {window}", f"{source}; document {document.document:,} of shard {document.shard_id}")
    console.print(text, style="dim")


@dataset_app.command()
def export(
    to: Annotated[Path, typer.Argument(help="The folder to write to.", metavar="FOLDER")],
    layout: Annotated[Format, typer.Option("--format", help="The program that will read the files.")],
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    version: Version = "latest",
) -> None:
    """Write the dataset as token files for nanoGPT (train.bin, val.bin) or llm.c (shards with a header).

    Example: gpt2 dataset export tokens --format nanogpt
    """
    from storage.datasets.export import export as write
    from storage.datasets.versions import find_version

    config, store = load_with_store(config_file, overrides)
    manifest = find_version(store, config.data.dataset, version)
    with progress_bar("export", sum(row.tokens for row in manifest.rows())) as advance:
        files = write(store, config.data.dataset, manifest, to, layout, advance)
    for file in files[:2]:
        say("export", str(file))
    say("export", f"{len(files):,} files of {len(manifest.shard_ids):,} shards, manifest {manifest.digest[:12]}")


def _change_counts(changes: dict[str, Any]) -> str:
    counts = [
        f"{what} +{changes[what]['added']:,} -{changes[what]['removed']:,}"
        for what in ("shards", "documents", "tokens")
    ]
    files = ", ".join(f"{len(names):,} {kind}" for kind, names in changes["files"].items() if names)
    return f"{', '.join(counts)}; files: {files or 'the same'}"

"""The verbs of `gpt2 dataset` that read versions and change nothing: log, diff, show, trace, export."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.types import NonNegativeInt

from flows.console.options import AsJson, Version, console, print_json, progress_bar, say
from flows.console.settings import DEFAULTS, DatasetName, RunName, Settings
from flows.inspection.trace import trace_target, windows
from model import tokenizer
from storage.datasets import versions
from storage.datasets.export import export as write
from storage.inspection.lineage import Traced
from storage.inspection.summary import summarise
from storage.keys import DatasetKeys
from storage.stores.opening import open_store

Format = Annotated[Literal["nanogpt", "llmc"], Parameter("--format", help="The program that will read the files.")]
STEP_TEXT_CHARACTERS = 160  # of each document; --window shows the full text


def log(name: DatasetName = None, /, *, settings: Settings = DEFAULTS, as_json: AsJson = False) -> None:
    """List the dataset's versions, newest first: when each was sealed, its size and what it changed.

    Example: gpt2 dataset log mine
    Next: gpt2 dataset diff mine shows what the newest version changed
    """
    store, dataset = settings.opened(name)
    history = list(versions.history(store, dataset))
    for version, parent in zip(history, [*history[1:], None], strict=True):
        sealed_at = store.stat(DatasetKeys(dataset).manifest(version.digest)).modified
        sealed = datetime.fromtimestamp(sealed_at, UTC).isoformat(timespec="seconds")
        commit, configs = version.origin.get("commit"), version.origin.get("configs")
        shards, tokens = len(version.shard_ids), version.tokens
        changes = versions.difference(parent, version) if parent else None
        if as_json:
            facts = {"manifest": version.digest, "sealed": sealed, "commit": commit, "configs": configs,
                     "shards": shards, "tokens": tokens}  # fmt: skip
            print_json(facts | {"changes": changes.model_dump() if changes else None})
            continue
        at_commit = (f", commit {commit[:12]}" if commit else "") + (f", {configs}" if configs else "")
        say(version.digest[:12], f"{sealed}  {shards:,} shards, {tokens:,} tokens{at_commit}")
        if changes:
            say("  changed", _change_counts(changes))


def diff(
    name: DatasetName = None,
    old: str | None = None,
    new: str = "latest",
    /,
    *,
    settings: Settings = DEFAULTS,
    as_json: AsJson = False,
) -> None:
    """Compare two versions: the files, shards, documents and tokens that NEW adds to OLD and removes from it.

    Example: gpt2 dataset diff mine 1a2b3c4d latest

    Args:
        old: First characters of a manifest digest (see gpt2 dataset log); by default the version before NEW.
        new: Another version, or latest.
    """
    store, dataset = settings.opened(name)
    new_version = versions.find_version(store, dataset, new)
    if not (old := old or new_version.parent):
        raise ValueError(f"dataset {dataset!r} has only one version, {new_version.digest[:12]}: nothing to compare.")
    old_version = versions.find_version(store, dataset, old)
    changes = versions.difference(old_version, new_version)
    if as_json:
        print_json(changes.model_dump())
        return
    say("changes", _change_counts(changes))
    for prefix, kinds in (("", changes.files), ("config ", changes.configs)):
        for kind, names in kinds:
            for changed in names:
                say(prefix + kind, changed)
    for setting in changes.settings:
        say("setting", f"{setting} differs")


def show(
    name: DatasetName = None,
    /,
    *,
    settings: Settings = DEFAULTS,
    version: Version = "latest",
    as_json: AsJson = False,
    html: Path | None = None,
) -> None:
    """Show the dataset card: totals, source files, crawl dumps, document lengths, filtered documents, leaks.

    Example: gpt2 dataset show mine --html card.html

    Args:
        html: Write a page with plots to this file.
    """
    from flows.pages.dataset_card import page, print_card
    from flows.pages.drawing import write_file

    store, dataset = settings.opened(name)
    manifest = versions.find_version(store, dataset, version)
    with console.status("reading the shards' records"):
        card = summarise(store, dataset, manifest)
    if html is not None:
        write_file(html, page(card), "--html")
    if as_json:
        print_json(card.model_dump())
    elif html is not None:
        say("show", f"dataset card written to {html}")
    else:
        print_card(console, card)


def trace(
    run: RunName = None,
    /,
    *,
    settings: Settings = DEFAULTS,
    split: Literal["train", "val"] = "train",
    window: NonNegativeInt | None = None,
    step: NonNegativeInt | None = None,
    as_json: AsJson = False,
) -> None:
    """Show the source documents of a window or of a training step: file, row, id, URL and text.

    Train windows are counted in training order, val windows in validation order.
    If the run was never started, the configuration is applied to the dataset's newest version.

    Example: gpt2 dataset trace mine --step 100

    Args:
        split: The split that --window counts in.
        window: One window, counted from 0.
        step: All windows of one training step, counted from 0 (the training log counts from 1).
    """
    config = settings.run(run)
    store = open_store(config.store_url)
    target = trace_target(store, config)
    if (window is None) == (step is None):
        raise ValueError("gpt2 dataset trace needs either --window K or --step N, not both or neither. Try --window 0")
    if step is not None and split != "train":
        raise ValueError(f"--step cannot be combined with --split {split}: steps read only train. Use --window.")
    count = 1 if step is None else target.train.batch_windows
    first = window or 0 if step is None else step * count
    for number, document in windows(store, target, split, first, count):
        text = tokenizer.decode([token for token in document.ids.tolist() if token != tokenizer.EOT])
        if as_json:
            facts = document._asdict() | {"ids": document.ids.tolist(), "text": text, "window": number}
            print_json(facts)  # a document's id may be of any type
            continue
        say(f"window {number}", _origin(document))
        console.print(text if step is None else " ".join(text.split())[:STEP_TEXT_CHARACTERS], style="dim")


def _origin(document: Traced) -> str:
    place = f" row {document.row:,}" if document.row is not None else f" ({document.why})"
    names = [f"{name} {value}" for name, value in (("id", document.id), ("url", document.url)) if value is not None]
    source = ", ".join([document.source + place, *names])
    return f"{source}; document {document.document:,} of shard {document.shard_id} of {document.dataset}"


def export(
    name: DatasetName = None, /, *, to: Path, layout: Format, settings: Settings = DEFAULTS, version: Version = "latest"
) -> None:
    """Write the dataset as token files for nanoGPT (train.bin, val.bin) or llm.c (shards with a header).

    Example: gpt2 dataset export mine --to tokens --format nanogpt

    Args:
        to: The folder to write to, new or empty.
    """
    store, dataset = settings.opened(name)
    manifest = versions.find_version(store, dataset, version)
    with progress_bar("export", sum(row.tokens for row in manifest.rows())) as advance:
        files = write(store, dataset, manifest, to, layout, advance)
    for file in files[:2]:
        say("export", str(file))
    say("export", f"wrote {len(manifest.shard_ids):,} shards to {len(files):,} files, manifest {manifest.digest[:12]}")


def _change_counts(changes: versions.Difference) -> str:
    counts = {"shards": changes.shards, "documents": changes.documents, "tokens": changes.tokens}
    numbers = ", ".join(f"{what} +{change.added:,} -{change.removed:,}" for what, change in counts.items())
    files = ", ".join(f"{len(names):,} {kind}" for kind, names in changes.files if names)
    return f"{numbers}; files: {files or 'the same'}"

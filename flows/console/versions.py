"""The verbs of `gpt2 dataset` that look at versions: log, diff, show, trace, export. They change no dataset."""

import json
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from flows.console.options import ConfigFile, Overrides, console
from model.config import RunConfig
from model.config_file import load_config
from storage.stores.opening import open_store
from storage.stores.store import Store

Version = Annotated[str, typer.Option(help="Which version: the beginning of its manifest's digest.", metavar="DIGEST")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of lines for people.")]


class Split(StrEnum):
    """The two splits."""

    train = "train"
    val = "val"


class Format(StrEnum):
    """Programs that train on token files of their own."""

    nanogpt = "nanogpt"
    llmc = "llmc"


def log(config: ConfigFile = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """The dataset's versions, newest first: when each was sealed, what it holds and what it added and took away."""
    from storage.datasets.versions import difference, history, sealed_at

    store, asked = _opened(config, overrides)
    versions = history(store, asked.data.dataset)
    found = [(version, sealed_at(store, asked.data.dataset, version)) for version in versions]
    for number, (version, sealed) in enumerate(found):
        parent = found[number + 1][0] if number + 1 < len(found) else None
        changes = difference(parent, version).to_json() if parent else None
        facts: dict[str, Any] = {
            "manifest": version.digest,
            "sealed": datetime.fromtimestamp(sealed, UTC).isoformat(timespec="seconds"),
            "commit": version.source.get("commit"),
            "shards": len(version.shard_ids),
            "tokens": sum(sums["tokens"] for sums in version.totals.values()),
            "changes": changes,
        }
        if as_json:
            print(json.dumps(facts))
            continue
        commit = f", commit {facts['commit'][:12]}" if facts["commit"] else ""
        _say(version.digest[:12], f"{facts['sealed']}  {facts['shards']:,} shards, {facts['tokens']:,} tokens{commit}")
        if changes:
            _say("", _changes(changes))


def diff(
    old: Annotated[str, typer.Argument(help="A version: the beginning of its manifest's digest.", metavar="A")],
    new: Annotated[str, typer.Argument(help="Another one, or latest.", metavar="B")] = "latest",
    config: ConfigFile = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """What version B holds that version A does not, and the other way round: files, shards, documents, tokens."""
    from storage.datasets.versions import difference, find_version

    store, asked = _opened(config, overrides)
    versions = [find_version(store, asked.data.dataset, name) for name in (old, new)]
    found: dict[str, Any] = difference(*versions).to_json()
    if as_json:
        print(json.dumps(found))
        return
    _say("changes", _changes(found))
    for how, names in found["files"].items():
        for name in names:
            _say(how, name)
    for name in found["settings"]:
        _say("setting", f"{name} differs")


def show(
    config: ConfigFile = None,
    overrides: Overrides = None,
    version: Version = "latest",
    as_json: AsJson = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with plots there.", metavar="FILE")] = None,
) -> None:
    """The dataset's card: totals, source files, dumps, lengths of documents, what was left out, leaks."""
    from flows.pages.dataset_card import page, print_card
    from storage.datasets.versions import find_version
    from storage.inspection.summary import summarise

    store, asked = _opened(config, overrides)
    with console.status("reading the records of its shards"):
        found = summarise(store, asked.data.dataset, find_version(store, asked.data.dataset, version)).to_json()
    if html is not None:
        try:
            part = html.with_name(f"{html.name}.part")
            part.write_bytes(page(found))
            part.replace(html)
        except OSError as error:
            raise ValueError(
                f"--html {html}: {error.strerror}. Give a file in a folder that can be written."
            ) from error
    if as_json:
        print(json.dumps(found))
    elif html is not None:
        _say("show", f"written to {html}")
    else:
        print_card(console, found)


def trace(
    config: ConfigFile = None,
    overrides: Overrides = None,
    split: Annotated[Split, typer.Option(help="The split of the window.")] = Split.train,
    window: Annotated[int | None, typer.Option(min=0, help="A window, counted from 0.", metavar="K")] = None,
    step: Annotated[int | None, typer.Option(min=0, help="All windows of a step of the run.", metavar="N")] = None,
    checkpoint: Annotated[
        int | None, typer.Option(min=0, help="What a checkpoint saw; 0: the newest.", metavar="N")
    ] = None,
    evaluation: Annotated[
        str | None, typer.Option(help="What an evaluation was made of: val_loss, hellaswag, …", metavar="NAME")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Where tokens came from: the documents of a window or a step, or all that a checkpoint or an evaluation used.

    A window of train is counted as training sees them, one of val as validation does. The run is the configuration's
    name (--set name=…); where none was started, its settings on the dataset's newest version.
    """
    from flows.inspection import trace as lineage
    from model import tokenizer

    store, wanted = _opened(config, overrides)
    one = lineage.asked(store, wanted)
    given = [value is not None for value in (window, step)]
    if (checkpoint is not None or evaluation is not None) and not any(given):
        _ancestry(lineage.ancestry(store, one, checkpoint, evaluation), as_json)
        return
    if sum(given) != 1 or checkpoint is not None or evaluation is not None:
        raise ValueError(
            "one of --window K, --step N, and --checkpoint N with --evaluation NAME was asked for. Give one of them: "
            "gpt2 dataset trace --split train --window 0"
        )
    if step is not None and split is not Split.train:
        raise ValueError("--step was asked for of split val: steps are made of train's windows. Leave --split out.")
    size = one.train.batch_windows
    first, count = (window, 1) if window is not None else ((step or 0) * size, size)
    for number, found in lineage.windows(store, wanted, one, split, first, count):
        text = tokenizer.decode([token for token in found.ids.tolist() if token != tokenizer.EOT])
        if as_json:
            facts = found._asdict() | {"ids": found.ids.tolist(), "text": text, "window": number}
            print(json.dumps(facts, default=str))  # ids may be of any type
            continue
        where = found.source + (f" row {found.row:,}" if found.row is not None else f" ({found.why})")
        named = "".join(
            f", {name} {value}" for name, value in (("id", found.id), ("url", found.url)) if value is not None
        )
        _say(f"window {number}", f"{where}{named}; document {found.document:,} of shard {found.shard_id}")
        shown = text if window is not None else " ".join(text.split())[:160]
        console.print(shown, highlight=False, markup=False, style="dim")


def export(
    to: Annotated[Path, typer.Argument(help="The folder to write to.", metavar="FOLDER")],
    layout: Annotated[Format, typer.Option("--format", help="Whose files.")],
    config: ConfigFile = None,
    overrides: Overrides = None,
    version: Version = "latest",
) -> None:
    """Write the dataset as nanoGPT (train.bin, val.bin) or llm.c (shards with a header) read it."""
    from storage.datasets.export import export as write
    from storage.datasets.versions import find_version

    store, asked = _opened(config, overrides)
    manifest = find_version(store, asked.data.dataset, version)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("export", total=sum(row.tokens for row in manifest.rows()))
        files = write(store, asked.data.dataset, manifest, to, layout, lambda tokens: progress.advance(bar, tokens))
    for file in files[:2]:
        _say("export", str(file))
    _say("export", f"{len(files):,} files of {len(manifest.shard_ids):,} shards, manifest {manifest.digest[:12]}")


def add_to(app: typer.Typer) -> None:
    """Give these verbs to the group `gpt2 dataset`."""
    for verb in (log, diff, show, trace, export):
        app.command()(verb)


def _opened(config: Path | None, overrides: list[str] | None) -> tuple[Store, RunConfig]:
    asked = load_config(config, overrides or [])
    return open_store(asked.store_url), asked


def _changes(found: dict[str, Any]) -> str:
    parts = [
        f"{what} +{found[what]['added']:,} -{found[what]['removed']:,}" for what in ("shards", "documents", "tokens")
    ]
    files = ", ".join(f"{len(names):,} {how}" for how, names in found["files"].items() if names)
    return ", ".join(parts) + f"; files: {files or 'the same'}"


def _ancestry(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts))
        return
    for name in (
        "run",
        "checkpoint",
        "evaluation",
        "metrics",
        "items",
        "job",
        "windows",
        "epochs",
        "dataset",
        "manifest",
    ):
        if facts.get(name) is not None:
            _say(name, str(facts[name]))
    for name, value in facts["source"].items():
        _say(f"source {name}", str(value))
    _say("shards", f"{len(facts['shards']):,} of split {facts['split']}")
    for shard_id in facts["shards"]:
        _say("", shard_id)
    for file in facts["files"]:
        _say("file", f"{file['name']}  {file['digest']}")


def _say(name: str, text: str) -> None:
    console.print(f"{name:<14} {text}", highlight=False, markup=False)

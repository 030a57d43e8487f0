"""The verbs that look after a store: status, doctor, gc."""

from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from flows.console.app import INSPECT, app
from flows.console.options import ConfigFile, Overrides, command, console, load_with_store, say
from model.config_file import load_config


@app.command(rich_help_panel=INSPECT)
def status(
    run: Annotated[str | None, typer.Argument(help="A run; by default all runs and datasets.")] = None,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Show what is done, what is missing and what failed. Reads only the store, so it works without Prefect.

    Next, when something failed: gpt2 retry NAME
    """
    from flows.inspection.status import run_status, store_status

    _, store = load_with_store(config_file, overrides)
    lines = run_status(store, run) if run else store_status(store)
    for line in lines:
        console.print(f"{line.what:<20} {line.state}")
        if line.error:
            console.print(f"{'':<20} failed: {line.error}", style="red")
    if not lines:
        console.print(f"{store.url} is empty. Start with: gpt2 demo")


@app.command(rich_help_panel=INSPECT)
def doctor(config_file: ConfigFile = None, overrides: Overrides = None) -> None:
    """Check packages, store, clock, disk, cache and server. Exit code 1 when a check fails; each line says what to do.

    Example: gpt2 doctor --set store_url=s3://bucket/prefix
    """
    from flows.inspection.doctor import examine

    verdicts = list(examine(load_config(config_file, overrides or []).store_url))
    table = Table(box=None, show_header=False, padding=(0, 1))
    for verdict in verdicts:
        mark = Text("ok", style="green") if verdict.ok else Text("bad", style="bold red")
        table.add_row(mark, verdict.check, verdict.detail)
    console.print(table)
    raise typer.Exit(0 if all(verdict.ok for verdict in verdicts) else 1)


@app.command(rich_help_panel=INSPECT)
def gc(
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete it. Without this option nothing changes.")] = False,
    grace_days: Annotated[float, typer.Option(min=0.05, help="Keep what was written within this many days.")] = 7.0,
) -> None:
    """List or delete what nothing refers to: orphan shards, old checkpoints, unfinished uploads, damaged files.

    Safe while builds and trainings run.

    Example: gpt2 gc --delete --grace-days 1
    """
    from flows.inspection import garbage

    _, store = load_with_store(config_file, overrides)
    grace_seconds = grace_days * 86_400
    count = size_bytes = 0
    for item in garbage.collect(store, grace_seconds) if delete else garbage.find(store, grace_seconds):
        say(item.kind, f"{item.name}  {item.size_bytes:,} bytes")
        count += 1
        size_bytes += item.size_bytes
    what = f"{count:,} objects and files, {size_bytes / 1e6:,.1f} MB, older than {grace_days:g} days"
    say("gc", f"{what}: {'deleted' if delete else 'nothing was deleted'}")
    if count and not delete:
        say("to delete", command("gc --delete", config_file, overrides))

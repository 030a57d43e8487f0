"""The verbs that inspect or clean a store (status, doctor, gc) and run the pipeline as a service (serve, bootstrap)."""

import json
from contextlib import ExitStack
from operator import attrgetter
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.text import Text

from flows.console.options import AsJson, console, prefect, print_json, say, starting
from flows.console.settings import DEFAULTS, Settings
from flows.inspection import garbage
from flows.inspection.status import run_status, store_status
from model.config import RunConfig
from model.config_file import all_settings, presets
from storage.stores.opening import open_store

Days = Annotated[float, Parameter(validator=Number(gte=0.05))]
Port = Annotated[int, Parameter(validator=Number(gte=1, lte=65535))]


def status(run: str | None = None, /, *, settings: Settings = DEFAULTS, as_json: AsJson = False) -> int:
    """Show what is done, what is missing and what failed. Reads only the store, so it works without Prefect.

    Exit code 1 when a run or dataset is damaged; its line says why.

    Example: gpt2 status gpt2-124m
    Next, when something failed: gpt2 retry NAME

    Args:
        run: A run; by default all runs and datasets.
    """
    store = open_store(settings.new().store_url)
    lines = run_status(store, run) if run else store_status(store)
    if as_json:
        print_json([line._asdict() for line in lines])
    elif not lines:
        console.print(f"{store.url} has no runs or datasets. Start with: {settings.command('pretrain')}")
    else:
        for line in lines:
            console.print(f"{line.what:<20} {line.state}")
            if line.error:
                console.print(f"{'':<20} failed: {line.error}", style="red")
    return 1 if any(line.damaged for line in lines) else 0


def doctor(*, settings: Settings = DEFAULTS, as_json: AsJson = False) -> int:
    """Check store, clock, disk, cache and server. Exit code 1 when a check fails; its line says why.

    Example: gpt2 doctor --set store_url=s3://bucket/prefix
    """
    from flows.inspection.doctor import examine

    verdicts = list(examine(settings.new().store_url))
    if as_json:
        print_json([verdict._asdict() for verdict in verdicts])
    else:
        for verdict in verdicts:
            mark = Text("ok ", style="green") if verdict.ok else Text("bad", style="bold red")
            console.print(mark, f"{verdict.check:<10} {verdict.detail}")
    return int(not all(verdict.ok for verdict in verdicts))


def settings(*, markdown: bool = False) -> None:
    """List the presets, and every setting with its default and its meaning.

    Example: gpt2 settings
    Next: --config PRESET starts from a preset, --set section.field=value changes a setting.

    Args:
        markdown: Print the page model/SETTINGS.md.
    """
    defaults = RunConfig()
    rows = {name: (json.dumps(attrgetter(name)(defaults)), field.description) for name, field in all_settings().items()}
    if markdown:
        print("# Settings\n\n`gpt2 settings --markdown` writes this page.\n\n| preset | |\n| --- | --- |")
        print("\n".join(f"| `{name}` | {text} |" for name, text in presets().items()))
        print("\n| setting | default | |\n| --- | --- | --- |")
        print("\n".join(f"| `{name}` | `{default}` | {text} |" for name, (default, text) in rows.items()))
        return
    for name, text in presets().items():
        say(name, text)
    for name, (default, meaning) in rows.items():
        console.print(f"\n{name} = {default}\n    {meaning}")


def gc(*, settings: Settings = DEFAULTS, delete: bool = False, grace_days: Days = 7.0) -> int:
    """List or delete unreferenced objects, such as orphaned shards, old checkpoints and unfinished uploads.

    Safe while builds and training runs are active. Skips damaged runs and datasets, then ends with exit code 1.

    Example: gpt2 gc --delete --grace-days 1

    Args:
        delete: Delete what is listed. Without this option nothing changes.
        grace_days: Keep everything that was written in the last N days.
    """
    store = open_store(settings.new().store_url)
    items = []
    for item in garbage.collect(store, grace_days * 86_400, remove=delete):
        say(item.kind, f"{item.name}: {item.damage}" if item.damage else f"{item.name}  {item.size_bytes:,} bytes")
        items.append(item)
    sizes_bytes = [item.size_bytes for item in items if not item.damage]
    what = f"{len(sizes_bytes):,} objects and files, {sum(sizes_bytes) / 1e6:,.1f} MB, older than {grace_days:g} days"
    say("gc", f"{what}: {'deleted' if delete else 'nothing was deleted'}")
    if sizes_bytes and not delete:
        say("to delete", settings.command(f"gc --delete --grace-days {grace_days:g}"))
    return int(len(sizes_bytes) < len(items))


def serve(*, port: Port = 4200, settings: Settings = DEFAULTS) -> None:
    """Run Prefect's server and UI, the deployments and their workers for this folder, until Ctrl-C.

    The forms in the UI start from the settings given here. Schedules start paused; switch them on in the UI.
    Ctrl-C cancels the active runs; training has 8 s to save a checkpoint. Retries continue from the newest checkpoint.

    Example: gpt2 serve --port 4300
    Next: open the printed address and log in, or run gpt2 demo in another terminal.

    Args:
        port: The port of Prefect's UI on this host.
    """
    from flows.platform.serve import platform, wait_for_end
    from flows.platform.server import login, running_port

    config = settings.new()
    with ExitStack() as stack:
        with starting("Prefect's server, deployments and workers"):
            processes = stack.enter_context(platform(port, settings.preset, config))
        say("UI", f"http://127.0.0.1:{port}")
        say("login", login() if console.is_terminal else "in .gpt2/login, which only you can read")
        say("one click", f"http://127.0.0.1:{port}/deployments: pretrain, demo, train, evaluate, dataset-refresh")
        say("commands", "gpt2 demo, gpt2 pretrain, … in another terminal use this server. Ctrl-C here stops it")
        wait_for_end(processes)
        say("stopping", "cancelling active runs; a retry continues from the store")
    say("stopped", f"except the server: another command uses it, on port {port}" if running_port() else "")


def bootstrap(*, settings: Settings = DEFAULTS, notify: str = "") -> None:
    """Register pools, deployments and automations with the Prefect server at PREFECT_API_URL. Idempotent.

    The forms in the UI start from the settings given here. Objects that you paused stay paused.

    Example: gpt2 bootstrap --notify slack-webhook/team

    Args:
        notify: The Prefect notification block (TYPE/NAME) for messages about failed or crashed runs and alerts.
    """
    from flows.platform.server import named_server

    config = settings.new()
    if not named_server():
        raise ValueError("bootstrap needs a server: set PREFECT_API_URL=http://HOST:4200/api, or run gpt2 serve here.")
    with prefect(verbose=False):
        from flows.platform.bootstrap import bootstrap as register

        for line in register(settings.preset, config, block=notify):
            say("bootstrap", line)

"""The verbs `serve` and `bootstrap`, which run the pipeline as a service under Prefect."""

from contextlib import ExitStack
from typing import Annotated

import typer

from flows.console.app import PLATFORM, app
from flows.console.options import ConfigFile, Overrides, console, prefect, say
from model.config_file import load_config


@app.command(rich_help_panel=PLATFORM)
def serve(
    port: Annotated[int, typer.Option(min=1, max=65535, help="The port of Prefect's UI on this host.")] = 4200,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Run Prefect's server and UI, the deployments and their workers for this folder, until Ctrl-C.

    The forms in the UI start from the settings given here.
    Schedules start paused; switch them on in the UI.
    Other verbs in this folder use the same server.

    Ctrl-C cancels the active runs. A training saves a checkpoint first, and a retry continues from it.

    Next: open the printed address, or run gpt2 demo in another terminal.
    """
    from flows.platform import server
    from flows.platform.serve import platform

    config = load_config(config_file, overrides or [])
    server.check_port(port)
    with ExitStack() as stack:
        with console.status("starting Prefect's server, deployments and workers"):
            processes = stack.enter_context(platform(port, config))
        say("UI", f"http://127.0.0.1:{port}")
        say("one click", f"http://127.0.0.1:{port}/deployments: pretrain, demo, train, evaluate, dataset-refresh")
        say("or", "in another terminal: gpt2 demo, gpt2 pretrain, …   Ctrl-C stops")
        server.wait_for_end(processes)
        say("stopping", "active runs are cancelled; a retry continues from the store")
    say("stopped", "")


@app.command(rich_help_panel=PLATFORM)
def bootstrap(
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    notify: Annotated[
        str, typer.Option(help="The Prefect notification block to send failures to.", metavar="TYPE/NAME")
    ] = "",
) -> None:
    """Register pools, deployments and automations with the Prefect server at PREFECT_API_URL. Idempotent.

    The forms in the UI start from the settings given here.
    What people paused or changed by hand stays.

    Example: gpt2 bootstrap --notify slack-webhook/team sends a message for each failed run
    """
    from flows.platform.server import named_server

    config = load_config(config_file, overrides or [])
    if not named_server():
        raise ValueError(
            "bootstrap: PREFECT_API_URL is not set. Set it to the server's address, http://HOST:4200/api, or start "
            "a server with its deployments here: gpt2 serve"
        )
    with prefect(verbose=False):
        from flows.platform.bootstrap import bootstrap as register

        for line in register(config, block=notify):
            say("bootstrap", line)

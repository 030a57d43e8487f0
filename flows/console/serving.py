"""The verbs that make Prefect the control room: serve, bootstrap. Holds no logic."""

from contextlib import ExitStack
from typing import Annotated

import typer

from flows.console.options import ConfigFile, Overrides, console, prefect, say
from model.config_file import load_config


def add_to(app: typer.Typer) -> None:
    """Make the functions of this file verbs of `gpt2`."""
    for verb in (serve, bootstrap):
        app.command()(verb)


def serve(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port of Prefect's UI on this host.")] = 4200,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """A whole platform for this folder until Ctrl-C: Prefect's server and UI, the deployments, workers for them.

    The forms in the UI begin with the settings given here. Schedules begin paused; the UI switches them on. Other verbs
    use the same server. Ctrl-C cancels what runs; a training saves a checkpoint, and a retry goes on from there.
    """
    from flows.platform import server
    from flows.platform.serve import platform

    asked = load_config(config, overrides or [])
    server.check_port(port)
    with ExitStack() as stack:
        with console.status("starting Prefect's server, deployments and workers"):
            processes = stack.enter_context(platform(port, asked))
        say("UI", f"http://127.0.0.1:{port}")
        say("one click", f"http://127.0.0.1:{port}/deployments: pretrain, demo, train, evaluate, dataset-refresh")
        say("or", "in another terminal: gpt2 demo, gpt2 pretrain, …   Ctrl-C stops")
        server.wait_for_end(processes)
        say("stopping", "what runs is cancelled; a retry goes on from what is in the store")
    say("stopped", "")


def bootstrap(
    config: ConfigFile = None,
    overrides: Overrides = None,
    notify: Annotated[
        str, typer.Option(help="A notification block that is told of failures.", metavar="TYPE/NAME")
    ] = "",
) -> None:
    """Make the Prefect server of PREFECT_API_URL ready: pools, deployments, automations. Twice changes nothing.

    The forms in the UI begin with the settings given here. What people paused or changed by hand stays.
    --notify slack-webhook/team sends a message for each failed run through a block of Prefect's.
    """
    from flows.platform.server import named_server

    asked = load_config(config, overrides or [])
    if not named_server():
        raise ValueError(
            "bootstrap: a Prefect server was to be made ready, PREFECT_API_URL names none. Set it, as "
            "http://HOST:4200/api, or start one here with its deployments: gpt2 serve"
        )
    with prefect(verbose=False):
        from flows.platform.bootstrap import bootstrap as register

        for line in register(asked, block=notify):
            say("bootstrap", line)

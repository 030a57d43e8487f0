"""What the verbs of the console share: their options, the terminal, and a flow run in this process. Knows no verb.

Prefect reads its settings when it is imported, and takes 3 s for that, so it is imported inside the functions.
"""

import os
import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from model.config import RunConfig

console = Console(soft_wrap=True)
RECORDS_SECONDS = 15.0  # Prefect's records of task runs lag behind their end

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="A TOML file; it holds just what differs from the defaults.", metavar="FILE"),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="One setting, as train.max_steps=200; may be given many times.", metavar="FIELD=VALUE"),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show Prefect's own log too.")]


def command(verb: str, config: Path | None, overrides: list[str]) -> str:
    """The command that a user types to do something with the same configuration."""
    words = ["gpt2", *verb.split(), *(["--config", str(config)] if config else [])]
    return shlex.join(words + [word for override in overrides for word in ("--set", override)])


def say(name: str, text: str) -> None:
    """A line for people: what it is about, then what there is to say."""
    console.print(f"{name:<10} {text}", highlight=False, markup=False)


@contextmanager
def prefect(verbose: bool) -> Iterator[None]:
    """A server to talk to, and Prefect's own log kept off the console unless it is asked for."""
    from flows.platform.server import prefect_server

    if not verbose:
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    with ExitStack() as stack:
        with console.status("starting Prefect's server"):
            url = stack.enter_context(prefect_server())
        console.print(f"Prefect    {url.removesuffix('/api')}", highlight=False)
        yield


def run_flow(flow: Any, config: RunConfig) -> Any:
    """Run the flow in this process, show its progress, and wait until Prefect has written down what happened."""
    from prefect.utilities.urls import url_for

    from flows.runtime import progress, settle

    def show_page(flow: Any, flow_run: Any, state: Any) -> None:  # noqa: ARG001  # Prefect calls it by these names
        console.print(f"run        {url_for('flow-run', obj_id=flow_run.id)}", highlight=False)

    since = datetime.now(UTC)
    with progress.on_console(console):
        try:
            return flow.with_options(on_running=[show_page])(config)
        finally:
            settle.wait_for_task_runs(since, RECORDS_SECONDS)

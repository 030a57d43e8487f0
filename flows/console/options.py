"""What the verbs share: options, configuration, terminal output, and running a flow in this process.

Importing Prefect takes 3 s and reads its settings from the environment, so the functions import it, not this module.
"""

import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress

from model.config import RunConfig
from model.config_file import load_config
from storage.stores.opening import open_store
from storage.stores.store import Store

console = Console(highlight=False, markup=False, soft_wrap=True)
RECORDS_SECONDS = 15.0  # Prefect writes its records of task runs after they end

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="A TOML file with the settings that differ from the defaults.", metavar="FILE"),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one setting: train.max_steps=200. Repeatable.", metavar="FIELD=VALUE"),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Also show Prefect's own log.")]


def load_with_store(config_file: Path | None, overrides: list[str] | None) -> tuple[RunConfig, Store]:
    """The configuration and its store. Raises ValueError, and ObjectMissing when the store does not exist yet."""
    config = load_config(config_file, overrides or [])
    return config, open_store(config.store_url)


def command(verb: str, config_file: Path | None, overrides: list[str] | None) -> str:
    """The shell command that runs a verb with the same configuration."""
    argv = ["gpt2", *verb.split(), *(["--config", str(config_file)] if config_file else [])]
    return shlex.join(argv + [word for override in overrides or [] for word in ("--set", override)])


def say(label: str, text: str) -> None:
    """Print one line: a label, then its text."""
    console.print(f"{label:<10} {text}")


@contextmanager
def progress_bar(label: str, total: int, *, hidden: bool = False) -> Iterator[Callable[..., None]]:
    """Show a bar on a terminal while the block lasts; yields a function that advances it, by 1 or by its argument."""
    with Progress(console=console, disable=hidden or not console.is_terminal) as progress:
        task = progress.add_task(label, total=total)
        yield lambda count=1: progress.advance(task, count)


@contextmanager
def prefect(verbose: bool) -> Iterator[None]:
    """Provide a Prefect server for the block. Prefect's log stays off the console unless `verbose`."""
    from flows.platform.server import prefect_server

    if not verbose:
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    with ExitStack() as stack:
        with console.status("starting Prefect's server"):
            url = stack.enter_context(prefect_server())
        say("Prefect", url.removesuffix("/api"))
        yield


def run_flow(flow: Any, config: RunConfig) -> Any:
    """Run the flow in this process, show its progress, and wait until Prefect has stored the task runs."""
    from prefect.utilities.urls import url_for

    from flows.runtime import progress, settle

    def show_page(flow: Any, flow_run: Any, state: Any) -> None:  # noqa: ARG001  # Prefect passes these by name
        say("run", str(url_for("flow-run", obj_id=flow_run.id)))

    since = datetime.now(UTC)
    with progress.on_console(console):
        try:
            return flow.with_options(on_running=[show_page])(config)
        finally:
            settle.wait_for_task_runs(since, RECORDS_SECONDS)

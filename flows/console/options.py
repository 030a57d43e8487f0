"""What the verbs share: apps, options, output, checks, flows. Only functions import Prefect, which takes 3 s."""

import json
import os
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from pkgutil import resolve_name
from tempfile import TemporaryFile
from typing import Annotated, Any

from cyclopts import App, Group, Parameter
from rich.console import Console
from rich.progress import Progress
from rich.segment import Segment
from rich.status import Status

from model import tokenizer
from model.checkpoints.records import chosen
from model.config import RunConfig, check_extra
from model.config_file import load_config
from model.runs.job import JobFailed
from model.runs.run import find_mix, find_start, pinned_run
from storage.datasets.sealing import check_binding
from storage.datasets.versions import newest_version
from storage.errors import ObjectMissing, printable
from storage.sources import files as sources
from storage.stores.opening import open_store
from storage.stores.store import Store

app = App(
    "gpt2",
    help="Pretrain GPT-2 from scratch: text to token shards, training, evaluation and report as one pipeline.\n\n"
    "Start with: gpt2 demo",
    help_format="plaintext",
    version=version("gpt2-pipeline"),
    default_parameter=Parameter(negative=(), show_default=lambda value: value or None),
    exit_on_error=False,
    print_error=False,
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
dataset_app = App("dataset", help="Build, inspect, copy and publish a dataset.")
app.command(dataset_app)
MODELS = Group.create_ordered("Models")
INSPECT = Group.create_ordered("Inspect and clean up")
SERVICE = Group.create_ordered("Run as a service")


class _Terminal(Console):
    """Shows control characters of a text as escapes; its own controls, such as those of a bar, stay."""

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):  # every output passes here
            yield Segment(text if control else printable(text, lines=True), style, control)


console = _Terminal(highlight=False, markup=False, soft_wrap=True)
FILE = "A TOML file with settings, such as deploy/configs/demo.toml. model/config.py lists all settings."
SET = "Override one setting, repeatable: train.max_steps=200. Text is as typed, or in TOML quotes; lists are TOML."
RECORDS_SECONDS = 15.0  # Prefect's server records task runs some seconds late

Verbose = Annotated[bool, Parameter(["--verbose", "-v"], help="Also show Prefect's own log.")]
Version = Annotated[str, Parameter(help="First characters of a manifest digest (see gpt2 dataset log), or latest.")]
AsJson = Annotated[bool, Parameter("--json", help="Print JSON.")]


@Parameter("*")
@dataclass(frozen=True)
class Settings:
    """The options that make up the configuration."""

    file: Annotated[Path | None, Parameter("--config", help=FILE)] = None
    overrides: Annotated[tuple[str, ...], Parameter("--set", help=SET)] = ()

    def load(self) -> RunConfig:
        return load_config(self.file, list(self.overrides))

    def load_with_store(self) -> tuple[RunConfig, Store]:
        """The configuration and its store. Raises ValueError, or StorageError when the store cannot be opened."""
        config = self.load()
        return config, open_store(config.store_url)

    def command(self, verb: str, *overrides: str) -> str:
        """The shell command that runs a verb with the same configuration and these overrides."""
        file = ["--config", str(self.file)] if self.file else []
        settings = [word for override in (*self.overrides, *overrides) for word in ("--set", override)]
        return shlex.join(["gpt2", *verb.split(), *file, *settings])


DEFAULTS = Settings()


def say(label: str, text: str) -> None:
    """Print one line: a label, then its text."""
    console.print(f"{label:<10} {printable(text)}")


def print_json(value: Any) -> None:
    """Print one line of JSON in ASCII, without control characters."""
    print(json.dumps(value, default=str))


@contextmanager
def progress_bar(label: str, total: int | None, *, hidden: bool = False) -> Iterator[Callable[..., None]]:
    """Show a bar on a terminal while the block lasts. Yields a function that advances it, and may set its total."""
    with Progress(console=console, disable=hidden or not console.is_terminal) as progress:
        task = progress.add_task(label, total=total)
        yield lambda count=1, total=None: progress.update(task, advance=count, total=total)


def check_inputs(config: RunConfig, *stages: str) -> None:
    """Raise ValueError or StorageError if one of the stages lacks an input. "tokenise" creates the store."""
    resources, run, items = config.resources, None, config.evaluation.hellaswag
    with suppress(ObjectMissing):
        run = pinned_run(open_store(config.store_url), config)
    if "tokenise" in stages and run is None:
        check_source(config.data.source, "data.source")
    if "audit" in stages or ("evaluate" in stages and (run is None or run.config["evaluation"]["hellaswag"] != items)):
        check_source(items, "evaluation.hellaswag")
    if "tokenise" in stages and resources.runner == "dask":
        check_extra("dask", "prefect_dask")
    if "train" in stages and resources.tensorboard:
        check_extra("tensorboard", "tensorboard")
        try:
            Path(resources.tensorboard).mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=resources.tensorboard).close()
        except OSError as error:
            raise ValueError(f"resources.tensorboard: {error}. Give a writable folder.") from error
    store = open_store(config.store_url, create="tokenise" in stages)
    if "tokenise" in stages and run is None:
        check_binding(store, config.data.spec(tokenizer.identity()))
    elif "train" in stages and run is None:
        newest_version(store, config.data.dataset)
    if "train" in stages and run is None:
        find_start(store, config)
        find_mix(store, config)
    if "evaluate" in stages and "train" not in stages:
        chosen(store, config.name, config.evaluation.checkpoint)


def check_source(source: str, setting: str) -> None:
    """Raise ValueError if the setting names files, and they are missing or unreadable."""
    if source and not sources.is_on_hub(source):
        sources.find_files(source, setting)


def starting(what: str) -> Status:
    """Show what starts: on a terminal while the block lasts, elsewhere as one line of output."""
    text = f"{what}; the first start creates the database; waiting up to 300 s"
    if not console.is_terminal:
        say("starting", text)
    return console.status(f"starting {text}")


@contextmanager
def prefect(verbose: bool) -> Iterator[None]:
    """Provide a Prefect server for the block. Prefect's log stays off the console unless `verbose`."""
    from httpx import HTTPError

    from flows.platform.server import prefect_server
    from flows.runtime.ending import ending_with_server

    is_named = bool(os.environ.get("PREFECT_API_URL"))  # such a server may restart: Prefect repeats its requests
    os.environ["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] = "30"  # Prefect's 180 s exceed our limit of 90 s
    if not verbose:
        os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    with ExitStack() as stack:
        with starting("Prefect's server"):
            url = stack.enter_context(prefect_server())
        say("Prefect", url.removesuffix("/api"))
        if not is_named:
            stack.enter_context(ending_with_server(url))
        try:
            yield
        except HTTPError as error:  # a server that went away, or whose disk is full: its log may be empty
            remedy = "Free some space if its disk is full, and see its log. Run the same command again to continue."
            raise JobFailed(f"Prefect's server at {url} failed: {error}. {remedy}") from error


def run_flow(name: str, config: RunConfig, verbose: bool) -> Any:
    """Run the flow MODULE:NAME in this process, show its progress, and wait until Prefect has stored the task runs."""
    with prefect(verbose):
        from prefect.client.orchestration import get_client
        from prefect.flow_engine import run_flow as run_created
        from prefect.utilities.callables import get_call_parameters
        from prefect.utilities.urls import url_for

        from flows.platform.automations import TAG
        from flows.runtime import progress, settle

        since = datetime.now(UTC)
        flow = resolve_name(name)
        arguments = get_call_parameters(flow.fn, (config,), {})
        with get_client(sync_client=True) as client:  # not `prefect.tags`, which would cost each task a request
            run = client.create_flow_run(flow, parameters=flow.serialize_parameters(arguments), tags=[TAG])
        say("run", str(url_for("flow-run", obj_id=run.id)))
        with progress.on_console(console):
            try:
                return run_created(flow, run, arguments)
            finally:
                settle.wait_for_task_runs(since, RECORDS_SECONDS)

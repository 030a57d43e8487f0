"""What the verbs share: output, checks, running a flow. Only functions import Prefect, which takes 3 s."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import UTC, datetime
from pkgutil import resolve_name
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console
from rich.progress import Progress
from rich.segment import Segment
from rich.status import Status

from flows.demo import reads_corpus, write_corpus
from model import tokenizer
from model.checkpoints.records import chosen
from model.config import RunConfig, check_extra
from model.runs.job import JobFailed
from model.runs.run import find_mix, find_start, pinned_run
from storage.datasets.sealing import check_binding
from storage.datasets.versions import newest_version
from storage.errors import ObjectMissing, printable
from storage.sources import files as sources
from storage.stores.opening import open_store


class _Terminal(Console):
    """Shows control characters of a text as escapes; its own controls, such as those of a bar, stay."""

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):  # every output passes here
            yield Segment(text if control else printable(text, lines=True), style, control)


console = _Terminal(highlight=False, markup=False, soft_wrap=True)
RECORDS_SECONDS = 15.0  # Prefect's server records task runs some seconds late

Verbose = Annotated[bool, Parameter(["--verbose", "-v"], help="Also show Prefect's own log.")]
Version = Annotated[str, Parameter(help="First characters of a manifest digest (see gpt2 dataset log), or latest.")]
AsJson = Annotated[bool, Parameter("--json", help="Print JSON.")]


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
    """Raise ValueError or StorageError if a stage lacks an input. "tokenise" creates the store and the demo's text."""
    resources, run, items = config.resources, None, config.evaluation.hellaswag
    with suppress(ObjectMissing):
        run = pinned_run(open_store(config.store_url), config)
    if "tokenise" in stages and reads_corpus(config.data.source):
        with console.status("writing the corpus from Python's own documentation"):
            write_corpus()
    if "tokenise" in stages and run is None:
        check_source(config.data.source, "data.source")
    if "audit" in stages or ("evaluate" in stages and (run is None or run.config["evaluation"]["hellaswag"] != items)):
        check_source(items, "evaluation.hellaswag")
    if "tokenise" in stages and resources.runner == "dask":
        check_extra("dask", "prefect_dask")
    if "train" in stages and (kind := resources.tracker.partition(":")[0]):
        check_extra(kind, kind)  # each extra has the name of its package
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

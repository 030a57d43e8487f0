"""The console `gpt2`: read the configuration, start what was asked, say what came of it. Holds no logic and no default.

Prefect reads its settings when it is imported, and takes 3 s for that, so the flows are imported inside the verbs.
"""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from flows.console import models, serving
from flows.console.dataset import build_dataset, dataset
from flows.console.options import ConfigFile, Overrides, Verbose, command, console, prefect, run_flow, say
from model.config import RunConfig
from model.config_file import config_of, load_config
from model.runs.job import JobFailed
from storage.errors import StorageError
from storage.keys import DatasetKeys, RunKeys
from storage.stores.opening import open_store
from storage.stores.store import read_json

app = typer.Typer(
    help="Pretrain GPT-2 from scratch: text to shards, training and evaluation as one pipeline.",
    epilog="Start with: gpt2 demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)
app.add_typer(dataset, name="dataset")
serving.add_to(app)


def main() -> None:
    """Run the console; what a user can mend is a message and exit code 2."""
    try:
        app()
    except (ValueError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
    except JobFailed as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


@app.command()
def demo(verbose: Verbose = False) -> None:
    """The whole pipeline in minutes, offline: Python's own documentation to a trained, evaluated model."""
    from flows.demo import write_corpus

    config = load_config(models.CONFIGS / "demo.toml", [])
    started = time.monotonic()
    with console.status("writing the corpus from Python's own documentation"):
        write_corpus(Path(config.data.source).parent)
    _pretrain(config, verbose)
    console.print(
        f"took       {time.monotonic() - started:,.0f} s; the same command again finds it all done", highlight=False
    )


@app.command()
def pretrain(config: ConfigFile = None, overrides: Overrides = None, verbose: Verbose = False) -> None:
    """The whole pipeline: source files to shards, training, evaluation, report. Run again, it goes on where it stood.

    Settings come from --config FILE (see deploy/configs/) and from any number of --set section.field=value.
    """
    _pretrain(load_config(config, overrides or []), verbose)


@app.command()
def retry(
    name: Annotated[str, typer.Argument(help="A run, or a dataset that was built alone.", metavar="NAME")],
    config: ConfigFile = None,
    overrides: Overrides = None,
    verbose: Verbose = False,
) -> None:
    """Ask again for what was asked for last under that name: just what is missing is run.

    --config says where the store is; --set changes what differs now, as resources.workers=1.
    """
    # The other settings need not fit the defaults, only what was asked for.
    place = [override for override in overrides or [] if override.partition("=")[0].strip() == "store_url"]
    store_url = load_config(config, place).store_url
    store = open_store(store_url)
    for key, is_run in ((RunKeys(name).request, True), (DatasetKeys(name).request, False)):
        if (asked := read_json(store, key)) is not None:
            wanted = config_of(asked | {"store_url": store_url}, overrides or [])
            _pretrain(wanted, verbose) if is_run else build_dataset(wanted, verbose)
            return
    raise ValueError(
        f"retry {name!r}: neither a run nor a dataset of that name was asked for in {store_url}. gpt2 status lists "
        f"what is there; start with gpt2 pretrain or gpt2 dataset build."
    )


@app.command()
def train(
    config: ConfigFile = None,
    overrides: Overrides = None,
    ask: Annotated[bool, typer.Option("--ask", help="Only put the job into the store, for hosts elsewhere.")] = False,
    verbose: Verbose = False,
) -> None:
    """Train the run to its last step, on the dataset's newest version or the one the run is pinned to."""
    asked = load_config(config, overrides or [])
    store = open_store(asked.store_url)
    if ask:
        from flows.train import started_run
        from model.runs.job import put_job as put
        from model.runs.run import training_job

        key = put(store, training_job(started_run(store, asked)))
        say("on each host", f"python -m model {asked.store_url} {key}")
        return
    with prefect(verbose):
        from flows.train import train as flow

        run_flow(flow, asked)


@app.command()
def evaluate(
    config: ConfigFile = None,
    overrides: Overrides = None,
    model: Annotated[
        Path | None, typer.Option(help="A GPT-2 of Hugging Face's layout instead of a run.", metavar="FOLDER")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Evaluate checkpoints (validation loss, HellaSwag or a completion set, samples), then write the report.

    --set evaluation.checkpoint=every asks about all that are kept, =5000 about that step.
    """
    asked = load_config(config, overrides or [])
    if model is not None:
        asked = models.imported_run(asked, model)
    open_store(asked.store_url)
    with prefect(verbose):
        from flows.pretrain import evaluate_and_report

        _summary(run_flow(evaluate_and_report, asked), asked)


@app.command()
def report(
    names: Annotated[
        list[str] | None, typer.Argument(help="Runs; none: that of the configuration.", metavar="RUN…")
    ] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    to: Annotated[
        Path | None,
        typer.Option(help="An .html or .md file to write; of one run: else into the store.", metavar="FILE"),
    ] = None,
) -> None:
    """Write the report of a run again, or one page that compares several: gpt2 report A B --to both.html"""
    asked = load_config(config, overrides or [])
    store, names = open_store(asked.store_url), names or [asked.name]
    if to is not None and to.suffix not in (".html", ".md"):
        raise ValueError(f"--to {to}: a name that ends in .html or .md was expected. Give such a one.")
    if len(names) > 1 and to is None:
        to = Path(f"{'-'.join(names)}.html")
    from flows import report as pages
    from flows.inspection.facts import run_facts
    from flows.pages.curves import curves

    if to is None:
        pages.keep_report(store, names[0])
        say("report", f"{asked.store_url.rstrip('/')}/{RunKeys(names[0]).report('html')}")
        return
    runs = [run_facts(store, name) for name in dict.fromkeys(names)]
    try:
        to.write_bytes(pages.markdown(runs).encode() if to.suffix == ".md" else pages.page(runs, curves(runs)))
    except OSError as error:
        raise ValueError(f"--to {to}: a page was to be written there, found {error.strerror}. Give another.") from error
    say("report", str(to))


models.add_to(app)  # --help lists the verbs in the order in which they are added


@app.command()
def status(
    run: Annotated[str | None, typer.Argument(help="A run's name; none: all runs and datasets.")] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """What is done, what is missing, what failed and why: read from the store, works with no Prefect at all."""
    from flows.inspection import status as found

    store = open_store(load_config(config, overrides or []).store_url)
    lines = [line for name in ([run] if run else found.run_names(store)) for line in found.run_status(store, name)]
    if run is None:
        lines += [line for name in found.dataset_names(store) for line in found.dataset_status(store, name)]
    for line in lines:
        console.print(f"{line.what:<20} {line.state}", highlight=False, markup=False)
        if line.why:
            console.print(f"{'':<20} failed: {line.why}", highlight=False, markup=False, style="red")
    if not lines:
        console.print(f"{store.url} is empty. Start with: gpt2 demo", highlight=False)


@app.command()
def doctor(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Check versions, store, disk and server; each line is a verdict with its remedy. Exit code 1 when one is bad."""
    from flows.inspection.doctor import examine

    table = Table(box=None, show_header=False, padding=(0, 1))
    bad = 0
    for verdict in examine(load_config(config, overrides or []).store_url):
        table.add_row("[green]ok[/]" if verdict.well else "[bold red]bad[/]", verdict.what, verdict.found)
        bad += not verdict.well
    console.print(table)
    raise typer.Exit(1 if bad else 0)


@app.command()
def gc(
    config: ConfigFile = None,
    overrides: Overrides = None,
    delete: Annotated[bool, typer.Option("--delete", help="Delete it; without this nothing is changed.")] = False,
    grace_days: Annotated[float, typer.Option(min=0.05, help="What was written more recently stays.")] = 7.0,
) -> None:
    """List what nothing refers to: orphan shards, given-up checkpoints, unfinished uploads, quarantined files."""
    from flows.inspection import garbage

    store = open_store(load_config(config, overrides or []).store_url)
    seconds = grace_days * 86_400
    count = size_bytes = 0
    for found in garbage.collect(store, seconds) if delete else garbage.find(store, seconds):
        console.print(f"{found.kind:<10} {found.name}  {found.size_bytes:,} bytes", highlight=False, markup=False)
        count, size_bytes = count + 1, size_bytes + found.size_bytes
    what = f"{count:,} objects and files, {size_bytes / 1e6:,.1f} MB, older than {grace_days:g} days"
    console.print(f"gc         {what}: {'deleted' if delete else 'nothing was deleted'}", highlight=False)
    if count and not delete:
        console.print(f"to delete  {command('gc --delete', config, overrides or [])}", highlight=False, markup=False)


def _pretrain(config: RunConfig, verbose: bool) -> None:
    from flows.console.preflight import check

    check(config)
    with prefect(verbose):
        from flows.pretrain import pretrain as flow

        _summary(run_flow(flow, config), config)


def _summary(facts: dict[str, Any], config: RunConfig) -> None:
    """The last lines: what was made, how good it is, where to look."""
    data, training = facts["dataset"], facts["training"]
    learnt = ""
    if training["last_loss"] is not None:  # an imported model was not trained here
        learnt = f", loss {training['first_loss']:.4f} → {training['last_loss']:.4f}"
    rows = []
    if data:
        rows.append(
            (
                "dataset",
                f"{data['name']}: {data['tokens']:,} tokens, {data['shards']} shards, manifest {data['manifest']}",
            )
        )
    rows.append(("training", f"{training['steps']:,} steps{learnt}"))
    for found in facts["evaluations"]:
        if found["metrics"]:
            metrics = ", ".join(f"{name} {value:.4f}" for name, value in found["metrics"].items())
            rows.append((found["name"], f"{metrics} (step {found['step']:,})"))
    for written in [text for drawn in facts["samples"] for text in drawn["texts"]][:1]:
        rows.append(("sample", " ".join((written["prompt"] + written["text"]).split())))
    rows += [
        ("report", f"{config.store_url.rstrip('/')}/{facts['report']}"),
        ("UI", "gpt2 serve, then http://127.0.0.1:4200"),
    ]
    console.print()
    for name, text in rows:
        say(name, text)


if __name__ == "__main__":
    main()

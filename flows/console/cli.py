"""The console script `gpt2`: its entry point, and the verbs that run the pipeline or one of its stages.

A verb reads the configuration, calls the flow or function that does the work, and prints the outcome.
Importing Prefect takes 3 s and reads its settings from the environment, so verbs import flows inside the function.
"""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from flows.console import dataset, models, serving, upkeep, versions  # noqa: F401  # importing them registers their verbs
from flows.console.app import app
from flows.console.dataset import build_dataset
from flows.console.options import (
    ConfigFile,
    Overrides,
    Verbose,
    console,
    load_with_store,
    prefect,
    run_flow,
    say,
)
from flows.console.request import last_request
from flows.console.summary import summary_lines
from flows.handoffs import Reported
from model.config import RunConfig
from model.config_file import load_config
from model.runs.job import JobFailed
from storage.errors import StorageError
from storage.keys import RunKeys
from storage.stores.opening import open_store

INTERRUPTED = 130  # Typer turns KeyboardInterrupt into this exit code


def main(argv: list[str] | None = None) -> None:
    """Run the console. Exit code 2 with a message for what a user can fix, 1 for a failed job, 130 for Ctrl-C."""
    try:
        app(argv)
    except (ValueError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except JobFailed as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except SystemExit as exiting:
        if exiting.code == INTERRUPTED:
            print("stopped; run the same command again to continue", file=sys.stderr)
        raise


@app.command()
def demo(
    minutes: Annotated[int, typer.Option(min=2, help="Total time on 2 idle cores, about; sets the steps.")] = 3,
    verbose: Verbose = False,
) -> None:
    """Run the whole pipeline offline: Python's own documentation becomes a trained, evaluated GPT-2.

    Writes to ./data and ./.gpt2. Run it again and every step is already done. Training steps grow with --minutes, at a
    rate measured on 2 cores. A longer demo is a separate run, such as demo-15.

    Example: gpt2 demo --minutes 15

    Next: gpt2 status, or gpt2 serve to look at the runs in a browser.
    """
    from flows.demo import lasting, write_corpus

    config = lasting(load_config(models.CONFIGS / "demo.toml", []), minutes)
    started = time.monotonic()
    with console.status("writing the corpus from Python's own documentation"):
        write_corpus(Path(config.data.source).parent)
    _pretrain(config, verbose)
    say("took", f"{time.monotonic() - started:,.0f} s; run the same command again and every step is already done")


@app.command()
def pretrain(config_file: ConfigFile = None, overrides: Overrides = None, verbose: Verbose = False) -> None:
    """Run the whole pipeline: download, tokenise, train, evaluate, report.

    Run the same command again after a failure or Ctrl-C: it continues where it stopped.

    Example: gpt2 pretrain --set name=mine --set data.dataset=mine --set data.source='texts/*.parquet'

    The project's own configurations are in deploy/configs/; model/config.py lists every setting.

    Next: gpt2 report, gpt2 generate --prompt "..."
    """
    _pretrain(load_config(config_file, overrides or []), verbose)


@app.command()
def retry(
    name: Annotated[str, typer.Argument(help="A run, or a dataset that was built alone.", metavar="NAME")],
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    verbose: Verbose = False,
) -> None:
    """Repeat the last request for a run or dataset: only what failed or is missing is run.

    The settings are those of that request. --config only names the store; --set changes a setting.

    Example: gpt2 retry gpt2-124m --set resources.workers=1
    """
    request = last_request(name, config_file, overrides or [])
    if request.is_run:
        _pretrain(request.config, verbose)
    else:
        build_dataset(request.config, verbose)


@app.command()
def train(
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    ask: Annotated[
        bool, typer.Option("--ask", help="Only write the job into the store and print the command that runs it.")
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Train to the last step, on the dataset's newest version or on the version that the run is pinned to.

    Run the same command again after a failure or Ctrl-C: it continues from the newest checkpoint.

    Example: gpt2 train --set name=mine --set train.max_steps=200

    Next: gpt2 evaluate with the same settings
    """
    config, store = load_with_store(config_file, overrides)
    if ask:
        from flows.train import started_run
        from model.runs.job import put_job
        from model.runs.run import training_job

        key = put_job(store, training_job(started_run(store, config)))
        say("on each host", f"python -m model {config.store_url} {key}")
        return
    with prefect(verbose):
        from flows.train import train as flow

        run_flow(flow, config)


@app.command()
def evaluate(
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    model: Annotated[
        Path | None, typer.Option(help="Evaluate this GPT-2 in Hugging Face's layout, not a run.", metavar="FOLDER")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Evaluate the newest checkpoint (validation loss, HellaSwag or a completion set, samples), then write the report.

    --set evaluation.checkpoint=every evaluates every checkpoint that was kept, =5000 that of step 5000.

    Example: gpt2 evaluate --model path/to/gpt2

    Next: gpt2 report
    """
    config = load_config(config_file, overrides or [])
    if model is not None:
        config = models.imported_run(config, model)
    open_store(config.store_url)
    with prefect(verbose):
        from flows.pretrain import evaluate_and_report

        _print_summary(run_flow(evaluate_and_report, config), config)


@app.command()
def report(
    names: Annotated[
        list[str] | None, typer.Argument(help="The runs; by default that of the configuration.", metavar="RUN…")
    ] = None,
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    to: Annotated[
        Path | None,
        typer.Option(help="The .html or .md file to write. By default the report goes into the store.", metavar="FILE"),
    ] = None,
) -> None:
    """Write the report of a run again, or one page that compares several runs.

    Example: gpt2 report small large --to both.html
    """
    config, store = load_with_store(config_file, overrides)
    names = names or [config.name]
    from flows.pages.run_report import write_page, write_report

    if to is None and len(names) == 1:
        write_report(store, names[0])
        say("report", f"{config.store_url.rstrip('/')}/{RunKeys(names[0]).report('html')}")
    else:
        path = to or Path(f"{'-'.join(names)}.html")
        write_page(store, names, path)
        say("report", str(path))


def _pretrain(config: RunConfig, verbose: bool) -> None:
    from flows.console.preflight import check

    check(config)
    with prefect(verbose):
        from flows.pretrain import pretrain as flow

        _print_summary(run_flow(flow, config), config)


def _print_summary(reported: "Reported", config: RunConfig) -> None:
    console.print()
    for label, text in summary_lines(reported, config.store_url):
        say(label, text)


if __name__ == "__main__":
    main()

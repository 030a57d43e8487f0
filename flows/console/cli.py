"""The console script `gpt2`: its entry point, and the verbs that run the pipeline or one of its stages."""

import shlex
import sys
import time
import traceback
from pathlib import Path
from typing import Annotated, Any

from cyclopts import CycloptsError, Parameter, UnusedCliTokensError
from cyclopts.validators import Number

from flows.console import models, operations, versions  # noqa: F401  # importing them registers their verbs
from flows.console.dataset import build_dataset
from flows.console.options import DEFAULTS, Settings, Verbose, app, check_inputs, console, run_flow, say
from flows.demo import lasting, write_corpus
from flows.handoffs import Reported
from model.config import RunConfig
from model.config_file import config_of, load_config
from model.processes.output import discard_output
from model.runs.job import OUT_OF_MEMORY, JobFailed, put_job
from model.runs.run import find_run, training_job
from storage.errors import StorageError, printable
from storage.keys import DatasetKeys, RunKeys
from storage.stores.opening import CREDENTIALS, open_store
from storage.stores.store import read_as


def main(argv: list[str] | None = None) -> None:
    """Run the console. Exit code 2 with a message for what a user can fix, 1 for a failed job, 130 for Ctrl-C."""
    try:
        sys.exit(app(sys.argv[1:] if argv is None else argv) or 0)
    except UnusedCliTokensError as error:
        message, code = f"error: unexpected arguments: {shlex.join(error.unused_tokens or [])}. See gpt2 --help.", 2
    except (ValueError, StorageError, CycloptsError, JobFailed) as error:
        message, code = f"error: {error}", 1 if isinstance(error, JobFailed) else 2
    except KeyboardInterrupt:
        message, code = "stopped; run the same command again to continue", 130
    except BrokenPipeError:
        discard_output()
        sys.exit(1)
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        message, code = f"error: {reason}. Check free space and permissions, then run the same command again.", 1
    except Exception as error:
        is_out_of_memory = isinstance(error, MemoryError) or "can't start new thread" in str(error)
        message, code = f"error: {OUT_OF_MEMORY}" if is_out_of_memory else traceback.format_exc(), 1
    print(printable(CREDENTIALS.sub("://…@", message), lines=True), file=sys.stderr)
    sys.exit(code)


@app.command
def demo(*, minutes: Annotated[int, Parameter(validator=Number(gte=2, lt=9999))] = 3, verbose: Verbose = False) -> None:
    """Run the whole pipeline offline: train and evaluate a small GPT-2 on Python's own documentation.

    Writes to ./data, ./.gpt2 and ~/.cache/gpt2-pipeline. Running it again skips finished stages.
    A duration other than the default is a separate run, such as demo-15.

    Example: gpt2 demo --minutes 15
    Next: gpt2 status, or gpt2 serve to look at the runs in a browser.

    Args:
        minutes: Approximate total time on 2 idle cores; sets the number of training steps.
    """
    config = lasting(load_config(models.CONFIGS / "demo.toml", []), minutes)
    started = time.monotonic()
    with console.status("writing the corpus from Python's own documentation"):
        write_corpus(Path(config.data.source).parent)
    _pretrain(config, verbose)
    say("took", f"{time.monotonic() - started:,.0f} s; run the same command again and every stage is already done")


@app.command
def pretrain(*, settings: Settings = DEFAULTS, verbose: Verbose = False) -> None:
    """Run the whole pipeline: download, tokenise, train, evaluate, report.

    Run the same command again after a failure or Ctrl-C: it continues where it stopped.

    Example: gpt2 pretrain --config mine.toml --set train.max_steps=200
    Next: gpt2 report, gpt2 generate --prompt "..."
    """
    _pretrain(settings.load(), verbose)


@app.command
def retry(name: str, /, *, settings: Settings = DEFAULTS, verbose: Verbose = False) -> None:
    """Repeat the last request for a run or dataset, running only what failed or is missing.

    The settings come from that request; --set overrides them. From --config, only store_url is used.

    Example: gpt2 retry gpt2-124m --set resources.workers=1

    Args:
        name: A run, or a dataset that gpt2 dataset build built.
    """
    # Overrides may fit the request and not the defaults, so only store_url is read here.
    store_override = [text for text in settings.overrides if text.partition("=")[0].strip() == "store_url"]
    store_url = load_config(settings.file, store_override).store_url
    store = open_store(store_url)
    run = find_run(store, name)
    pinned = {"name": name} | run.config if run else None
    for key, request, run_again in (
        (RunKeys(name).request, read_as(store, RunKeys(name).request, dict[str, Any]), _pretrain),
        (RunKeys(name).config, pinned, _train),  # started by gpt2 train, which stores no request
        (DatasetKeys(name).request, read_as(store, DatasetKeys(name).request, dict[str, Any]), build_dataset),
    ):
        if request is not None:
            try:
                config = config_of(request | {"store_url": store_url}, list(settings.overrides))
            except ValueError as error:
                remedy = "If the object is damaged, delete it, and give its settings to gpt2 pretrain or dataset build."
                raise ValueError(f"{error}\nThe settings are those of {key!r} and --set. {remedy}") from error
            run_again(config, verbose)
            return
    raise ValueError(f"retry {name!r}: {store_url} has no such run or dataset to repeat. List what it has: gpt2 status")


@app.command
def train(*, settings: Settings = DEFAULTS, ask: bool = False, verbose: Verbose = False) -> None:
    """Train to the last step, on the dataset version that the run is pinned to. A new run uses the newest version.

    Example: gpt2 train --set name=mine --set train.max_steps=200
    Next: gpt2 evaluate with the same settings; after a failure or Ctrl-C, the same command, to continue.

    Args:
        ask: Do not train: pin the run, write its job into the store and print the command that runs the job.
    """
    config, store = settings.load_with_store()
    if ask:
        from flows.train import started_run

        key = put_job(store, training_job(started_run(store, config)))
        say("on each host", f"python -m model {config.store_url} {key}")
        return
    _train(config, verbose)


@app.command
def evaluate(*, settings: Settings = DEFAULTS, model: Path | None = None, verbose: Verbose = False) -> None:
    """Evaluate the newest checkpoint (validation loss, HellaSwag or a completion set, samples), then write the report.

    To evaluate every kept checkpoint, add --set evaluation.checkpoint=every; for one checkpoint, give its step.

    Example: gpt2 evaluate --model path/to/gpt2
    Next: gpt2 report

    Args:
        model: A folder with a GPT-2 in Hugging Face format, to evaluate instead of a run.
    """
    config = settings.load()
    if model is not None:
        config = models.imported_run(config, model)
    check_inputs(config, "evaluate")
    _print_summary(run_flow("flows.pretrain:evaluate_and_report", config, verbose), config)


@app.command(usage="Usage: gpt2 report [OPTIONS] [NAMES...]")
def report(*names: str, settings: Settings = DEFAULTS, to: Path | None = None) -> None:
    """Write the report of a run again, or write one page that compares several runs.

    Example: gpt2 report small large --to both.html

    Args:
        names: The runs; by default the run that the configuration names.
        to: The .html or .md file to write (default: the store for one run, ./RUN-RUN.html for several).
    """
    from flows.pages.run_report import write_page, write_report

    config, store = settings.load_with_store()
    runs = list(names) or [config.name]
    if to is None and len(runs) == 1:
        write_report(store, runs[0])
        say("report", f"{config.store_url.rstrip('/')}/{RunKeys(runs[0]).report('html')}")
    else:
        path = to or Path(f"{'-'.join(runs)}.html")
        write_page(store, runs, path)
        say("report", str(path))


def _pretrain(config: RunConfig, verbose: bool) -> None:
    check_inputs(config, "tokenise", "train", "evaluate")
    _print_summary(run_flow("flows.pretrain:pretrain", config, verbose), config)


def _train(config: RunConfig, verbose: bool) -> None:
    check_inputs(config, "train")
    run_flow("flows.train:train", config, verbose)


def _print_summary(reported: Reported, config: RunConfig) -> None:
    console.print()
    if dataset := reported.dataset:
        counts = f"{dataset.version.tokens:,} tokens, {len(dataset.version.shard_ids)} shards"
        say("dataset", f"{dataset.name}: {counts}, manifest {dataset.version.digest}")
    training = reported.training
    loss = "" if training.last_loss is None else f", loss {training.first_loss:.4f} → {training.last_loss:.4f}"
    say("training", f"{training.steps:,} steps{loss}")
    for result in reported.evaluations:
        if result.metrics:
            metrics = ", ".join(f"{name} {value:.4f}" for name, value in result.metrics.items())
            say(result.name, f"{metrics} (step {result.step:,})")
    if reported.sample is not None:
        say("sample", " ".join(reported.sample.split()))
    say("report", f"{config.store_url.rstrip('/')}/{reported.page}")
    say("UI", "gpt2 serve, then http://127.0.0.1:4200")


if __name__ == "__main__":
    main()

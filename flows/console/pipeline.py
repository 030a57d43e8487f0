"""The verbs that run the pipeline or one of its stages: demo, pretrain, train, evaluate, report, retry."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from flows.console import detached, models
from flows.console.dataset import build_dataset
from flows.console.finished import finished_run
from flows.console.options import AsJson, Verbose, check_inputs, console, print_json, run_flow, say
from flows.console.settings import DEFAULTS, RunName, Settings
from flows.demo import lasting
from flows.handoffs import Reported
from model.config import RunConfig
from model.config_file import config_of, load_config
from model.evaluation.items import ENDINGS
from model.runs.job import put_job
from model.runs.run import keep_request, stored_dataset_settings, stored_settings, training_job
from storage.keys import RunKeys
from storage.stores.opening import open_store

Detach = Annotated[bool, Parameter(help="Run in the background, even after this terminal closes; see gpt2 logs.")]
EXTEND = "Continue this finished run under a new name, with a larger train.max_steps."
Extend = Annotated[str | None, Parameter(help=EXTEND)]


def demo(*, minutes: Annotated[int, Parameter(validator=Number(gte=2, lt=9999))] = 3, verbose: Verbose = False) -> None:
    """Run the whole pipeline offline: train and evaluate a small GPT-2 on Python's own documentation.

    Writes to ./data, ./.gpt2 and ~/.cache/gpt2-pipeline. Running it again skips finished stages.
    A duration other than the default is a separate run, such as demo-15.

    Example: gpt2 demo --minutes 15
    Next: gpt2 status, or gpt2 serve to look at the runs in a browser.

    Args:
        minutes: Approximate total time on 2 idle cores; sets the number of training steps.
    """
    _pretrain(lasting(load_config(Path("demo"), []), minutes), verbose)


def pretrain(
    name: RunName = None,
    /,
    *,
    settings: Settings = DEFAULTS,
    extend: Extend = None,
    detach: Detach = False,
    verbose: Verbose = False,
) -> None:
    """Run the whole pipeline: download, tokenise, train, evaluate, report.

    Run the same command again after a failure or Ctrl-C: it continues where it stopped.

    Example: gpt2 pretrain mine --config mine.toml --set train.max_steps=200
    Next: gpt2 report, gpt2 generate --prompt "..."
    """
    config = _extended(settings, name, extend) if extend else settings.run(name)
    if detach:
        detached.start("pretrain", config)
    else:
        _pretrain(config, verbose)


def retry(name: RunName = None, /, *, settings: Settings = DEFAULTS, verbose: Verbose = False) -> None:
    """Repeat the last request for a run or dataset, running only what failed or is missing.

    The settings come from that request; --set overrides them. From --config, only store_url is used.

    Example: gpt2 retry gpt2-124m --set resources.workers=1

    Args:
        name: A run, or a dataset that gpt2 dataset build built.
    """
    store = settings.store()
    settings = Settings(None, (f"store_url={store.url}", *settings.overrides))
    name = name or settings.run().name
    if any(store.list(RunKeys(name).request)):
        _pretrain(settings.run(name), verbose)
    elif stored_settings(store, name):  # started by gpt2 train, which stores no request
        _train(settings.run(name), verbose)
    elif stored_dataset_settings(store, name):
        build_dataset(settings.dataset(name), verbose)
    else:
        raise ValueError(f"retry {name!r}: {store.url} has no such run or dataset to repeat. List them: gpt2 status")


def train(
    name: RunName = None,
    /,
    *,
    settings: Settings = DEFAULTS,
    extend: Extend = None,
    ask: bool = False,
    detach: Detach = False,
    verbose: Verbose = False,
) -> None:
    """Train to the last step, on the dataset version that the run is pinned to. A new run uses the newest version.

    Example: gpt2 train longer --extend mine --set train.max_steps=400
    Next: gpt2 evaluate NAME; after a failure or Ctrl-C, the same command, to continue.

    Args:
        ask: Do not train: pin the run, write its job into the store and print the command that runs the job.
    """
    config = _extended(settings, name, extend) if extend else settings.run(name)
    if ask:
        from flows.train import started_run

        store = open_store(config.store_url)
        key = put_job(store, training_job(started_run(store, config)))
        say("on each host", f"python -m model {config.store_url} {key}")
    elif detach:
        detached.start("train", config)
    else:
        _train(config, verbose)


def evaluate(
    name: RunName = None, /, *, settings: Settings = DEFAULTS, model: Path | None = None, verbose: Verbose = False
) -> None:
    """Evaluate the newest checkpoint (validation loss, HellaSwag or a completion set, samples), then write the report.

    To evaluate every kept checkpoint, add --set evaluation.checkpoint=every; for one checkpoint, give its step.

    Example: gpt2 evaluate --model path/to/gpt2
    Next: gpt2 report

    Args:
        model: A folder with a GPT-2 in Hugging Face format, to evaluate instead of a run.
    """
    config = settings.run(name) if model is None else models.imported_run(settings.new(name), model)
    check_inputs(config, "evaluate")
    _print_summary(run_flow("flows.pretrain:evaluate_and_report", config, verbose), config)


def report(*names: str, settings: Settings = DEFAULTS, to: Path | None = None, as_json: AsJson = False) -> None:
    """Write the report of a run again, or write one page that compares several runs.

    Example: gpt2 report small large --to both.html

    Args:
        names: The runs (default: the only run of the store).
        to: The .html or .md file to write (default: the store for one run, ./RUN-RUN.html for several).
    """
    from flows.inspection.facts import run_facts
    from flows.pages.run_report import write_page, write_report

    config = settings.run(*names[:1])
    store, runs = open_store(config.store_url), list(names) or [config.name]
    if as_json:
        for facts in (run_facts(store, run) for run in runs):
            evaluations = [{"step": one.step, "metrics": one.metrics} for one in facts.evaluations]
            print_json({"run": facts.name, **asdict(facts.training), "evaluations": evaluations})
    elif to is None and len(runs) == 1:
        write_report(store, runs[0])
        say("report", f"{config.store_url.rstrip('/')}/{RunKeys(runs[0]).report('html')}")
    else:
        path = to or Path(f"{'-'.join(runs)}.html")
        write_page(store, runs, path)
        say("report", str(path))


def _extended(settings: Settings, name: str | None, parent: str) -> RunConfig:
    """The configuration of a new run that continues `parent` with all of its settings, except those given."""
    store = settings.store()
    stored = stored_settings(store, parent)
    if not name or stored is None:
        unknown = f"store {store.url!r} has no run {parent!r} that was trained"
        problem = "the new run needs a name" if stored else unknown
        raise ValueError(f"--extend {parent}: {problem}. Write: gpt2 train NEW --extend OLD --set train.max_steps=N")
    start = [f"train.start_from={parent}", "train.start_with=everything"]
    return config_of(stored | {"store_url": store.url}, [*start, *settings.overrides, f"name={name}"])


def _pretrain(config: RunConfig, verbose: bool) -> None:
    check_inputs(config, "tokenise", "train", "evaluate")
    started, store = time.monotonic(), open_store(config.store_url)
    reported = finished_run(store, config)
    if reported is None:
        reported = run_flow("flows.pretrain:pretrain", config, verbose)
        say("took", f"{time.monotonic() - started:,.0f} s; a second time, every stage is already done")
    else:
        keep_request(store, RunKeys(config.name).request, config)
        say("pretrain", "every stage is already done")
    _print_summary(reported, config)


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
            chance = f", chance {1 / ENDINGS}" if any("_acc" in name for name in result.metrics) else ""
            say(result.name, f"{metrics} (step {result.step:,}{chance})")
    if reported.sample is not None:
        say("sample", " ".join(reported.sample.split()))
    say("report", f"{config.store_url.rstrip('/')}/{reported.page}")
    say("UI", "gpt2 serve, then http://127.0.0.1:4200")

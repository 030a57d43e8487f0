"""The verbs of `gpt2 dataset` that build, check and copy: build, verify, audit, copy."""

import json
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress

from flows.console.app import dataset_app
from flows.console.options import (
    ConfigFile,
    Overrides,
    Verbose,
    command,
    console,
    load_with_store,
    prefect,
    progress_bar,
    run_flow,
    say,
)
from model.config import RunConfig
from model.config_file import load_config
from storage.stores.opening import open_store

if TYPE_CHECKING:
    from flows.console.verification import Verification


@dataset_app.command()
def build(config_file: ConfigFile = None, overrides: Overrides = None, verbose: Verbose = False) -> None:
    """Build the missing shards and seal a new version of the dataset. If nothing changed, no version is added.

    Run the same command again after a failure or Ctrl-C: it builds only what is missing.

    Example: gpt2 dataset build --set data.dataset=mine --set data.source='texts/*.parquet'

    Next: gpt2 dataset show, gpt2 dataset verify, gpt2 train
    """
    build_dataset(load_config(config_file, overrides or []), verbose)


def build_dataset(config: RunConfig, verbose: bool) -> None:
    """Run the flow of the same name."""
    from flows.console.preflight import check

    check(config)
    with prefect(verbose):
        from flows.pretrain import build_dataset as flow

        run_flow(flow, config)


@dataset_app.command()
def verify(
    config_file: ConfigFile = None,
    overrides: Overrides = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Compare only sizes and the checksums that the store keeps.")
    ] = False,
    deep: Annotated[
        int, typer.Option(min=0, help="Also tokenise N random documents of the source again.", metavar="N")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Rebuild the damaged shards.")] = False,
    verbose: Verbose = False,
) -> None:
    """Prove that the dataset's newest version is intact. By default this reads every byte of it.

    Exit code 0: intact. 1: damaged, and the command that repairs it is printed. 2: not checked.

    Example: gpt2 dataset verify --deep 100

    Next, when something is damaged: gpt2 dataset verify --repair
    """
    from flows.console import verification

    if as_json and repair:
        raise ValueError("--json and --repair exclude each other: a repair prints its progress. Give only one.")
    config, store = load_with_store(config_file, overrides)
    target = verification.newest_target(store, config)
    files = target.source_files() if deep or repair else []
    with progress_bar("verify", len(target.manifest.shard_ids), hidden=as_json) as advance:
        result = verification.verify(target, files, quick=quick, deep=deep, on_progress=advance)
    repair_command = command("dataset verify --repair", config_file, overrides) if result.damaged_shards else None
    if as_json:
        _print_json(result, repair_command)
    else:
        _print_lines(result, None if repair else repair_command)
    if repair and result.damaged_shards:
        verification.forget_shards(target, files, result.damaged_shards)
        build_dataset(target.config, verbose)
    if result.other_damage if repair else result.damage:
        raise typer.Exit(1)


def _print_json(result: "Verification", repair_command: str | None) -> None:
    facts = {
        "dataset": result.target.dataset,
        "manifest": result.target.manifest.digest,
        "whole": result.whole_shards,
        "documents": result.documents,
        "damaged": [{"name": damage.name, "wrong": damage.wrong} for damage in result.damage],
        "mend": repair_command,
    }
    print(json.dumps(facts))


def _print_lines(result: "Verification", repair_command: str | None) -> None:
    for damage in result.damage:
        say("damaged", f"{damage.name}: {damage.wrong}")
    say("verify", f"{result.whole_shards:,} of {len(result.target.manifest.shard_ids):,} shards are whole")
    if result.documents:
        say("verify", f"{result.documents:,} documents of the source compared")
    if repair_command:
        say("to repair", repair_command)


@dataset_app.command()
def audit(config_file: ConfigFile = None, overrides: Overrides = None, verbose: Verbose = False) -> None:
    """Look for leaks: documents of val in train, duplicates in train, HellaSwag items in train.

    The leak report is stored beside the manifest.

    HellaSwag is downloaded once. Without a network: --set evaluation.hellaswag="" or a file of items.

    Next: gpt2 dataset show prints the leak report
    """
    config, _ = load_with_store(config_file, overrides)
    with prefect(verbose):
        from flows.leaks import find_leaks_of_newest

        run_flow(find_leaks_of_newest, config)


@dataset_app.command()
def copy(
    to: Annotated[str, typer.Argument(help="The other store: a folder or s3://bucket/prefix.", metavar="STORE_URL")],
    config_file: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Copy all versions of the dataset to another store and verify every shard on the way.

    Run the same command again after a failure or Ctrl-C: it copies only what is missing.

    Example: gpt2 dataset copy s3://bucket/prefix

    Next: gpt2 dataset verify --set store_url=STORE_URL
    """
    from storage.datasets.copy import copy_dataset

    config, store = load_with_store(config_file, overrides)
    target = open_store(to, create=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("copy", total=None)
        copied = copy_dataset(
            store, target, config.data.dataset, lambda done, total: progress.update(bar, completed=done, total=total)
        )
    say("copy", f"{copied.copied:,} of {copied.shards:,} shards copied now")
    say("copy", f"manifest {copied.manifest.digest} is the newest in {to}")

"""The verbs of `gpt2 dataset`: build, verify, copy. Each reads the configuration, asks, and says what came of it."""

import json
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Annotated

import typer
from rich.progress import Progress, track

from flows.console.options import ConfigFile, Overrides, Verbose, command, console, prefect, run_flow
from flows.console.versions import add_to
from model.config import DataConfig, RunConfig
from model.config_file import load_config
from storage.keys import DatasetKeys
from storage.sources.files import SourceFile
from storage.stores.opening import open_store
from storage.stores.store import Store

dataset = typer.Typer(help="Build, check and copy datasets.", no_args_is_help=True)
add_to(dataset)
AT_ONCE = 4  # shards in flight: a store's answer to one is on its way while another is hashed


@dataset.command()
def build(config: ConfigFile = None, overrides: Overrides = None, verbose: Verbose = False) -> None:
    """Make the shards that are missing and seal a new version of the dataset; nothing new gives no new version."""
    build_dataset(load_config(config, overrides or []), verbose)


def build_dataset(config: RunConfig, verbose: bool) -> None:
    """Run the flow of the same name."""
    from flows.console.preflight import check

    check(config)
    with prefect(verbose):
        from flows.pretrain import build_dataset as flow

        run_flow(flow, config)


@dataset.command()
def verify(
    config: ConfigFile = None,
    overrides: Overrides = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only sizes and the sums that the store keeps.")] = False,
    deep: Annotated[int, typer.Option(min=0, help="Tokenise so many documents of the source again.", metavar="N")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Make again what is damaged.")] = False,
    verbose: Verbose = False,
) -> None:
    """Prove that the dataset's newest version is whole; without an option every byte of it is read.

    Exit code 0: it is. 1: something is damaged; the command that mends it is printed. 2: it could not be checked.
    """
    from model import tokenizer
    from storage.datasets.versions import newest_version
    from storage.inspection.verify import check_documents, check_fully, check_quickly, check_versions

    asked = load_config(config, overrides or [])
    store, name = open_store(asked.store_url), asked.data.dataset
    manifest = newest_version(store, name)
    if as_json and repair:
        raise ValueError("--json and --repair were both given: a repair prints what it does. Give one of them.")
    data = asked.data
    if data.source == manifest.source.get("dataset"):  # the files it was made of, whatever came since
        data = data.model_copy(update={"revision": manifest.source["commit"]})
    files = _files(store, data) if deep or repair else []
    look = partial(check_quickly, store, name) if quick else partial(check_fully, store, name, eot=tokenizer.EOT)
    shown = {"console": console, "disable": as_json or not console.is_terminal}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        looks = pool.map(look, manifest.rows())
        damaged = [found for found in track(looks, "verify", len(manifest.shard_ids), **shown) if found]  # type: ignore[arg-type]
    again = {found.name for found in damaged}
    whole = len(manifest.shard_ids) - len(damaged)
    damaged += [] if quick else check_versions(store, name, manifest)
    seed = secrets.randbits(32)  # other documents each time
    drawn = list(check_documents(store, name, manifest, files, tokenizer.encode, count=deep, seed=seed)) if deep else []
    damaged += [found for found in drawn if found]
    mend = command("dataset verify --repair", config, overrides or [])
    if as_json:
        found = [{"name": damage.name, "wrong": damage.wrong} for damage in damaged]
        facts = {"dataset": name, "manifest": manifest.digest, "whole": whole, "documents": len(drawn)}
        print(json.dumps(facts | {"damaged": found, "mend": mend if again else None}))
    else:
        for damage in damaged:
            console.print(f"damaged    {damage.name}: {damage.wrong}", highlight=False, markup=False)
        console.print(f"verify     {whole:,} of {len(manifest.shard_ids):,} shards are whole", highlight=False)
        if drawn:
            console.print(f"verify     {len(drawn):,} documents of the source compared", highlight=False)
        if again and not repair:
            console.print(f"to mend    {mend}", highlight=False, markup=False)
    if repair and again:
        _check_source(store, data, files, again)  # before anything is given up
        for shard_id in sorted(again):  # without its record a shard's job runs again, and replaces what is damaged
            store.delete(DatasetKeys(name).record(shard_id))
        build(config, [*(overrides or []), f"data.revision={data.revision}"], verbose)
    if len(damaged) > (len(again) if repair else 0):
        raise typer.Exit(1)


def _files(store: Store, data: DataConfig) -> Sequence[SourceFile]:
    from storage.sources.mirror import list_source

    found, _ = list_source(store, data.source, data.config, data.revision, "train")
    return found.files


def _check_source(store: Store, data: DataConfig, files: Sequence[SourceFile], shard_ids: set[str]) -> None:
    """Raise ValueError unless the source still gives all of these shards."""
    from model import tokenizer
    from storage.datasets.plan import plan_files

    settings = data.spec(tokenizer.identity()).settings
    plans = plan_files(store, data.dataset, files, settings)
    if gone := shard_ids.difference(*(one.shard_ids for one in plans)):
        raise ValueError(
            f"--repair: {len(gone):,} damaged shards were to be made again, data.source = {data.source!r} no longer "
            f"gives {min(gone)!r}. Put the old source files back, or build another dataset from the new ones."
        )


@dataset.command()
def audit(config: ConfigFile = None, overrides: Overrides = None, verbose: Verbose = False) -> None:
    """Look for leaks: documents of val in train, documents twice in train, HellaSwag items that train shows.

    The report lies beside the manifest and is part of `gpt2 dataset show`. Without a network: --set
    evaluation.hellaswag="" or a file of items.
    """
    asked = load_config(config, overrides or [])
    open_store(asked.store_url)
    with prefect(verbose):
        from flows.leaks import find_leaks_of_newest

        run_flow(find_leaks_of_newest, asked)


@dataset.command()
def copy(
    to: Annotated[str, typer.Argument(help="The other store: a folder or s3://bucket/prefix.", metavar="STORE_URL")],
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Copy all versions of the dataset to another store, verified on the way; run again, it goes on where it stood."""
    from storage.datasets.copy import copy_dataset

    asked = load_config(config, overrides or [])
    source, target = open_store(asked.store_url), open_store(to, create=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("copy")
        copied = copy_dataset(
            source, target, asked.data.dataset, lambda done, total: progress.update(bar, completed=done, total=total)
        )
    console.print(f"copy       {copied.copied:,} of {copied.shards:,} shards copied now", highlight=False)
    console.print(f"copy       manifest {copied.manifest.digest} is the newest in {to}", highlight=False, markup=False)

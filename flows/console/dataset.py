"""The verbs of `gpt2 dataset` that build, check and copy: build, verify, audit, copy, publish, pull."""

import secrets
from collections.abc import Sequence

from cyclopts.types import NonNegativeInt

from flows.console import options
from flows.console.finished import finished_dataset
from flows.console.options import AsJson, Verbose, Version, run_flow, say
from flows.console.settings import DEFAULTS, DatasetName, Settings
from model import tokenizer
from model.config import DataConfig, RunConfig
from model.runs.run import keep_request
from storage.datasets.building import val_split
from storage.datasets.copy import copy_dataset
from storage.datasets.plan import plan_files, planner
from storage.datasets.versions import find_version, newest_version
from storage.inspection.verify import check_documents, verify_dataset
from storage.keys import DatasetKeys
from storage.sources.files import SourceFile
from storage.sources.mirror import list_source
from storage.stores.opening import open_store
from storage.stores.store import Store


def build(name: DatasetName = None, /, *, settings: Settings = DEFAULTS, verbose: Verbose = False) -> None:
    """Build the missing shards and seal a new version of the dataset. If nothing changed, no version is added.

    Example: gpt2 dataset build mine --set data.source=texts
    Next: gpt2 dataset show, gpt2 dataset verify, gpt2 train; after a failure or Ctrl-C, the same command.
    """
    build_dataset(settings.dataset(name), verbose)


def build_dataset(config: RunConfig, verbose: bool) -> None:
    """Check the inputs, then run the flow of the same name unless the newest version is up to date."""
    options.check_inputs(config, "tokenise", *(["audit"] if config.resources.audit else []))
    store = open_store(config.store_url)
    if manifest := finished_dataset(store, config):
        keep_request(store, DatasetKeys(config.data.dataset).request, config)
        say("tokenise", f"manifest {manifest.digest[:12]} is unchanged: {manifest.tokens:,} tokens")
        return
    run_flow("flows.pretrain:build_dataset", config, verbose)


def verify(
    name: DatasetName = None,
    /,
    *,
    settings: Settings = DEFAULTS,
    quick: bool = False,
    deep: NonNegativeInt = 0,
    as_json: AsJson = False,
    repair: bool = False,
    verbose: Verbose = False,
) -> int:
    """Check that the dataset's newest version is intact. By default this reads every byte.

    Exit code 0: intact or repaired. 1: damaged; prints any repair command. 2: could not check or repair.

    Example: gpt2 dataset verify --deep 100
    Next, when something is damaged: gpt2 dataset verify --repair

    Args:
        quick: Compare only sizes and the checksums that the store keeps.
        deep: Also tokenise this many random source documents again and compare them with the shards.
        repair: Rebuild the damaged shards.
    """
    if as_json and repair:
        raise ValueError("--json and --repair cannot be combined: a repair prints its progress. Give only one.")
    config = settings.dataset(name)
    store = open_store(config.store_url)
    data, manifest = config.data, newest_version(store, config.data.dataset)
    if data.source == manifest.origin.get("dataset"):
        data = data.model_copy(update={"revision": manifest.origin["commit"]})
    total = len(manifest.shard_ids)
    files: Sequence[SourceFile] = ()
    if deep or repair:
        files = list_source(store, data.source, data.config, data.revision, "train", filters=data.filters)[0].files
    with options.progress_bar("verify", total, hidden=as_json) as advance:
        damages = verify_dataset(store, data.dataset, manifest, eot=tokenizer.EOT, quick=quick, on_progress=advance)
    seed = secrets.randbits(32)  # different documents each time
    chosen = list(check_documents(store, data.dataset, manifest, files, tokenizer.encode, count=deep, seed=seed))
    damages += [damage for damage in chosen if damage is not None and not damage.of_source]
    uncompared = [damage for damage in chosen if damage is not None and damage.of_source]
    damaged_shards = {damage.name for damage in damages if damage.repairable}
    whole, compared = total - len(damaged_shards), len(chosen) - len(uncompared)
    repair_command = settings.command(f"dataset verify {data.dataset} --repair") if damaged_shards else None
    if as_json:
        facts = {"dataset": data.dataset, "manifest": manifest.digest, "whole": whole, "documents": compared}
        damaged = [{"name": damage.name, "wrong": damage.wrong} for damage in damages]
        skipped = [{"name": damage.name, "why": damage.wrong} for damage in uncompared]
        options.print_json(facts | {"damaged": damaged, "uncompared": skipped, "repair": repair_command})
    else:
        for damage in [*damages, *uncompared]:
            say("uncompared" if damage.of_source else "damaged", f"{damage.name}: {damage.wrong}")
        say("verify", f"{whole:,} of {total:,} shards match the manifest")
        if chosen:
            say("verify", f"{compared:,} documents of the source compared")
        if repair_command and not repair:
            say("to repair", repair_command)
    if repair and damaged_shards:
        _forget_shards(store, data, files, damaged_shards)
        build_dataset(config.model_copy(update={"data": data}), verbose)
        damages = [damage for damage in damages if not damage.repairable]
    return 1 if damages else 0


def _forget_shards(store: Store, data: DataConfig, files: Sequence[SourceFile], shard_ids: set[str]) -> None:
    """Delete these shards' records, so that the next build replaces the shards. Raises ValueError if it could not."""
    spec = data.spec(tokenizer.identity())
    plans = list(plan_files(store, data.dataset, files, spec.settings, planner(store, spec.settings, tokenizer.encode)))
    split = val_split(store, spec, plans)
    if missing := shard_ids.difference(job.shard_id for plan in plans for job in plan.jobs(split)):
        problem = f"--repair cannot rebuild {len(missing):,} damaged shards (first: {min(missing)})"
        remedy = "Restore the source files and settings of their build, or build another dataset."
        raise ValueError(f"{problem} from data.source = {data.source!r}. {remedy}")
    for shard_id in sorted(shard_ids):
        store.delete(DatasetKeys(data.dataset).record(shard_id))


def audit(name: DatasetName = None, /, *, settings: Settings = DEFAULTS, verbose: Verbose = False) -> None:
    """Look for leaks (contamination): val documents in train, duplicates in train, HellaSwag items in train.

    The leak report is stored beside the manifest. HellaSwag is downloaded once, unless evaluation.hellaswag is a file.

    Example: gpt2 dataset audit --set evaluation.hellaswag=items.jsonl
    Next: gpt2 dataset show prints the leak report
    """
    config = settings.dataset(name)
    store = open_store(config.store_url)
    newest_version(store, config.data.dataset)
    options.check_source(config.evaluation.hellaswag, "evaluation.hellaswag")
    run_flow("flows.leaks:find_leaks_of_newest", config, verbose)


def copy(name: DatasetName = None, /, *, to: str, settings: Settings = DEFAULTS) -> None:
    """Copy all versions of the dataset to another store, except what it already has. Verifies each copied shard.

    Example: gpt2 dataset copy mine --to s3://bucket/prefix
    Next: gpt2 dataset verify mine --set store_url=s3://bucket/prefix

    Args:
        to: The target store: a folder or s3://bucket/prefix.
    """
    store, dataset = settings.opened(name)
    target = open_store(to, create=True)
    with options.progress_bar("copy", None) as advance:
        manifest, shards, copied = copy_dataset(store, target, dataset, advance)
    say("copy", f"{copied:,} of {shards:,} shards copied now")
    say("copy", f"manifest {manifest.digest} is the newest in {to}")


def publish(
    name: DatasetName = None,
    /,
    *,
    to: str,
    settings: Settings = DEFAULTS,
    version: Version = "latest",
    private: bool = False,
) -> None:
    """Publish a version, and those before it, as a dataset repository of the Hugging Face Hub. Needs HF_TOKEN.

    Uploads only what the repository lacks; the manifest and the dataset card (README.md) come last.

    Example: gpt2 dataset publish mine --to owner/name
    Next: gpt2 dataset pull owner/name NAME, on any host; after a failure or Ctrl-C, the same command.

    Args:
        to: The repository, created if it does not exist: OWNER/NAME.
        private: Create the repository as private.
    """
    from flows.pages.dataset_card import hub_card
    from storage import publishing

    store, dataset = settings.opened(name)
    manifest = find_version(store, dataset, version)
    card = hub_card(to, manifest)
    with options.progress_bar("publish", None) as advance:
        commit, shards, sent = publishing.publish(store, dataset, manifest, to, card, private, advance)
    say("publish", f"{sent:,} of {shards:,} shards uploaded now")
    say("publish", f"manifest {manifest.digest} is the newest in {to}, commit {commit}")


def pull(repository: str, name: str, /, *, settings: Settings = DEFAULTS, revision: str = "main") -> None:
    """Copy a dataset that gpt2 dataset publish put on the Hub into the store, under a name. Verifies each shard.

    Example: gpt2 dataset pull owner/name mine
    Next: gpt2 dataset verify, gpt2 dataset show, gpt2 train; after a failure or Ctrl-C, the same command.

    Args:
        repository: The repository: OWNER/NAME.
        name: The name of the dataset in the store.
        revision: A branch, a tag or a commit, whose newest version and those before it are copied.
    """
    from storage import publishing

    config = settings.dataset(name)
    store = open_store(config.store_url, create=True)
    with options.progress_bar("pull", None) as advance:
        manifest, shards, pulled = publishing.pull(repository, revision, store, config.data.dataset, advance)
    say("pull", f"{pulled:,} of {shards:,} shards downloaded now")
    say("pull", f"manifest {manifest.digest} is the newest of dataset {config.data.dataset}")

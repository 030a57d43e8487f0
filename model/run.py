"""A run is pinned to its inputs at its first start: the configuration and the dataset's version. Imports no torch."""

import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from model.config import RunConfig, differences
from model.job import Job
from storage import keys
from storage.canonical import canonical_json
from storage.errors import AlreadyExists, DatasetMismatch
from storage.store import Store, overwrite, read_json


@dataclass(frozen=True)
class Run:
    """What a run is pinned to: its configuration, its source's Hub commit, the manifest, the key of HellaSwag items."""

    name: str
    config: dict[str, Any]
    commit: str | None
    manifest: str
    items: str | None
    code_version: str

    @property
    def dataset(self) -> str:
        """The name of the run's dataset."""
        return str(self.config["data"]["dataset"])


def pinned_run(store: Store, config: RunConfig) -> Run | None:
    """The run of that name, or None when it was never started. Raises DatasetMismatch when other settings are asked."""
    found = read_json(store, keys.run_config(config.name))
    if found is None:
        return None
    run = Run(**found)  # type: ignore[arg-type]  # JSON of our own
    pinned = RunConfig.model_validate({"name": run.name} | run.config).computed()  # fields added since: their defaults
    if differing := differences(config.computed(), pinned):
        raise DatasetMismatch(
            f"run {config.name!r} was started with other settings: {'; '.join(differing)}. "
            f"Choose another name with --set name=…, or ask for the same settings."
        )
    return run


def pin_run(store: Store, config: RunConfig, manifest: str, items: str | None, commit: str | None = None) -> Run:
    """The run of that name, pinned now if it was not before."""
    run = Run(config.name, config.computed(), commit, manifest, items, version("gpt2-pipeline"))
    try:
        store.put_new(keys.run_config(config.name), canonical_json(asdict(run)))
        return run
    except AlreadyExists:
        pinned = pinned_run(store, config)
        assert pinned is not None
        return pinned


def note_asked(store: Store, key: str, config: RunConfig) -> None:
    """Keep what was asked for last, so that `gpt2 retry` can ask for it again."""
    overwrite(store, key, canonical_json(config.model_dump(mode="json", exclude={"store_url"})))


def read_run(store: Store, name: str) -> Run:
    """The run of that name. Raises ObjectMissing."""
    return Run(**json.loads(store.read(keys.run_config(name)).body))


def training_job(run: Run) -> Job:
    """The run's one training: all that decides the final weights."""
    recipe = {name: run.config[name] for name in ("model", "train")}
    return Job(run.name, "train", recipe | {"dataset": run.dataset, "manifest": run.manifest})


def evaluation_jobs(run: Run, step: int) -> list[Job]:
    """The evaluations of one checkpoint: HellaSwag where the run has a file of items, else the completion set."""
    wanted = run.config["evaluation"]
    common = {
        "dataset": run.dataset,
        "manifest": run.manifest,
        "model": run.config["model"],
        "step": step,
        "train": training_job(run).job_id,
    }
    seed = {"seed": run.config["train"]["seed"]}
    val_loss = {
        "validation_tokens": wanted["validation_tokens"],
        "sequence_tokens": run.config["train"]["sequence_tokens"],
    }
    names = ("prompts", "samples", "sample_tokens", "temperature", "top_k", "top_p")
    return [
        Job(run.name, "val_loss", common | val_loss),
        Job(run.name, "completion", common | seed | {"completion_items": wanted["completion_items"]})
        if run.items is None
        else Job(run.name, "hellaswag", common | {"items": run.items}),
        Job(run.name, "samples", common | seed | {name: wanted[name] for name in names}),
    ]

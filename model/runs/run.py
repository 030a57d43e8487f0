"""A run is pinned to its inputs at its first start: the configuration and the dataset's version. Imports no torch."""

from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from typing import Any

from model.checkpoints.records import WEIGHTS, CheckpointRecord, checkpoints
from model.config import RunConfig, TrainingConfig, differences
from model.runs.job import Job
from storage.digests import canonical_json
from storage.errors import AlreadyExists, DatasetMismatch, ObjectMissing
from storage.keys import RunKeys
from storage.stores.store import Store, overwrite, read_json


@dataclass(frozen=True)
class Run:
    """What a run is pinned to: its configuration, its source's Hub commit, the manifest, the key of HellaSwag items.

    `start` names the checkpoint of another run that it begins with. `how` is not pinned: how it is asked to run now.
    """

    name: str
    config: dict[str, Any]
    commit: str | None
    manifest: str
    items: str | None
    code_version: str
    start: dict[str, Any] | None = None
    how: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def dataset(self) -> str:
        """The name of the run's dataset."""
        return str(self.config["data"]["dataset"])


def pinned_run(store: Store, config: RunConfig) -> Run | None:
    """The run of that name, or None when it was never started. Raises DatasetMismatch when other settings are asked."""
    if (run := find_run(store, config.name)) is None:
        return None
    run = replace(run, how=config.how())
    pinned = RunConfig.model_validate({"name": run.name} | run.config).computed()  # fields added since: their defaults
    pinned["train"] |= run.how["train"]
    pinned["evaluation"] = config.computed()["evaluation"]  # a run may be asked anything at any time
    if differing := differences(config.computed(), pinned):
        raise DatasetMismatch(
            f"run {config.name!r} was started with other settings: {'; '.join(differing)}. "
            f"Choose another name with --set name=…, or ask for the same settings. To go on from what it has learnt "
            f"with these: --set name=… --set train.start_from={config.name} --set train.start_with=everything"
        )
    return run


def pin_run(store: Store, config: RunConfig, manifest: str, items: str | None, commit: str | None = None) -> Run:
    """The run of that name, pinned now if it was not before. Raises ObjectMissing when it has nothing to start from."""
    start = _start(store, config.train.start_from) if config.train.start_from else None
    run = Run(config.name, config.computed(), commit, manifest, items, version("gpt2-pipeline"), start, config.how())
    pinned_values = {name: value for name, value in asdict(run).items() if name != "how"}
    try:
        store.put_new(RunKeys(config.name).config, canonical_json(pinned_values))
        return run
    except AlreadyExists:
        pinned = pinned_run(store, config)
        assert pinned is not None
        return pinned


def _start(store: Store, parent: str) -> dict[str, Any]:
    """The newest checkpoint of the run to start from."""
    if not (kept := checkpoints(store, parent)):
        raise ObjectMissing(
            f"train.start_from = {parent!r}: a checkpoint of that run was asked for, store {store.url!r} has none. "
            f"gpt2 status lists the runs; gpt2 import makes one of a Hugging Face model."
        )
    return {"run": parent, "step": kept[-1].step, "attempt": kept[-1].attempt}


def keep_request(store: Store, key: str, config: RunConfig) -> None:
    """Keep what was asked for last, so that `gpt2 retry` can ask for it again."""
    overwrite(store, key, canonical_json(config.model_dump(mode="json", exclude={"store_url"})))


def find_run(store: Store, name: str) -> Run | None:
    """The run of that name; None when it was never started, as a model that was imported."""
    found: dict[str, Any] | None = read_json(store, RunKeys(name).config)
    return None if found is None else Run(**found)


def training_job(run: Run) -> Job:
    """The run's one training: all that decides the final weights."""
    train = {name: value for name, value in run.config["train"].items() if name not in TrainingConfig.HOW}
    recipe: dict[str, Any] = {"model": run.config["model"], "train": train}
    if run.start is not None:
        recipe["start"] = run.start
    return Job(run.name, "train", recipe | {"dataset": run.dataset, "manifest": run.manifest}, run.how)


def evaluation_jobs(config: RunConfig, record: CheckpointRecord, manifest: str | None, items: str | None) -> list[Job]:
    """The evaluations of one checkpoint: each recipe holds what decides its answer, the weights' digest above all.

    Without a version of the dataset there is no val split to ask about. HellaSwag where a file of items is at hand, the
    completion set where none is wanted.
    """
    wanted = config.evaluation.model_dump(mode="json")
    common = {"model": record.model, "step": record.step, "weights": record.files[WEIGHTS]["sha256"]}
    precision = {"precision": wanted["precision"]}
    val = {"dataset": config.data.dataset, "manifest": manifest}
    seed = {"seed": config.train.seed}
    drawn = {name: wanted[name] for name in ("prompts", "samples", "sample_tokens", "temperature", "top_k", "top_p")}
    validation = {"validation_tokens": wanted["validation_tokens"], "sequence_tokens": config.train.sequence_tokens}
    recipes: dict[str, dict[str, Any]] = {}
    if manifest is not None:
        recipes["val_loss"] = val | validation | precision
    if items is not None:
        recipes["hellaswag"] = {"items": items} | precision
    elif manifest is not None and not config.evaluation.hellaswag:
        recipes["completion"] = val | seed | {"completion_items": wanted["completion_items"]} | precision
    recipes["samples"] = seed | drawn
    return [Job(config.name, kind, common | recipe, config.how()) for kind, recipe in recipes.items()]

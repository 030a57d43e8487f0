"""Runs: each is pinned at its first start to its configuration and dataset version. Imports no torch."""

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
    """A run and what it is pinned to.

    `commit` is the source's commit on the Hub, `manifest` the digest of the dataset version, and `items` the key of the
    HellaSwag file. `start` names the checkpoint of another run that it starts from. Only `how` is not pinned.
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
    """The run of that name, or None if it was never started. Raises DatasetMismatch if its pinned settings differ."""
    run = find_run(store, config.name)
    if run is None:
        return None
    run = replace(run, how=config.how())
    known = {
        section: {name: value for name, value in values.items() if name in type(getattr(config, section)).model_fields}
        for section, values in run.config.items()
    }  # settings removed since are ignored: the manifest and the job's recipe hold what they decided
    pinned = RunConfig.model_validate({"name": run.name} | known).computed()  # newer fields get their defaults
    pinned["train"] |= run.how["train"]
    pinned["evaluation"] = config.computed()["evaluation"]  # evaluations are not pinned
    if differing := differences(config.computed(), pinned):
        raise DatasetMismatch(
            f"run {config.name!r} was started with other settings: {'; '.join(differing)}. "
            f"Choose another name with --set name=…, or use the same settings. To continue its training with these: "
            f"--set name=… --set train.start_from={config.name} --set train.start_with=everything"
        )
    return run


def pin_run(store: Store, config: RunConfig, manifest: str, items: str | None, commit: str | None = None) -> Run:
    """The run of that name, pinned now unless it was before. Raises ObjectMissing if `train.start_from` has nothing."""
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
    records = checkpoints(store, parent)
    if not records:
        raise ObjectMissing(
            f"train.start_from = {parent!r}: that run has no checkpoint in store {store.url!r}. "
            f"gpt2 status lists the runs; gpt2 import makes a run from a Hugging Face model."
        )
    return {"run": parent, "step": records[-1].step, "attempt": records[-1].attempt}


def keep_request(store: Store, key: str, config: RunConfig) -> None:
    """Store the requested configuration, for `gpt2 retry`."""
    overwrite(store, key, canonical_json(config.model_dump(mode="json", exclude={"store_url"})))


def find_run(store: Store, name: str) -> Run | None:
    """The run of that name, or None if it was never started. An imported model was not."""
    value: dict[str, Any] | None = read_json(store, RunKeys(name).config)
    return None if value is None else Run(**value)


def training_job(run: Run) -> Job:
    """The training of a run. Its recipe holds everything that decides the final weights."""
    train = {name: value for name, value in run.config["train"].items() if name not in TrainingConfig.HOW}
    recipe: dict[str, Any] = {"model": run.config["model"], "train": train}
    if run.start is not None:
        recipe["start"] = run.start
    return Job(run.name, "train", recipe | {"dataset": run.dataset, "manifest": run.manifest}, run.how)


def evaluation_jobs(config: RunConfig, record: CheckpointRecord, manifest: str | None, items: str | None) -> list[Job]:
    """The evaluations of one checkpoint. Each recipe holds everything that decides its result.

    Without a manifest there is no val split, so only HellaSwag and samples remain. HellaSwag needs its items.
    The completion set replaces it if `evaluation.hellaswag` is empty.
    """
    settings = config.evaluation.model_dump(mode="json")
    checkpoint = {"model": record.model, "step": record.step, "weights": record.files[WEIGHTS].sha256}
    precision = {"precision": settings["precision"]}
    seed = {"seed": config.train.seed}
    val_split = {"dataset": config.data.dataset, "manifest": manifest}
    recipes: dict[str, dict[str, Any]] = {}
    if manifest is not None:
        sizes = {"validation_tokens": settings["validation_tokens"], "sequence_tokens": config.train.sequence_tokens}
        recipes["val_loss"] = val_split | sizes | precision
    if items is not None:
        recipes["hellaswag"] = {"items": items} | precision
    elif manifest is not None and not config.evaluation.hellaswag:
        count = {"completion_items": settings["completion_items"]}
        recipes["completion"] = val_split | seed | count | precision
    sampling = ("prompts", "samples", "sample_tokens", "temperature", "top_k", "top_p")
    recipes["samples"] = seed | {name: settings[name] for name in sampling}
    return [Job(config.name, kind, checkpoint | recipe, config.how()) for kind, recipe in recipes.items()]

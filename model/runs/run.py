"""Runs: each is pinned at its first start to its configuration and dataset version. Imports no torch."""

from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from model import tokenizer
from model.checkpoints.records import OPTIMIZER, WEIGHTS, CheckpointRecord, checkpoints, chosen
from model.config import How, ModelConfig, RunConfig, TrainingConfig, differences
from model.runs.job import Job
from storage.datasets.versions import newest_version
from storage.digests import canonical_json
from storage.errors import Conflict, DatasetMismatch
from storage.keys import DatasetKeys, RunKeys
from storage.loading.mix import Share, parse_mix
from storage.stores.store import Store, overwrite, read_as

READ = {"data": {"dataset", "source"}, "model": set(ModelConfig.model_fields),  # a stored run has these
        "train": {"max_steps", "keep_last", "keep_every_steps"}, "evaluation": {"hellaswag"}}  # fmt: skip


@dataclass(frozen=True)
class Start:
    """The checkpoint of another run from which training starts."""

    run: str
    step: int
    attempt: str


@dataclass(frozen=True)
class Run:
    """A run and what it is pinned to: everything but `how`."""

    name: str
    config: dict[str, Any]  # as its first start wrote it: a later version may have other settings
    commit: str | None  # of the source on the Hub
    manifest: str  # digest of the dataset version
    items: str | None  # key of the HellaSwag file
    code_version: str
    start: Start | None = None
    mix: dict[str, Share] = field(default_factory=dict)  # its own dataset included; empty without `train.mix`
    how: How = field(default=How(), compare=False)

    @property
    def dataset(self) -> str:
        return str(self.config["data"]["dataset"])


def pinned_run(store: Store, config: RunConfig) -> Run | None:
    """The run of that name, or None if it was never started. Raises DatasetMismatch if its pinned settings differ."""
    run = find_run(store, config.name)
    if run is None:
        return None
    # Newer fields get their defaults. Fields removed since are ignored: manifest and job hold what they decided.
    pinned = RunConfig.model_validate({"name": run.name} | run.config, extra="ignore")
    if differing := differences(config.pinned(), pinned.pinned()):
        problem = f"run {config.name!r} was started with other settings: {'; '.join(differing)}"
        remedy = f"Use the same settings or another name, or continue it: gpt2 train NEW --extend {config.name} --set …"
        raise DatasetMismatch(f"{problem}. {remedy}")
    return replace(run, how=config.how())


def pinned_items(run: Run, config: RunConfig) -> str | None:
    """The key of the run's HellaSwag items. None: a local file, which is read again as it may have changed, or none."""
    hellaswag = config.evaluation.hellaswag
    use_pinned = run.config["evaluation"]["hellaswag"] == hellaswag and not Path(hellaswag).is_file()
    return run.items if use_pinned else None


def pin_run(store: Store, config: RunConfig, manifest: str, items: str | None, commit: str | None = None) -> Run:
    """The run, pinned at its first start. Raises like `pinned_run`, `find_start` and `find_mix`."""
    start, mix, code_version = find_start(store, config), find_mix(store, config, manifest), version("gpt2-pipeline")
    run = Run(config.name, config.computed(), commit, manifest, items, code_version, start, mix, config.how())
    pinned_values = {name: value for name, value in asdict(run).items() if name != "how" and value != {}}
    try:
        store.put_new(RunKeys(config.name).config, canonical_json(pinned_values))
        return run
    except Conflict:
        pinned = pinned_run(store, config)
        assert pinned is not None
        return pinned


def find_start(store: Store, config: RunConfig) -> Start | None:
    """The newest checkpoint of `train.start_from`, if set. Raises ObjectMissing, DatasetMismatch, ValueError."""
    parent = config.train.start_from
    if not parent:
        return None
    newest = chosen(store, parent, setting="train.start_from")[0]
    if differing := differences(config.model.model_dump(), newest.model, "model"):
        problem = f"train.start_from = {parent!r}: that run has another model: {'; '.join(differing)}"
        raise DatasetMismatch(f"{problem}. Use the same model settings, or start from another run.")
    if config.train.start_with == "everything":
        if OPTIMIZER not in newest.files:
            remedy = "Set train.start_with=weights."
            raise ValueError(f"train.start_from = {parent!r}: that run was imported, so it has only weights. {remedy}")
        if newest.step >= config.train.max_steps:
            problem = f"train.max_steps = {config.train.max_steps:,}: run {parent!r} is at step {newest.step:,}"
            raise ValueError(f"{problem}, so no steps are left. Increase train.max_steps.")
    return Start(parent, newest.step, newest.attempt)


def find_mix(store: Store, config: RunConfig, manifest: str = "") -> dict[str, Share]:
    """The newest versions of the datasets of `train.mix`, and `manifest` of the run's own. Raises StorageError."""
    mix = {dataset: Share(manifest, weight) for dataset, weight in parse_mix(config.train.mix).items()}
    for dataset, share in mix.items():
        if dataset != config.data.dataset:
            newest = newest_version(store, dataset)
            if newest.tokenizer["sha256"] != tokenizer.identity()["sha256"]:
                problem = f"dataset {dataset!r} was made with another tokenizer, {newest.tokenizer['name']}"
                raise DatasetMismatch(f"train.mix: {problem}. Build its text again under another name, and mix that.")
            mix[dataset] = Share(newest.digest, share.weight)
    return mix


def keep_request(store: Store, key: str, config: RunConfig) -> None:
    """Store the requested configuration, for `gpt2 retry`."""
    overwrite(store, key, canonical_json(config.model_dump(mode="json", exclude={"store_url"})))


def stored_settings(store: Store, name: str) -> dict[str, Any] | None:
    """The settings of the last request for a run, those it was started with, or an imported model's; None: no run."""
    if request := _request(store, RunKeys(name).request):
        return request
    if run := find_run(store, name):
        return _current({"name": name} | run.config)
    if records := checkpoints(store, name):
        model = records[-1].model
        sequence_tokens = min(TrainingConfig().sequence_tokens, model["context_tokens"])
        return {"name": name, "model": model, "train": {"sequence_tokens": sequence_tokens}}
    return None


def stored_dataset_settings(store: Store, name: str) -> dict[str, Any] | None:
    """The settings of the last request for a dataset; None: there was none."""
    return _request(store, DatasetKeys(name).request)


def _request(store: Store, key: str) -> dict[str, Any] | None:
    remedy = "Delete that object, and give its settings to gpt2 pretrain or gpt2 dataset build."
    request = read_as(store, key, dict[str, Any], lambda values: bool(_current(values)), remedy)
    return request and _current(request)


def _current(values: dict[str, Any]) -> dict[str, Any]:
    """The values, without settings that were removed since."""
    return RunConfig.model_validate(values, extra="ignore").model_dump(mode="json")


def find_run(store: Store, name: str) -> Run | None:
    """The run of that name, or None if it was never started. An imported model was never started."""

    def fits(run: Run) -> bool:
        RunConfig.model_validate(run.config, extra="ignore")
        return run.name == name and all(fields <= run.config.get(part, {}).keys() for part, fields in READ.items())

    return read_as(store, RunKeys(name).config, Run, fits)


def training_job(run: Run) -> Job:
    """The training job of a run. Its recipe holds everything that decides the final weights."""
    train = {name: value for name, value in run.config["train"].items() if name not in TrainingConfig.HOW}
    inputs = {"model": run.config["model"], "train": train, "dataset": run.dataset, "manifest": run.manifest}
    optional = {name: value for name, value in asdict(run).items() if name in ("start", "mix") and value}
    return Job(run.name, "train", inputs | optional, run.how)


def evaluation_jobs(config: RunConfig, record: CheckpointRecord, manifest: str | None, items: str | None) -> list[Job]:
    """The evaluation jobs of one checkpoint. Without a manifest there is no val split: HellaSwag and samples remain."""
    settings = config.evaluation.model_dump(mode="json")
    checkpoint = {"model": record.model, "step": record.step, "weights": record.files[WEIGHTS].sha256}

    def job(kind: str, *names: str, **inputs: object) -> Job:
        return Job(config.name, kind, checkpoint | inputs | {name: settings[name] for name in names}, config.how())

    val_split = {"dataset": config.data.dataset, "manifest": manifest}
    jobs = []
    if manifest is not None:
        mix = {"mix": asdict(record.cursor)["mix"]} if record.cursor and record.cursor.mix else {}
        inputs = {"sequence_tokens": config.train.sequence_tokens} | val_split | mix
        jobs.append(job("val_loss", "validation_tokens", "precision", **inputs))
    if items is not None:
        jobs.append(job("hellaswag", "precision", items=items))
    elif manifest is not None and not config.evaluation.hellaswag:
        jobs.append(job("completion", "completion_items", "precision", seed=config.train.seed, **val_split))
    sampling = ("prompts", "samples", "sample_tokens", "temperature", "top_k", "top_p")
    return [*jobs, job("samples", *sampling, seed=config.train.seed)]

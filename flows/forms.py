"""What a click in Prefect's UI asks for: each deployment's flow takes a short form and runs it as a configuration.

The fields that are left empty keep the values of the preset. The settings of a run that exists replace the preset.
"""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from prefect import flow
from prefect.runtime import flow_run
from pydantic import Field, JsonValue

from flows import pretrain as pipeline
from flows.demo import lasting, write_corpus
from flows.handoffs import Reported
from flows.train import train as train_stage
from model.config import CHECKPOINT, LINE, NAME, TEXT, RunConfig
from model.config_file import presets
from model.form import DEFAULT, filled, preset_values
from model.runs.run import stored_settings
from storage.stores.opening import open_store


def _field(title: str, description: str, **schema: JsonValue) -> Any:
    """A field of a form. Prefect drops the description of an Annotated type, so all is JSON schema."""
    return Field(json_schema_extra={"title": title, "description": description, **schema})


CHOICES = "\n\n".join(f"- `{name}`: {text}" for name, text in presets().items())
ITEMS: JsonValue = {"type": "string", "pattern": TEXT}
Preset = Annotated[str, _field("Preset", f"The settings to start from.\n\n{CHOICES}", enum=[*presets()])]
RunName = Annotated[str, _field("Run name", "The run to start or continue (empty = the preset's).", pattern=NAME)]
Dataset = Annotated[str, _field("Dataset", "Name of the dataset in the store (empty = the preset's).", pattern=NAME)]
Source = Annotated[str, _field("Source", "File, folder, glob or Hub dataset (empty = the preset's).", pattern=LINE)]
Steps = Annotated[int, _field("Steps", "Optimizer steps in all (0 = the preset's).", minimum=0, maximum=10**9)]
Gpus = Annotated[int, _field("GPUs", "GPUs, or processes on a CPU (0 = the preset's, or all).", minimum=0, maximum=64)]
More = _field("More settings", "One per line: section.field=value (see gpt2 settings).", maxItems=100, items=ITEMS)
Settings = Annotated[tuple[str, ...], More]
Minutes = Annotated[
    int, _field("Minutes", "How long the demo takes on two idle cores.", minimum=2, exclusiveMaximum=9999)
]
Checkpoint = Annotated[str, _field("Checkpoint", "last, best, every (all kept) or a step number.", pattern=CHECKPOINT)]


def _enter_folder() -> None:
    """Enter the folder of gpt2 serve or bootstrap. Not before the import of the flow: a user may have own `flows`."""
    os.chdir(os.environ.get("GPT2_FOLDER", "."))


def _run_name() -> str:
    form = flow_run.parameters
    return f"{flow_run.flow_name}-{form.get('name') or form.get('dataset') or form['preset']}"


@flow(name="pretrain", flow_run_name=_run_name)
def pretrain(
    preset: Preset = DEFAULT,
    name: RunName = "",
    source: Source = "",
    steps: Steps = 0,
    gpus: Gpus = 0,
    settings: Settings = (),
) -> Reported:
    """Run the whole pipeline, from source files to report."""
    _enter_folder()
    return pipeline.pretrain.fn(_config(preset, name, settings, source, steps, gpus))


@flow(name="demo", flow_run_name="demo")
def demo(minutes: Minutes = 3, settings: Settings = ()) -> Reported:
    """Run the whole pipeline offline, on Python's own documentation."""
    _enter_folder()
    config = lasting(filled(preset_values("demo"), settings=settings), minutes)
    write_corpus(Path(config.data.source).parent)
    return pipeline.pretrain.fn(config)


@flow(name="dataset-refresh", flow_run_name=_run_name)
def dataset_refresh(
    preset: Preset = "fineweb-edu-newest", dataset: Dataset = "", source: Source = "", settings: Settings = ()
) -> str:
    """Bring a dataset up to date with its source."""
    _enter_folder()
    names = (f"data.dataset={dataset}",) if dataset else ()
    return pipeline.build_dataset.fn(filled(preset_values(preset), source=source, settings=[*names, *settings]))


@flow(name="train", flow_run_name=_run_name)
def train(
    preset: Preset = DEFAULT, name: RunName = "", steps: Steps = 0, gpus: Gpus = 0, settings: Settings = ()
) -> None:
    """Train a run to its last step, from its newest checkpoint."""
    _enter_folder()
    train_stage.fn(_config(preset, name, settings, "", steps, gpus))


@flow(name="evaluate", flow_run_name=_run_name)
def evaluate(name: RunName, checkpoint: Checkpoint = "last", settings: Settings = ()) -> Reported:
    """Evaluate checkpoints of a run, then write its report."""
    _enter_folder()
    return pipeline.evaluate_and_report.fn(_config(DEFAULT, name, (f"evaluation.checkpoint={checkpoint}", *settings)))


def _config(
    preset: str, name: str, settings: Sequence[str], source: str = "", steps: int = 0, gpus: int = 0
) -> RunConfig:
    """The configuration of a form: the settings of the run if it exists, else the preset's, then the form's fields."""
    fill = partial(filled, name=name, source=source, steps=steps, gpus=gpus, settings=settings)
    config = fill(preset_values(preset))
    stored = stored_settings(open_store(config.store_url, create=True), config.name)
    return fill(stored | {"store_url": config.store_url}) if stored else config

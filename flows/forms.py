"""What a click in Prefect's UI asks for: each deployment's flow takes a short form and runs it as a configuration.

The fields that are left empty keep the values of the preset. The settings of a run that exists replace the preset.
"""

import os
from typing import Annotated, Any

from prefect import flow
from prefect.runtime import flow_run
from pydantic import Field, JsonValue

from flows import pretrain as pipeline
from flows.demo import lasting
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
Run = Annotated[str, _field("Run name", "The run to start or continue (empty = the preset's).", pattern=NAME)]
Dataset = Annotated[str, _field("Dataset", "Name of the dataset in the store (empty = the preset's).", pattern=NAME)]
Source = Annotated[str, _field("Source", "File, folder, glob or Hub dataset (empty = the preset's).", pattern=LINE)]
Steps = Annotated[int, _field("Steps", "Optimizer steps in all (0 = the preset's).", minimum=0, maximum=10**9)]
Gpus = Annotated[int, _field("GPUs", "GPUs, or processes on a CPU (0 = the preset's, or all).", minimum=0, maximum=64)]
MORE = _field("More settings", "One per line: section.field=value (see gpt2 settings).", maxItems=100, items=ITEMS)
More = Annotated[tuple[str, ...], MORE]
MINUTES = _field("Minutes", "How long the demo takes on two idle cores.", minimum=2, exclusiveMaximum=9999)
Minutes = Annotated[int, MINUTES]
Checkpoint = Annotated[str, _field("Checkpoint", "last, best, every (all kept) or a step number.", pattern=CHECKPOINT)]


def _entered(preset: str) -> dict[str, Any]:
    """The values of a preset, in the folder of gpt2 serve or bootstrap.

    A flow enters it, not the import of the flow: a user's folder may have own `flows`.
    """
    os.chdir(os.environ.get("GPT2_FOLDER", "."))
    return preset_values(preset)


def _run_name() -> str:
    form = flow_run.parameters
    return f"{flow_run.flow_name}-{form.get('name') or form.get('dataset') or form['preset']}"


@flow(name="pretrain", flow_run_name=_run_name)
def pretrain(
    preset: Preset = DEFAULT, name: Run = "", source: Source = "", steps: Steps = 0, gpus: Gpus = 0, settings: More = ()
) -> Reported:
    """Run the whole pipeline, from source files to report."""
    return pipeline.pretrain.fn(_config(preset, name=name, source=source, steps=steps, gpus=gpus, settings=settings))


@flow(name="demo", flow_run_name="demo")
def demo(minutes: Minutes = 3, settings: More = ()) -> Reported:
    """Run the whole pipeline offline, on Python's own documentation."""
    return pipeline.pretrain.fn(lasting(filled(_entered("demo"), settings=settings), minutes))


@flow(name="dataset-refresh", flow_run_name=_run_name)
def dataset_refresh(
    preset: Preset = "fineweb-edu-newest", dataset: Dataset = "", source: Source = "", settings: More = ()
) -> str:
    """Bring a dataset up to date with its source."""
    names = (f"data.dataset={dataset}",) if dataset else ()
    return pipeline.build_dataset.fn(filled(_entered(preset), source=source, settings=[*names, *settings]))


@flow(name="train", flow_run_name=_run_name)
def train(preset: Preset = DEFAULT, name: Run = "", steps: Steps = 0, gpus: Gpus = 0, settings: More = ()) -> None:
    """Train a run to its last step, from its newest checkpoint."""
    train_stage.fn(_config(preset, name=name, steps=steps, gpus=gpus, settings=settings))


@flow(name="evaluate", flow_run_name=_run_name)
def evaluate(name: Run, checkpoint: Checkpoint = "last", settings: More = ()) -> Reported:
    """Evaluate checkpoints of a run, then write its report."""
    settings = (f"evaluation.checkpoint={checkpoint}", *settings)
    return pipeline.evaluate_and_report.fn(_config(DEFAULT, name=name, settings=settings))


def _config(preset: str, **fields: Any) -> RunConfig:
    """The configuration of a form: the settings of the run if it exists, else the preset's, then the form's fields."""
    config = filled(_entered(preset), **fields)
    stored = stored_settings(open_store(config.store_url, create=True), config.name)
    return filled(stored | {"store_url": config.store_url}, **fields) if stored else config

"""The verbs for models: generate text, export and import Hugging Face folders. Imports no torch."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from cyclopts.types import NonNegativeInt, PositiveInt

from flows.console.options import console, say
from flows.console.settings import DEFAULTS, RunName, Settings
from model.checkpoints.huggingface import export_run, import_folder, read_model_config
from model.config import RunConfig, differences
from storage import keys
from storage.stores.opening import open_store

Prompt = Annotated[str, Parameter(allow_leading_hyphen=True)]


def generate(
    name: RunName = None,
    /,
    *,
    prompt: Prompt,
    settings: Settings = DEFAULTS,
    samples: PositiveInt = 1,
    seed: NonNegativeInt = 0,
) -> int:
    """Continue a prompt with the run's newest checkpoint.

    Example: gpt2 generate demo --prompt "The language" --samples 3

    Args:
        prompt: The text to continue.
        samples: Number of texts.
        seed: Random seed (default 0): the same seed gives the same text.
    """
    config = settings.run(name)
    sampling = config.evaluation
    argv = [sys.executable, "-m", "model.evaluation.generate", config.store_url, config.name, "--prompt", prompt]
    argv += ["--samples", str(samples), "--seed", str(seed), "--tokens", str(sampling.sample_tokens)]
    argv += ["--device", config.resources.device, "--temperature", str(sampling.temperature)]
    argv += ["--top-k", str(sampling.top_k), "--top-p", str(sampling.top_p)]
    return subprocess.run(argv, check=False).returncode


def export(name: RunName = None, /, *, to: Path, settings: Settings = DEFAULTS) -> None:
    """Export the run's newest checkpoint and tokenizer for Hugging Face transformers.

    Example: gpt2 export mine --to my-gpt2

    Args:
        to: The folder to write to, new or empty.
    """
    config = settings.run(name)
    with console.status("writing the model"):
        record = export_run(open_store(config.store_url), config.name, to)
    say("export", f"step {record.step:,} of run {config.name}, written to {to}")
    say("next", f"transformers.AutoModelForCausalLM.from_pretrained({str(to)!r}), AutoTokenizer likewise")


def import_model(folder: Path, name: str, /, *, settings: Settings = DEFAULTS) -> None:
    """Import a GPT-2 in Hugging Face format as step 0 of a new run, to evaluate it or start other runs from it.

    Example: gpt2 import path/to/gpt2 imported

    Args:
        folder: The folder with config.json and model.safetensors.
        name: The name of the new run.
    """
    config = settings.new(name)
    shaped = _shaped(config, folder)
    chosen = config.model.model_fields_set
    requested, read = (model.model_dump(include=chosen) for model in (config.model, shaped.model))
    if differing := differences(requested, read, "model"):
        raise ValueError(f"cannot import {folder}: {'; '.join(differing)}. Leave these settings out.")
    with console.status("reading the model"):
        record = import_folder(open_store(config.store_url, create=True), config.name, folder)
    say("import", f"{folder} is step {record.step} of run {name} in {config.store_url}")
    say("evaluate", settings.command(f"evaluate {name}"))
    say("generate", f"{settings.command(f'generate {name}')} --prompt 'Hello'")
    shape = [f"model.{field}={value}" for field, value in shaped.model]
    shape.append(f"train.sequence_tokens={shaped.train.sequence_tokens}")
    say("train", settings.command("train NEW", *shape, f"train.start_from={name}"))


def imported_run(config: RunConfig, folder: Path) -> RunConfig:
    """Import the folder once, by default as a run of its name. Returns the configuration that evaluates the run."""
    shaped = _shaped(config, folder)
    is_named = config.name != RunConfig.model_fields["name"].default
    name = config.name if is_named else keys.as_name(folder.resolve().name) or "model"
    with console.status("reading the model"):
        import_folder(open_store(config.store_url, create=True), name, folder, again=True)
    return shaped.model_copy(update={"name": name})


def _shaped(config: RunConfig, folder: Path) -> RunConfig:
    model = read_model_config(folder)
    train = config.train.model_copy(update={"sequence_tokens": min(config.train.sequence_tokens, model.context_tokens)})
    return config.model_copy(update={"model": model, "train": train})

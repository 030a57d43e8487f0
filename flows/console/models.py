"""The verbs for models: generate text, export and import Hugging Face folders. Imports no torch.

numpy and safetensors take 0.2 s to import, so the verbs import what they need themselves.
"""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.console.app import MODELS, app
from flows.console.options import ConfigFile, Overrides, command, console, say
from model.config import ModelConfig, RunConfig, differences
from model.config_file import load_config
from storage import keys
from storage.stores.opening import open_store

CONFIGS = Path(__file__).parents[2] / "deploy" / "configs"


@app.command(rich_help_panel=MODELS)
def generate(
    prompt: Annotated[str, typer.Option("--prompt", help="How the text begins.")],
    config: ConfigFile = None,
    overrides: Overrides = None,
    samples: Annotated[int, typer.Option(min=1, help="Number of texts.")] = 1,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same text.")] = 0,
) -> None:
    """Continue a prompt with the run's newest checkpoint."""
    settings = load_config(config, overrides or [])
    sampling = settings.evaluation
    argv = [sys.executable, "-m", "model.evaluation.generate", settings.store_url, settings.name, "--prompt", prompt]
    argv += ["--samples", str(samples), "--seed", str(seed), "--tokens", str(sampling.sample_tokens)]
    argv += ["--device", settings.resources.device, "--temperature", str(sampling.temperature)]
    argv += ["--top-k", str(sampling.top_k), "--top-p", str(sampling.top_p)]
    raise typer.Exit(subprocess.run(argv, check=False).returncode)


@app.command(rich_help_panel=MODELS)
def export(
    to: Annotated[Path, typer.Argument(help="The folder to write, new or empty.", metavar="FOLDER")],
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Export the run's newest checkpoint and tokenizer for Hugging Face transformers."""
    from model.checkpoints.huggingface import export_run

    settings = load_config(config, overrides or [])
    with console.status("writing the model"):
        record = export_run(open_store(settings.store_url), settings.name, to)
    say("export", f"step {record.step:,} of run {settings.name}, written to {to}")
    say("next", f"transformers.AutoModelForCausalLM.from_pretrained({str(to)!r}), AutoTokenizer likewise")


@app.command("import", rich_help_panel=MODELS)
def import_model(
    folder: Annotated[Path, typer.Argument(help="config.json and model.safetensors of a GPT-2.", metavar="FOLDER")],
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Start a run from a GPT-2 in Hugging Face format, to evaluate it, generate text or train further."""
    from model.checkpoints.huggingface import import_folder, read_model_config

    settings = load_config(config, overrides or [])
    _check_shape(folder, settings.model, read_model_config(folder))
    with console.status("reading the model"):
        record = import_folder(open_store(settings.store_url, create=True), settings.name, folder)
    say("import", f"{folder} is step {record.step} of run {settings.name} in {settings.store_url}")
    say("evaluate", command("evaluate", config, overrides or []))
    say("generate", f"{command('generate', config, overrides or [])} --prompt 'Hello'")
    say("train", command("train", config, [*(overrides or []), "name=NEW", f"train.start_from={settings.name}"]))


def imported_run(config: RunConfig, folder: Path) -> RunConfig:
    """Import the folder, unless that was done before. Returns the configuration that evaluates it.

    The run is named after the folder when the configuration does not name it. Raises ValueError for a folder without a
    GPT-2, or when the run holds another model.
    """
    from model.checkpoints.huggingface import ensure_imported, read_model_config

    model = read_model_config(folder)
    name = config.name
    if name == RunConfig.model_fields["name"].default:
        name = keys.as_name(folder.resolve().name) or "model"
    with console.status("reading the model"):
        ensure_imported(open_store(config.store_url, create=True), name, folder)
    train = config.train.model_copy(update={"sequence_tokens": min(config.train.sequence_tokens, model.context_tokens)})
    return config.model_copy(update={"name": name, "model": model, "train": train})


def _check_shape(folder: Path, configured: ModelConfig, imported: ModelConfig) -> None:
    """Raise ValueError, with the options to give, when the folder's model does not have the configured shape."""
    differing = differences(configured.model_dump(), imported.model_dump())
    if differing:
        presets = [file for file in sorted(CONFIGS.glob("gpt2-*.toml")) if load_config(file, []).model == imported]
        fields = " ".join(f"--set model.{name}={value}" for name, value in imported.model_dump().items())
        options = " or ".join([*(f"--config {file}" for file in presets), fields])
        raise ValueError(
            f"cannot import {folder}: its config.json differs: {'; '.join(differing)}. Give its shape: {options}"
        )

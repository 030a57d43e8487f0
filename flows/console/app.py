"""The two Typer apps that the verbs register with: `gpt2` and `gpt2 dataset`. Imports no verb."""

import typer

MODELS = "Models"
INSPECT = "Inspect and clean up"
PLATFORM = "Run as a service"

app = typer.Typer(
    help="Pretrain GPT-2 from scratch: text to token shards, training, evaluation and report as one pipeline.",
    epilog="Start with: gpt2 demo",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
)
dataset_app = typer.Typer(
    help="Build, inspect, check and copy a dataset.",
    epilog="Start with: gpt2 dataset build --set data.source='texts/*.parquet'",
    no_args_is_help=True,
)
app.add_typer(dataset_app, name="dataset")
